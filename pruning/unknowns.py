"""What of a network's numbers is known: a run on numbers of which some are unknown, and stand as NaN.

What an operation makes of an unknown number is unknown, except that a weight of 0 passes nothing on. With NaN as the
input, what is a number in the end is a constant; with NaN as the weights of a filter, what is one does not depend on
that filter. Operations are PyTorch's own (ATen); what is not listed here makes all unknown of anything unknown.
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pruning import tracing
from pruning.tracing import leaves, outs

MOVEMENT = tracing.MOVEMENT | {"copy", "cat", "stack"}
BATCH_NORM = {"native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training"}
FACTORIES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
PRODUCTS, AVERAGES = {"mm", "addmm"}, {"mean", "amax", "amin"}
POINTWISE = {"hardswish", "_prelu_kernel"}  # those that PyTorch does not tag as such
SPATIAL = re.compile(r"^_?(adaptive_)?(avg|max)_pool(\d)d|^upsample_.*?(\d)d")


@dataclass
class Reading:
    """A convolution, or a matrix product, that reads its input by a parameter as it stands.

    `axis`: that of the weight along which the inputs lie. `values` `(C_in,)`: the constant that each of them is, NaN
    where it is none. `everywhere`: whether a constant input makes a constant output, not where padding or striding puts
    zeros between.
    """

    weight: nn.Parameter
    bias: Tensor | None
    axis: int
    values: Tensor
    everywhere: bool = True


class Unknowns(TorchDispatchMode):
    """With `constants`, a number counts as known only if it is the same at any image size: not where padding shows
    at the edges, and only if a map that is pooled or convolved is the same at all its places.

    `uses` counts how often operations are given each tensor, by its id, a transposed matrix for the matrix itself;
    `readings` are those of parameters. Raises ValueError where the network's code itself depends on an unknown number.
    """

    def __init__(self, constants: bool) -> None:
        super().__init__()
        self.constants = constants
        self.uses: Counter[int] = Counter()
        self.readings: list[Reading] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        tensors = list(leaves((args, kwargs), Tensor))
        name = function._schema.name.removeprefix("aten::").removesuffix("_")
        if name in {"t", "_to_copy"} and isinstance(origin(tensors[0])[0], nn.Parameter):
            output, (parameter, is_turned) = self.movement(function, tensors, args, kwargs), origin(tensors[0])
            output._origin = parameter, is_turned != (name == "t")
            return output
        self.uses.update(id(origin(tensor)[0]) for tensor in tensors)
        if outs(function) and any(map(has_unknowns, tensors)):
            return self.anything(function, args, kwargs)
        if name in MOVEMENT:
            return self.movement(function, tensors, args, kwargs)
        if name == "convolution":
            return self.convolution(function, *args)
        if name in PRODUCTS:
            return self.product(function, *args, **kwargs)
        if found := SPATIAL.match(name):
            return self.spatial(function, int(found[3] or found[4]), *args, **kwargs)
        if name in AVERAGES:
            return self.average(function, *args, **kwargs)
        is_known = not any(map(has_unknowns, tensors)) and torch.Tag.nondeterministic_seeded not in function.tags
        if is_known or name in FACTORIES:
            return function(*args, **kwargs)
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags):
            raise ValueError(f"the network's code depends on what {name} finds")
        if name in BATCH_NORM and not any(each is True for each in args):  # not with the statistics of the batch
            anywhere, gamma = unknowns(args[0]), args[1]
            if gamma is not None:
                anywhere = anywhere & passes_on(gamma).view(-1, *[1] * (args[0].dim() - 2))
            return self.pointwise(function, anywhere, args, kwargs)
        if name in POINTWISE or torch.Tag.pointwise in function.tags:
            anywhere = functools.reduce(torch.logical_or, map(unknowns, tensors))
            if name == "mul" and self.constants:  # 0 times anything is 0
                factors = map(torch.as_tensor, args)
                anywhere = functools.reduce(torch.logical_and, ((x != 0) | unknowns(x) for x in factors), anywhere)
            return self.pointwise(function, anywhere, args, kwargs)
        return self.anything(function, args, kwargs)

    def movement(self, function: Any, tensors: list[Tensor], args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
        """NaN moves with the numbers, and between kinds of numbers by the mark."""
        output = function(*args, **kwargs)
        for tensor in leaves(output, Tensor):
            if not tensor.is_floating_point():
                mark(tensor, any(map(has_unknowns, tensors)))
            elif any(map(is_marked, tensors)):
                tensor.fill_(torch.nan)
            tensor._is_weight = is_weight(tensors[0])
        return output

    def convolution(self, function: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:  # noqa: ANN401
        """Unknown are the channels that read an unknown one with any weight but 0."""
        _, padding, _, transposed, _, groups = rest
        if groups == 1:
            self.note(weight, bias, 0 if transposed else 1, x, not (transposed or any(padding)))
        hidden = self.spread(x, x.dim() - 2).flatten(2)[..., 0].any(0)  # (C_in,)
        if self.constants and (transposed or any(padding)):
            hidden = hidden | (x != 0).transpose(0, 1).flatten(1).any(1)
        reads = passes_on(weight).flatten(2).any(2)  # (C_out, C_in / groups), or (C_in, C_out / groups) if transposed
        reads = reads.unflatten(0, (groups, -1)).transpose(1, 2) if transposed else reads.unflatten(0, (groups, -1))
        reached = (reads & hidden.view(groups, 1, -1)).any(2).flatten()  # (C_out,)
        output = function(known(x), weight, bias, *rest)
        return output.masked_fill_(reached.view(-1, *[1] * (x.dim() - 2)), torch.nan)

    def spatial(self, function: Any, axes: int, x: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Pooling and upsampling: unknown are the channels of which anything is, or that have edges."""
        hidden = self.spread(x, axes)
        if self.constants and "avg" in function._schema.name and not has_no_edges(function, args):
            hidden = hidden | (x != 0)
        output = function(known(x), *args, **kwargs)
        first, *places = output if isinstance(output, tuple) else (output,)
        first.masked_fill_(hidden.flatten(-axes).any(-1).view(*hidden.shape[:-axes], *[1] * axes), torch.nan)
        for each in places:
            mark(each)
        return output

    def average(self, function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """A mean, or an extreme, along some axes."""
        if not x.is_floating_point():
            return self.anything(function, (x, *args), kwargs)
        output = function(x, *args, **kwargs)
        if self.constants:
            dims = (args[0] if args else kwargs.get("dim")) or tuple(range(x.dim()))
            keep = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
            output.masked_fill_(x.amax(dims, keep) != x.amin(dims, keep), torch.nan)
        return output

    def product(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """A product of two matrices (M, K), (K, N), the last arguments, with or without a bias before them."""
        *bias, one, other = args
        self.note(other, bias[0] if bias and not kwargs else None, int(origin(other)[1]), one)
        hidden = unknowns(one).any(0)  # (K,)
        reached = (other[hidden] != 0).any(0) if is_weight(other) else hidden.any()  # (N,), or all
        output = function(*bias, known(one), other, **kwargs)
        return output.masked_fill_(reached, torch.nan)

    def note(self, weight: Tensor, bias: Tensor | None, axis: int, x: Tensor, everywhere: bool = True) -> None:
        """Note how a parameter is read, see `Reading`; the input is `x` `(N, C_in, ...)`."""
        parameter, _ = origin(weight)
        if isinstance(parameter, nn.Parameter):
            values = x.transpose(0, 1).flatten(1)
            values = values[:, 0].where((values == values[:, :1]).all(1), torch.nan)
            bias = origin(bias)[0] if bias is not None else None
            self.readings.append(Reading(parameter, bias, axis, values, everywhere))

    def pointwise(self, function: Any, anywhere: Tensor, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
        """Unknown `anywhere` that an argument is."""
        if function._schema.is_mutable and args[0].is_floating_point():
            args[0].masked_fill_(args[0].isnan(), 0)
            output = function(args[0], *known(args[1:]), **known(kwargs))
        else:
            output = function(*known(args), **known(kwargs))
        first = output[0] if isinstance(output, tuple) else output
        if first.is_floating_point():
            first.masked_fill_(anywhere, torch.nan)
        else:
            mark(first, bool(anywhere.any()))
        return output

    def anything(self, function: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
        """All is unknown that comes out, and what is changed in place."""
        changed = [kwargs[name] for name in outs(function)] or ([args[0]] if function._schema.is_mutable else [])
        output = function(*args, **kwargs)
        for tensor in leaves((output, changed), Tensor):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            else:
                mark(tensor)
        return output

    def spread(self, x: Tensor, axes: int) -> Tensor:
        """Where `x` is unknown, along its last axes everywhere if anywhere, or if it is not the same everywhere."""
        flat = x.flatten(-axes)
        hidden = flat.isnan().any(-1)
        if self.constants:
            hidden = hidden | (flat.amax(-1) != flat.amin(-1))
        return hidden.view(*hidden.shape, *[1] * axes).expand(x.shape)


def origin(tensor: Tensor) -> tuple[Tensor, bool]:
    """The parameter that a tensor is, perhaps in another precision, and whether turned; or else the tensor itself."""
    return getattr(tensor, "_origin", (tensor, False))


def is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or getattr(tensor, "_is_weight", False)


def passes_on(factor: Tensor) -> Tensor:
    """Where a factor passes on what it is multiplied with: a weight where it is not 0, anything else everywhere."""
    return factor != 0 if is_weight(factor) else torch.ones_like(factor, dtype=torch.bool)


def has_no_edges(function: Any, args: tuple) -> bool:  # noqa: ANN401
    """Whether average pooling makes a constant map of a constant map."""
    names = [argument.name for argument in function._schema.arguments[1:]]
    given = dict(zip(names, args, strict=False))
    return not any(given.get("padding") or ()) and given.get("divisor_override") is None


def mark(tensor: Tensor, unknown: bool = True) -> None:
    """Note that numbers which are not floating-point, so that none can be NaN, are unknown; views share the mark."""
    if unknown:
        tensor.untyped_storage()._unknown = True


def is_marked(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "_unknown", False)


def unknowns(tensor: Tensor) -> Tensor:
    """Where a tensor is unknown; numbers that are not floating-point are so altogether, by a mark."""
    if tensor.is_floating_point():
        return tensor.isnan()
    return torch.full(tensor.shape, is_marked(tensor), device=tensor.device)


def has_unknowns(tensor: Tensor) -> bool:
    if tensor.is_floating_point():
        return bool(tensor.sum().isnan() and tensor.isnan().any())  # a sum takes no memory
    return is_marked(tensor)


def known(tree: Any) -> Any:  # noqa: ANN401
    """The same with 0 for all that is unknown."""
    return tree_map(
        lambda leaf: (
            leaf.masked_fill(leaf.isnan(), 0)
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and has_unknowns(leaf)
            else leaf
        ),
        tree,
    )
