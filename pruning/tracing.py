"""What hangs together in a network: a run of it on channel ids.

The network runs once as it is, whatever its Python code does, on tensors of the meta device, which have a shape but
no numbers. PyTorch shows each ATen operation on its way, and beside each tensor stand the ids of its channels.

- Every axis of every parameter begins with ids of its own, one for each index along it.
- Data movement (view, cat, chunk, ...) moves the ids by the very same operation.
- Whatever meets element by element becomes one: the summands of a residual addition, a feature map and gamma. So do the
  inputs of a convolution or a matrix product and that axis of its weight; its outputs take the ids of the other axis.
- The inputs and outputs of the network are fixed, and so is what it keeps for its next call, unless in a buffer, which
  has the same channels then; and whatever an operation touches that is unknown here.

The ids of one tensor are of its own shape, but expanded along every axis where they do not vary, so that they need next
to no memory. An id is negative where a channel has its place but is not zero when its filter is (behind a sigmoid):
whoever sums over such a place cannot do without it.
"""

import copy
import operator
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

FIXED = 0  # the id of all that stays

PRODUCTS = {"mul", "div", "_prelu_kernel", "native_dropout"}  # zero if a factor is, or the dividend, or the first
POINTWISE = set("hardswish _prelu_kernel copy clone".split())  # those that PyTorch does not tag as such
MOVEMENT = set(
    "view _unsafe_view reshape permute transpose t unsqueeze squeeze expand slice select split split_with_sizes chunk "
    "unbind flip roll repeat alias detach detach_ lift_fresh lift_fresh_copy _to_copy clone contiguous unfold diagonal "
    "pixel_shuffle pixel_unshuffle channel_shuffle".split()
)
ACTIVATIONS = set("relu hardtanh silu gelu hardswish hardsigmoid sigmoid tanh leaky_relu elu".split())  # one argument
SUMS = {"sum", "linalg_vector_norm"}  # what is zero adds nothing to them
REDUCTIONS = SUMS | set(
    "mean amax amin max min var std prod cumsum logsumexp _softmax _safe_softmax _log_softmax all any argmax argmin "
    "var_mean std_mean".split()
)
ZERO_OF_ZEROS = SUMS | {"mean", "amax", "amin", "max", "min", "var", "std", "prod", "cumsum"}
RANDOM = set(
    "fill zero bernoulli normal uniform random rand_like randn_like zeros_like ones_like empty_like full_like".split()
)
ZEROS = {"zero", "zeros", "zeros_like", "new_zeros"}
FACTORIES = set("empty zeros ones full rand randn new_empty new_zeros new_ones new_full empty_strided".split())
SIZED = {Tensor.view: 1, Tensor.new_zeros: 1, Tensor.new_ones: 1, torch.zeros: 0, torch.ones: 0}  # where sizes begin
SPLITS = {Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes}
REGISTRIES = frozenset(vars(nn.Module()))  # the attributes that every module has
SIMPLE = int | float | str | None
SPATIAL = re.compile(r"(pool|upsample|_pad|grid_sampler).*?(\d)d")


@dataclass(eq=False)
class Value:
    """What is known of a tensor: the ids of its channels, each an expanded tensor of its shape that varies along one
    axis or more; the operation that made it; whether it is made of parameters alone, and whether a view shares it."""

    shape: torch.Size
    ids: list[Tensor] = field(default_factory=list)
    source: Any = None
    raw: bool = False
    viewed: bool = False
    known: Tensor | None = None
    dtype: torch.dtype = torch.float32
    order: tuple[int, ...] | None = None


@dataclass
class Operation:
    """One ATen operation of a run: what it was given, every tensor as its `Value`, and the values it returned."""

    function: Any
    name: str
    args: tuple
    kwargs: dict
    values: list[Value]
    results: list[Value] = field(default_factory=list)

    def bound(self, name: str) -> Any:  # noqa: ANN401
        """The argument of that name, or None."""
        for argument, value in zip(self.function._schema.arguments, self.args, strict=False):
            if argument.name == name:
                return value
        return self.kwargs.get(name)


class Held(int):
    """A whole number that a module has as an attribute, or within a tuple or list.

    `at`: the path of the module, the name of the attribute, and the place in it, None of a number.
    """

    at: tuple[str, str, int | None]


class Rewritten(TorchFunctionMode):
    """Turns reshape and unflatten into view, which PyTorch shows before it looks whether the sizes fit.

    What PyTorch shows in parts becomes one operation that is the same to channels: RMSNorm becomes LayerNorm, circular
    padding that of the edges. Sizes that modules hold, which no operation remembers, are told to the run.
    """

    def __init__(self, run: "Run") -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # noqa: ANN401
        if function in {Tensor.reshape, torch.reshape} and not kwargs and isinstance(args[0], Tensor):
            function, args = Tensor.view, (args[0].contiguous(), *args[1:])
        elif function is Tensor.unflatten and not kwargs and isinstance(args[1], int):
            x, dim = args[0].contiguous(), args[1] % args[0].dim()
            function, args = Tensor.view, (x, (*x.shape[:dim], *args[2], *x.shape[dim + 1 :]))
        first = SIZED.get(function, 1)
        if (function in SIZED or function in SPLITS) and len(args) > first:
            several = isinstance(args[first], tuple | list)
            sizes = args[first] if several else args[first : 2 if function in SPLITS else None]
            self.run.held = {place: size for place, size in enumerate(sizes) if isinstance(size, Held)}
        function = {F.rms_norm: rms_norm, torch.rms_norm: rms_norm, F.pad: padded}.get(function, function)
        output = function(*args, **(kwargs or {}))
        self.run.held = {}
        return output


def rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:  # noqa: ANN401
    """F.rms_norm, to channels."""
    return F.layer_norm(input, normalized_shape, weight)


def padded(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:  # noqa: ANN401
    """F.pad, to channels."""
    return F.pad(input, pad, "replicate" if mode == "circular" else mode, value)


@cache
def form(function: Any) -> tuple[str, bool, bool]:  # noqa: ANN401
    """The name of an operation, whether it overwrites its first argument, and whether it returns a view of it."""
    name, schema = function._schema.name.removeprefix("aten::"), function._schema
    is_view = not schema.is_mutable and any(returned.alias_info is not None for returned in schema.returns)
    return name.rstrip("_") if schema.is_mutable else name, schema.is_mutable and not outs(function), is_view


@cache
def outs(function: Any) -> tuple[str, ...]:  # noqa: ANN401
    """The keywords of tensors that an operation writes its results into, as `out`."""
    return tuple(argument.name for argument in function._schema.arguments if argument.is_out)


class Run(TorchDispatchMode):
    """Sees each ATen operation of a run on the meta device, and hands it on to `operate`.

    Tensors of whole numbers stay real: they index, and an index must be known. What is computed of them alone is real.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.held: dict[int, Held] = {}  # those sizes that the next view or split is given which modules hold

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # noqa: ANN401
        kwargs = dict(kwargs) if kwargs else {}
        name = form(function)[0]
        if function.namespace == "profiler":
            return function(*args, **kwargs)
        if name == "_to_copy":
            kwargs.pop("device", None)
        if name == "as_strided" and form(function)[1] and lies_so(*args[:3]):  # of an adaptive pooling to 1, for one
            return args[0]
        tensors = among(args, kwargs, Tensor)
        if name == "arange" or (tensors and not any(tensor.is_meta for tensor in tensors)):
            if "device" in kwargs:
                kwargs["device"] = torch.device("cpu")
            return function(*args, **kwargs)
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        if name == "index":
            args = (args[0], positions(args[1]), *args[2:])
        if not all(tensor.is_meta for tensor in tensors):
            args, kwargs = instead(args, kwargs, Tensor, self.shadowed)
        values = instead(args, kwargs, Tensor, value_of)
        return self.operate(Operation(function, name, *values, among(*values, Value)), args, kwargs)

    def shadowed(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or its shadow that remembers the numbers."""
        if tensor.is_meta:
            return tensor
        shadow = torch.empty_like(tensor, device="meta")
        shadow._value = Value(tensor.shape, known=tensor)
        return shadow

    def place(self) -> str:
        """The path of the module whose code runs now, the innermost of the network."""
        frame = sys._getframe(1)
        while frame is not None:
            path = self.paths.get(id(frame.f_locals.get("self")))
            if path is not None and frame.f_locals["self"] is not self:
                return path or "the network"
            frame = frame.f_back
        return "the network"

    def execute(self, values: list[tuple[Tensor, Value]], example: Any) -> Any:  # noqa: ANN401
        """The model's output; `example` is a tensor, a tuple or list of arguments, or a dict of keywords.

        `values` are those of the model's tensors. What the run changes in the model is afterwards as it was.
        """
        for tensor, value in values:
            tensor._value = replace(value)
        example = without_numbers(example)
        with left_as_it_was(self.model) as changes, torch.no_grad():
            self.begin()
            with Rewritten(self), self:
                output = call(self.model, example)
            self.end(changes)
            return output

    def begin(self) -> None:
        """The run begins; what this changes in the model is afterwards as it was, too."""

    def end(self, changes: Callable[[], list[tuple[Any, Any]]]) -> None:
        """The run has ended; `changes()` are those that it made to the model, see `left_as_it_was`."""


def call(model: nn.Module, example: Any) -> Any:  # noqa: ANN401
    """The model's output for one input, a tuple or list of arguments, or a dict of keywords."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple | list) else model(example)


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[Callable[[], list[tuple[Any, Any]]]]:
    """Afterwards the model's modules hold what they held: averages that a run has updated, a mask that it made and
    kept, lists that it added to. Within, attention has no fast path, one operation that nobody could look into.

    Yields a function that tells what has changed so far, as pairs of what was held and what is.
    """
    modules = list(model.modules())
    members = [(own, dict(own)) for module in modules for own in (vars(module), module._parameters, module._buffers)]
    attributes = attributes_of(model)
    tensors = {each for each in attributes if isinstance(each, Tensor)}
    tensors |= {each for _, _, each in tensors_of(model) if not isinstance(each, nn.Parameter)}
    numbers = {each: each.clone() for each in tensors if not each.is_meta}
    values = {each: each._value for each in tensors if hasattr(each, "_value")}
    containers = [(each, each.copy()) for each in containers_in(attributes)]

    def changes() -> list[tuple[Any, Any]]:
        pairs = [(before.get(name), now) for own, before in members for name, now in own.items()]
        pairs += [(old, new) for new, old in containers if not same_members(new, old)]
        pairs += [(old, new) for new, old in numbers.items()]
        return [(old, new) for old, new in pairs if not is_same(old, new)]

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield changes
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for own, before in members + containers:
            own.clear()
            own.extend(before) if isinstance(own, list | deque) else own.update(before)
        for tensor, number in numbers.items():
            tensor.copy_(number)
        for tensor, value in values.items():
            tensor._value = value


def attributes_of(model: nn.Module) -> list[Any]:
    """What the model's modules hold beside parameters, buffers, modules and hooks."""
    return [vars(module)[name] for module in model.modules() for name in vars(module).keys() - REGISTRIES]


def containers_in(values: Iterable[Any]) -> Iterator[Any]:
    """All lists, dicts and sets, and those within them."""
    for each in values:
        if isinstance(each, list | dict | set | deque):
            yield each
        if isinstance(each, list | dict | set | deque | tuple):
            yield from containers_in(each.values() if isinstance(each, dict) else each)


def is_same(one: Any, other: Any) -> bool:  # noqa: ANN401
    """Whether two things are one, or equal as far as that can be told: real tensors and numbers."""
    if isinstance(one, Tensor) and isinstance(other, Tensor) and one is not other:
        return not (one.is_meta or other.is_meta) and torch.equal(one, other)
    return one is other or (isinstance(other, SIMPLE) and one == other)


def same_members(one: Any, other: Any) -> bool:  # noqa: ANN401
    """Whether two lists, dicts or sets hold the very same objects."""
    members = ((*each, *each.values()) if isinstance(each, dict) else each for each in (one, other))
    return len(one) == len(other) and all(map(operator.is_, *members))


def on_shapes(operation: Operation, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
    """What the operation returns, without numbers; quickly, where PyTorch's own way to the shape is a long one."""
    name, in_place = form(operation.function)[:2]
    if name == "native_batch_norm":
        return like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
    if name in ACTIVATIONS or (name in {"add", "mul"} and are_alike(args)):
        return args[0] if in_place else like(args[0])
    return operation.function(*args, **kwargs)


def like(tensor: Tensor) -> Tensor:
    """torch.empty_like, some 50 times as fast on the meta device where the tensor is contiguous."""
    if tensor.is_contiguous():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return torch.empty_like(tensor)


def are_alike(args: tuple) -> bool:
    """Whether the first two are contiguous tensors of one shape and type."""
    forms = [(each.shape, each.dtype, each.is_contiguous()) for each in args[:2] if isinstance(each, Tensor)]
    return len(forms) == 2 and forms[0] == forms[1] and forms[0][2]


class Trace(Run):
    """A run that follows the channels: the operations in order, which ids become one and which are fixed, and why.

    `births` are the first ids of each parameter's axes, from `shadow`; `united` holds pairs of ids that become one,
    `fixed` ids and the reason why they stay, `made` ids of filters, the outputs of convolutions and matrix products,
    `sizes` where a module holds a size, as `Held.at`, with the value and its axis that have it.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__(model)
        self.count = count
        self.operations: list[Operation] = []
        self.united: list[tuple[Tensor, Tensor]] = []
        self.fixed: list[tuple[Tensor, str]] = []
        self.made: list[Tensor] = []
        self.slid_over: list[Tensor] = []
        # Choices are lists of pairs of ids to unite; the first in a list of choices counts until a trial refutes it.
        self.ties: dict[int, list[list[list[tuple[Tensor, Tensor]]]]] = {}
        # By the ids that a view gave several axes: the choice in which the last shrinks, the others, all that are left.
        self.pieces: dict[int, tuple[list, list[list], list[list]]] = {}
        self.zeros: dict[Any, bool] = {}
        self.sizes: list[tuple[tuple, Value, int]] = []
        self.first_of_size: dict[tuple, Tensor] = {}
        self.followers: set[tuple[int, int]] = set()  # the steps and axes whose width was made to follow another one

    def operate(self, operation: Operation, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
        """Run one operation on shapes, and on ids."""
        self.operation = operation
        output = on_shapes(operation, args, kwargs)
        tensors = list(leaves(output, Tensor))
        operation.results = [Value(tensor.shape, dtype=tensor.dtype, order=order_of(tensor)) for tensor in tensors]
        before = getattr(tensors[0], "_value", None) if form(operation.function)[1] else None
        if operation.name in FACTORIES or operation.name == "expand" or any(value.ids for value in operation.values):
            try:
                self.follow(operation)
                for value in operation.results:
                    value.ids = self.one_along_each(value.ids)
            except Exception as error:  # never wrong: what is not understood is fixed
                for value in (*operation.values, *operation.results):
                    self.fix(value.ids, f"cannot be followed, {type(error).__name__}")
                operation.results = [replace(value, ids=[]) for value in operation.results]
        self.finish(operation, tensors, before)
        self.operations.append(operation)
        is_split = operation.name in {"split", "split_with_sizes"}
        for place, size in self.held.items() if is_split or operation.name in {"view", *FACTORIES} else ():
            value = operation.results[place if is_split else 0]
            axis = (operation.bound("dim") or 0) % len(value.shape) if is_split else place
            if value.shape[axis] == size:  # not -1, which is any size
                self.note_size(size.at, value, axis)
        return output

    def note_size(self, at: tuple, value: Value, axis: int) -> None:
        """Note where the size of an axis is held; all axes whose sizes are held there lose the same places."""
        for ids in value.ids:
            if varying(ids) == (axis,):
                self.unite(self.first_of_size.setdefault(at, core(ids)), core(ids))
        self.sizes.append((at, value, axis))

    def finish(self, operation: Operation, tensors: list[Tensor], before: Value | None) -> None:
        """Put the values beside the tensors that were returned."""
        if before is not None:
            if before.viewed and any((ids < 0).any() for ids in map(core, operation.results[0].ids)):
                self.fix(before.ids, "is overwritten while another tensor shares its memory")
            operation.results[0].viewed = before.viewed
        elif form(operation.function)[2]:
            for value in (*operation.values, *operation.results):
                value.viewed = True
        for index, (tensor, value) in enumerate(zip(tensors, operation.results, strict=True)):
            value.source = (len(self.operations), index)
            tensor._value = value

    def begin(self) -> None:
        """Let sizes tell where they are held; comparisons run on plain ones, in case the network's code asks."""
        hold_sizes(self.model)

    def end(self, changes: Callable[[], list[tuple[Any, Any]]]) -> None:
        """What is kept for the next call has the channels of what it takes the place of, or else all stays."""
        for old, new in changes():
            for tensor in leaves(new, Tensor):
                if tensor.is_meta and isinstance(value_of(tensor).source, tuple) and not value_of(tensor).raw:
                    before = value_of(old) if isinstance(old, Tensor) else Value(torch.Size())
                    ids, others = value_of(tensor).ids, before.ids
                    if tensor.shape == before.shape and list(map(varying, ids)) == list(map(varying, others)):
                        for pair in zip(ids, others, strict=True):
                            self.unite(*map(core, pair))
                    else:
                        self.fix([*ids, *others], "is kept from one call to the next")

    def follow(self, operation: Operation) -> None:
        """Find the ids of the results by those of the arguments."""
        name, rule = operation.name, getattr(self, f"on_{operation.name.lstrip('_')}", None)
        operation.results[0].raw = all(value.raw for value in operation.values)
        if outs(operation.function):  # into which others may look
            for value in operation.values:
                self.fix(value.ids, "is written into a tensor that was there")
        elif rule is not None:
            rule(*operation.args, **operation.kwargs)
        elif name in FACTORIES:
            ids = self.new_ids(operation.results[0].shape)
            operation.results[0].ids = ids if name in ZEROS else [self.signed(each, None) for each in ids]
            operation.results[0].raw = name not in ZEROS
        elif name in RANDOM:
            self.fix([ids for value in operation.values[1:] for ids in value.ids], "says what is filled in")
            ids = [core(each).abs().expand(each.shape) for each in operation.values[0].ids]
            operation.results[0].ids = ids if name in ZEROS else [self.signed(each, None) for each in ids]
        elif name in MOVEMENT:
            self.movement(operation)
        elif name in POINTWISE or torch.Tag.pointwise in operation.function.tags:
            self.pointwise(operation)
        elif name in REDUCTIONS:
            self.reduction(operation)
        elif found := SPATIAL.search(name):
            self.spatial(operation, int(found[2]))
        else:
            for value in operation.values:
                self.fix(value.ids, "goes into an operation that is unknown here")

    @cached_property
    def readers(self) -> dict[Any, list[Operation]]:
        """The operations that read a tensor, by its source; of a run that has ended."""
        found: dict[Any, list[Operation]] = {}
        for operation in self.operations:
            for value in operation.values:
                found.setdefault(value.source, []).append(operation)
        return found

    # Ids

    def new_ids(self, shape: torch.Size) -> list[Tensor]:
        """Fresh ids along each axis of a tensor of this shape."""
        ids = []
        for axis, size in enumerate(shape):
            if size > 1:
                ids.append(spread(torch.arange(self.count, self.count + size), axis, shape))
                self.count += size
        return ids

    def unite(self, ids: Tensor, others: Tensor) -> None:
        """Make ids one with their counterparts."""
        self.united.append((ids.flatten().abs(), others.flatten().abs()))

    def fix(self, ids: Tensor | list[Tensor], reason: str) -> None:
        """Make these ids stay."""
        flat = [core(each).flatten().abs() for each in ([ids] if isinstance(ids, Tensor) else ids) if each.numel()]
        if flat and (found := torch.cat(flat)).any():
            self.fixed.append((found, f"{reason} ({self.operation.name} in {self.place()})"))

    def one_along_each(self, several: list[Tensor]) -> list[Tensor]:
        """The ids without those that vary along the same axes as others before them, as where two axes became one."""
        found: dict[tuple[int, ...], Tensor] = {}
        for ids in several:
            if found.setdefault(varying(ids), ids) is not ids:
                self.fix(ids, "shares an axis with other channels")
        return list(found.values())

    def along(self, value: Value | None, axis: int) -> Tensor | None:
        """The ids `(C,)` of a value along one axis, 0 where nothing can be removed; None of no value."""
        if value is None:
            return None
        axis %= len(value.shape)
        found = torch.zeros(value.shape[axis], dtype=torch.int64)
        for ids in value.ids:
            ids = self.lines(ids, axis)
            if varying(ids) == (axis,):
                found = core(ids).flatten()
            elif axis in varying(ids):
                self.fix(ids, "is read together with what belongs to other channels")
        return found

    def lines(self, ids: Tensor, axis: int) -> Tensor:
        """The ids of what a view made several axes of, as one for each place along one of them: that shrinks, or none.

        The same ids where they have no other axis, or not this one, or where it cannot shrink alone.
        """
        if axis not in varying(ids) or len(varying(ids)) == 1:
            return ids
        choices = self.pieces.get(int(core(ids).flatten()[0].abs()), ([], [], []))[2]
        free = [choice for choice in choices if not one_along(choice, core(ids), axis)]
        if not free:
            return ids
        choices[:] = free
        lines = core(ids).movedim(axis, 0).flatten(1)
        first = lines[:, :1].abs()
        self.unite(lines, first.expand_as(lines))
        return spread(torch.where((lines > 0).all(1, keepdim=True), first, -first).flatten(), axis, ids.shape)

    def read(self, ids: Tensor, value: Value) -> None:
        """Fix what is summed over although it is not zero when its filter is."""
        ids = core(ids)
        if value.raw:
            self.fix(ids, "is a weight that is summed over")
        elif (ids < 0).any():
            self.fix(ids[ids < 0], "is read where it is not zero when its filter is")

    def pass_on(self, value: Value, consumed: set[int], reason: str, keep_zeros: bool = True) -> None:
        """Give the first value's other axes to all results, which have as many axes as it has."""
        for ids in value.ids:
            if consumed & set(varying(ids)):
                if reason:
                    self.fix(ids, reason)
                continue
            for result in self.operation.results:
                if len(result.shape) == ids.dim():
                    result.ids.append((core(ids) if keep_zeros else -core(ids).abs()).expand(result.shape))

    # Layers

    def on_convolution(
        self, x: Value, weight: Value, bias: Value | None, stride: Any, padding: Any, dilation: Any,  # noqa: ANN401
        transposed: bool, output_padding: Any, groups: int,  # noqa: ANN401
    ) -> None:  # fmt: skip
        """Inputs meet one axis of the weight (C_out, C_in / groups, ...), the other makes the outputs.

        Depthwise, an output goes with its input; with other groups as many channels leave each, at the same places.
        """
        in_axis, out_axis = (0, 1) if transposed else (1, 0)
        x = self.in_whole_maps(x)
        inputs, read, made = self.along(x, 1), self.along(weight, in_axis), self.along(weight, out_axis)
        spatial = set(range(2, len(x.shape)))
        self.pass_on(x, spatial | {1}, "", keep_zeros=bias is None)
        for value in (x, weight):
            for ids in value.ids:
                if spatial & set(varying(ids)):
                    self.slid_over.append(core(ids).flatten().abs())
        depthwise = groups > 1 and groups == len(inputs)
        if not depthwise:
            self.read(inputs, x)
            self.made.append(made)
        if groups == 1:
            self.unite(inputs, read)
        elif depthwise:
            each = self.operation.results[0].shape[1] // groups
            self.unite(inputs.repeat_interleave(each) if not transposed else inputs, made if not transposed else read)
            if transposed:
                self.fix(made, "belongs to all channels of a depthwise transposed convolution")
                made = inputs.abs().repeat_interleave(each)
        else:  # all groups shrink alike
            grid = inputs.view(groups, -1)
            self.unite(grid[1:], grid[:1].expand_as(grid[1:]))
            self.unite(inputs, read if transposed else read.repeat(groups))
            made = made.repeat(groups) if transposed else made
            filters = made.view(groups, -1)
            self.unite(filters[1:], filters[:1].expand_as(filters[1:]))
        if bias is not None:
            self.unite(made, self.along(bias, 0))
        self.result(spread(made.abs(), 1, self.operation.results[0].shape))

    def in_whole_maps(self, x: Value) -> Value:
        """What reads maps as a whole: of those that a view made of one axis whole ones leave, and of all heads."""
        return replace(x, ids=[self.lines(ids, 1) for ids in x.ids])

    def on_mm(self, one: Value, other: Value) -> None:
        """(..., M, K) @ (..., K, N): what meets along K becomes one, all else passes on."""
        result = self.operation.results[0]
        result.raw = False
        inner = [ids for ids in one.ids if ids.dim() - 1 in varying(ids)]
        outer = [ids for ids in other.ids if ids.dim() - 2 in varying(ids)]
        met, by = inner, outer
        if len(inner) == len(outer) == 1:  # where only one of them has channels of several heads, all heads are alike
            met = [self.as_wide(inner[0], -1, outer[0])]
            by = [self.as_wide(outer[0], -2, inner[0])]
        rows = [core(ids).squeeze(-2) if ids.dim() - 2 not in varying(ids) else None for ids in met]
        columns = [core(ids).squeeze(-1) if ids.dim() - 1 not in varying(ids) else None for ids in by]
        if len(rows) == len(columns) == 1 and None not in (rows[0], columns[0]) and rows[0].shape == columns[0].shape:
            self.unite(rows[0], columns[0])
            zero = ((rows[0] > 0) & (not one.raw)) | ((columns[0] > 0) & (not other.raw))
            self.fix(rows[0][~zero], "is read where it is not zero when its filter is")
        else:
            self.fix(inner + outer, "is summed over together with what is fixed")
        for value, others, axis in ((one, inner, -2), (other, outer, -1)):
            for ids in value.ids:
                if all(ids is not each for each in others):
                    result.ids.append(core(ids).expand(result.shape))
                    if value.raw and axis + ids.dim() in varying(ids):
                        self.made.append(core(ids).flatten())
        if len(result.shape) > 2:
            self.along_batch(rows[0] if len(rows) == 1 else None)

    def as_wide(self, ids: Tensor, axis: int, others: Tensor) -> Tensor:
        """The ids of several axes as those along one of them, if the others have but one axis."""
        return self.lines(ids, axis % ids.dim()) if len(varying(others)) == 1 else ids

    def along_batch(self, summed: Tensor | None) -> None:
        """What lies along the batch of a product, as the heads of attention do, leaves both factors and the result.

        `summed`: ids `(B, K)` of what was summed over, where it is channels of several heads.
        """
        result = self.operation.results[0]
        alone = [ids for ids in result.ids if varying(ids) == (0,)]
        grids = [ids for ids in result.ids if varying(ids)[0] == 0 and len(varying(ids)) > 1]
        if summed is not None and varying(summed) == (0, 1):
            result.ids.append(self.heads(summed, 0).unsqueeze(-1).expand(result.shape))
        elif len(alone) == len(grids) == 1:
            result.ids = grids
            self.tie_along(core(grids[0]), core(alone[0]), 0)
        elif len(alone) == 1:
            self.fix(alone, "lies along the batch of a product with what is fixed")
        elif len(alone) == 2:
            self.unite(core(alone[0]), core(alone[1]))
            result.ids = [ids for ids in result.ids if ids is not alone[1]]

    def heads(self, grid: Tensor, axis: int) -> Tensor:
        """New ids along one axis of a grid of channels whose others are summed over: a head leaves with its own."""
        _, places = grid.movedim(axis, 0).flatten(1)[:, 0].abs().unique(return_inverse=True)
        heads = spread(places + self.count, axis, grid.shape)
        self.count += int(places.max()) + 1
        self.tie_along(grid, core(heads), axis)
        return core(heads)

    def tie_along(self, grid: Tensor, ids: Tensor, axis: int) -> None:
        """Where a grid of channels shrinks along this axis, so does what has these ids along it; else that stays."""
        every, others, _ = self.pieces.get(int(grid.flatten()[0].abs()), ([], [], []))
        if not others:
            self.fix([grid, ids], "lies along two axes")
        for choice in (every, *others):
            stays = one_along(choice, grid, axis)
            own = ids if stays else ids.expand(grid.shape)
            choice.append((own.flatten().abs(), torch.zeros_like(own).flatten() if stays else grid.flatten().abs()))

    on_bmm = on_mm

    def on_addmm(self, bias: Value, one: Value, other: Value, beta: float = 1, alpha: float = 1) -> None:
        self.on_mm(one, other)
        self.combine([bias, self.operation.results[0]], lambda: True)

    on_baddbmm = on_addmm

    def on_native_batch_norm(self, x: Value, weight: Value | None, bias: Value | None, *others: Any) -> None:  # noqa: ANN401
        """With gamma and beta a channel's output is zero if both are; without, if its input and its mean are."""
        x = self.in_whole_maps(x)
        channels = self.along(x, 1)
        vectors = [value for value in (weight, bias, *others[:2]) if isinstance(value, Value)]
        for vector in vectors:
            self.unite(channels, self.along(vector, 0))
        self.pass_on(x, {axis for axis in range(len(x.shape)) if axis != 1}, "has statistics with others")
        if len(x.ids) == 1 and varying(x.ids[0]) == (1,) and (channels > 0).all():
            self.operation.results[0].ids = x.ids
            return
        if weight is not None and bias is not None:
            channels = channels.abs()
        del self.operation.results[0].ids[:]
        self.result(spread(channels, 1, x.shape))

    on_cudnn_batch_norm = on_miopen_batch_norm = on_native_batch_norm

    def on_native_layer_norm(self, x: Value, shape: list, weight: Value | None, bias: Value | None, eps: float) -> None:
        """The mean is taken over the channels that are there."""
        first = len(x.shape) - len(shape)
        self.pass_on(x, set(range(first, len(x.shape))), "", keep_zeros=False)
        for axis in range(first, len(x.shape)):
            if any(axis in varying(ids) for value in (x, weight, bias) if value for ids in value.ids):
                channels = self.along(x, axis)
                for vector in (weight, bias):
                    if vector is not None:
                        self.unite(channels, self.along(vector, axis - first))
                channels = -channels.abs() if weight is None else channels.abs()
                self.result(spread(channels, axis, x.shape))

    def on_native_group_norm(
        self, x: Value, weight: Value | None, bias: Value | None, n: int, c: int, size: int, groups: int, eps: float
    ) -> None:
        """As many channels leave each group, and its mean is taken over those that are there."""
        x = self.in_whole_maps(x)
        channels = self.along(x, 1)
        self.pass_on(x, set(range(2, len(x.shape))), "has statistics with others")
        del self.operation.results[0].ids[:]
        for vector in (weight, bias):
            if vector is not None:
                self.unite(channels, self.along(vector, 0))
        if groups < c:
            grid = channels.view(groups, -1)
            self.unite(grid[1:], grid[:1].expand_as(grid[1:]))
        if weight is not None:
            channels = channels.abs()
        elif groups < c:
            channels = -channels.abs()
        self.result(spread(channels, 1, x.shape))

    def on_embedding(self, weight: Value, index: Value, *_: Any) -> None:  # noqa: ANN401
        """The columns of a table are channels, its rows are looked up."""
        self.fix([spread(self.along(weight, 0), 0, weight.shape)], "is looked up by a number")
        self.fix(index.ids, "is a number that looks something up")
        self.operation.results[0].raw = False
        self.result(spread(self.along(weight, 1), -1, self.operation.results[0].shape))

    # Everything else

    def result(self, ids: Tensor) -> None:
        """Give the first result ids, where they vary."""
        if varying(ids):
            self.operation.results[0].ids.append(ids)
        else:
            self.fix(ids, "is a channel alone")

    def pointwise(self, operation: Operation) -> None:
        """An operation element by element: who must be zero for its result to be?"""
        name, values = operation.name, operation.values
        if name == "copy":
            self.combine(values, lambda: True, says=values[1:])
        elif name == "where":  # the condition has no say
            self.combine(
                values, lambda: not any(isinstance(each, float | int) and each for each in operation.args), values[1:]
            )
        elif name == "masked_fill":
            self.combine(values, lambda: operation.args[2] == 0, says=values[:1])
        elif name in PRODUCTS and len(values) > 1:
            self.combine(values, None, values if name == "mul" else values[:1], values[1:] if name == "div" else [])
        else:
            self.combine(values, self.zero_of_zeros)

    def combine(
        self,
        values: list[Value],
        is_zero: Callable[[], bool] | None,
        says: list[Value] | None = None,
        divisors: list[Value] | tuple = (),
    ) -> None:
        """What meets element by element becomes one.

        The result is zero where all the values of `says` are and `is_zero()`; without `is_zero` where one of them is
        and none of the divisors.
        """
        result, says = self.operation.results[0], values if says is None else says
        if len(values) == 1 and is_zero is not None and is_zero() and values[0].shape == result.shape:
            result.ids, result.raw = values[0].ids, values[0].raw
            return
        raw, found = all(value.raw for value in values), []
        by_axes: dict[tuple, list[tuple[Value, Tensor]]] = {}
        for value in values:
            for ids in value.ids:
                ids = ids if ids.shape == result.shape else ids.expand(result.shape)
                by_axes.setdefault(varying(ids), []).append((value, ids))
        for value in values:
            self.tie_to_grids(value, by_axes)
        for axes, held in by_axes.items():
            first = core(held[0][1])
            holders = [value for value, _ in held]
            for value in values:
                sizes = (1,) * (len(result.shape) - len(value.shape)) + tuple(value.shape)
                if all(value is not holder for holder in holders) and any(sizes[axis] > 1 for axis in axes):
                    self.fix(first, "meets what is fixed")
                    axes = ()
            if not axes:
                continue
            for _, ids in held[1:]:
                if ids is not held[0][1]:
                    self.unite(first, core(ids))
            zero = {id(value): (core(ids) > 0) & (raw or is_zero is not None or not value.raw) for value, ids in held}
            heard = [zero[id(value)] for value in says if id(value) in zero]
            if is_zero is None:
                positive = torch.stack(heard).any(0) if heard else None
                for value in divisors:
                    if id(value) in zero and positive is not None:
                        positive = positive & ~zero[id(value)]
            else:
                positive = torch.stack(heard).all(0) if len(heard) == len(says) and is_zero() else None
            found.append(self.signed(held[0][1], positive))
        result.ids, result.raw = found, raw

    def tie_to_grids(self, value: Value, by_axes: dict[tuple, list[tuple[Value, Tensor]]]) -> None:
        """Tie channels of a value along single axes to the grids along several that they meet, which stand for both.

        So a norm of each head meets what it is the norm of, and a factor for each place in a head meets all heads.
        """
        sizes = (1,) * (len(self.operation.results[0].shape) - len(value.shape)) + tuple(value.shape)
        own = {axes: ids for axes, held in by_axes.items() for holder, ids in held if holder is value}
        for axes, held in list(by_axes.items()):
            met = [(axis,) for axis in axes if sizes[axis] > 1]
            if len(axes) > 1 and axes not in own and met and own.keys() >= set(met):
                grid = held[0][1]
                for single in met:
                    self.tie_along(core(grid), core(own[single]), *single)
                    by_axes[single] = [each for each in by_axes.get(single, []) if each[0] is not value]
                held.append((value, self.signed(grid, None)))
        for axes in [axes for axes, held in by_axes.items() if not held]:
            del by_axes[axes]

    def signed(self, ids: Tensor, positive: Tensor | None) -> Tensor:
        """The same ids, positive where they are said to be, `positive` being of the shape of their core."""
        inner = core(ids)
        if positive is None:
            return (-inner.abs()).expand(ids.shape)
        return torch.where(positive, inner.abs(), -inner.abs()).expand(ids.shape)

    def zero_of_zeros(self) -> bool:
        """Whether the operation makes zero of zeros, tried out on the operation itself."""
        operation = self.operation
        key = (
            operation.function,
            str([leaf for leaf in (*operation.args, operation.kwargs) if not isinstance(leaf, Value)]),
        )
        if key not in self.zeros:
            args, kwargs = instead(operation.args, operation.kwargs, Value, lambda _: torch.zeros(()))
            try:
                self.zeros[key] = not operation.function(*args, **kwargs).any()
            except Exception:  # it works on other kinds of numbers
                self.zeros[key] = False
        return self.zeros[key]

    def spatial(self, operation: Operation, axes: int) -> None:
        """Pooling, upsampling, padding: channels pass, if they do not lie along the last axes."""
        x = operation.args[0]
        for value in operation.values[1:]:
            self.fix(value.ids, "says where something is read")
        if len(x.shape) - axes == 2:
            x = self.in_whole_maps(x)
        self.pass_on(x, set(range(len(x.shape) - axes, len(x.shape))), "lies along an axis that is pooled")
        for places in operation.results[1:]:  # of the maxima, which are not 0 where those are
            places.ids = [self.signed(ids, None) for ids in places.ids]

    def on_max_unpool2d(self, x: Value, places: Value, *_: Any) -> None:  # noqa: ANN401
        """Each maximum returns to its position, and zeros are elsewhere; `places` has the channels of `x`."""
        axis = len(x.shape) - 3
        self.unite(self.along(x, axis), self.along(places, axis))
        self.pass_on(x, {axis + 1, axis + 2}, "lies along an axis that is pooled")

    def on_constant_pad_nd(self, x: Value, pad: list[int], value: float = 0) -> None:
        """What is added along an axis of channels belongs to none, and stays."""
        if len(pad) <= 2 * (len(x.shape) - 2):
            x = self.in_whole_maps(x)
        for ids in x.ids:
            padded = {len(x.shape) - 1 - index // 2 for index, size in enumerate(pad) if size}
            if padded & set(varying(ids)):
                self.add(torch.constant_pad_nd(ids, pad, FIXED))
            else:
                self.add(
                    self.signed(core(ids), core(ids) > 0 if value == 0 else None).expand(
                        self.operation.results[0].shape
                    )
                )

    def add(self, ids: Tensor) -> None:
        """Give the first result ids that are not expanded yet."""
        self.result(settled(ids))

    def reduction(self, operation: Operation) -> None:
        """Sums, means, maxima and the like: along other axes channels pass; of their own only zeros can be left out."""
        x, name = operation.args[0], operation.name
        is_sum = name in SUMS and not (operation.bound("ord") or 1) <= 0
        dims = operation.bound("dim")
        axes = range(len(x.shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        axes = {axis % len(x.shape) for axis in axes} if len(x.shape) else set()
        for ids in x.ids:
            inner = core(ids)
            if not axes & set(varying(ids)):
                inner = inner if name in ZERO_OF_ZEROS else -inner.abs()
                for result in operation.results:
                    shrunk = inner
                    if inner.dim() != len(result.shape):
                        shrunk = inner.squeeze(tuple(axes))
                    result.ids.append(shrunk.expand(result.shape))
            elif not set(varying(ids)) <= axes:  # of a grid of channels whole rows are left, or none
                rest = set(varying(ids)) - axes
                if is_sum and len(rest) == 1 and (inner > 0).all() and not x.raw:
                    inner = self.heads(inner, *rest)
                for axis in axes & set(varying(inner)):
                    self.tie([[alike(inner, axis)]])
                    zero = (inner > 0).all(axis, keepdim=True) & (not x.raw and name in ZERO_OF_ZEROS)
                    inner = torch.where(zero, 1, -1) * inner.narrow(axis, 0, 1).abs()
                for result in operation.results:
                    shrunk = inner if inner.dim() == len(result.shape) else inner.squeeze(tuple(axes))
                    result.ids.append(shrunk.expand(result.shape))
            elif is_sum:
                self.read(ids, x)
            else:
                self.fix(ids, "is averaged or compared with other channels")

    def movement(self, operation: Operation) -> None:
        """Move the ids as the operation moves the numbers; equal pieces of an axis lose as many channels each."""
        (x, *args), results = operation.args, operation.results
        for value in operation.values[1:]:
            self.fix(value.ids, "says where something is read")
        for number, ids in enumerate(x.ids):
            if operation.name == "pixel_shuffle":  # all that lands in one channel is one
                ids = first_of_each(ids, args[0] ** 2)
            moved = moved_by(operation, ids, args)
            moved = [moved] if isinstance(moved, Tensor) else list(moved)
            for result, piece in zip(results, moved, strict=True):
                result.raw = x.raw
                if varying(piece):
                    result.ids.append(piece)
                else:
                    self.fix(piece, "is taken out alone")
            self.tie_pieces(operation, x.ids[number], moved)
        if operation.name == "expand":  # one number for all of an axis, however long it is
            shape = results[0].shape
            before = (1,) * (len(shape) - len(x.shape)) + tuple(x.shape)
            grown = [size if old == 1 else 1 for old, size in zip(before, shape, strict=True)]
            results[0].ids.extend(
                self.signed(ids, None).expand(results[0].shape) for ids in self.new_ids(torch.Size(grown))
            )

    def tie_pieces(self, operation: Operation, ids: Tensor, moved: list[Tensor]) -> None:
        """Tie the channels at the same place of equal pieces of an axis, so that as many leave each."""
        name, before, after = operation.name, varying(ids), varying(moved[0])
        if name in {"view", "_unsafe_view", "reshape"} and len(after) > len(before):
            grid = core(moved[0])
            by_free = {free: [alike(grid, axis) for axis in after if axis != free] for free in reversed(after)}
            every, *others = by_free.values()
            choices = [by_free[free] for free in sorted(by_free, key=lambda free: operation.args[1][free] != -1)]
            self.tie(choices)
            self.pieces.update(dict.fromkeys(grid.flatten().abs().tolist(), (every, others, choices)))
        elif len(moved) > 1 and after == before:
            same = [piece for piece in moved if piece.shape == moved[0].shape]
            self.tie([[alike(torch.stack([core(piece) for piece in same]), 0)]])
        elif name == "slice" and operation.args[1] % ids.dim() in before and after == before:
            axis, (size, part) = operation.args[1], (each.shape[operation.args[1]] for each in (ids, moved[0]))
            if part < size and size % part == 0:
                self.tie([[], [alike(core(ids).unflatten(axis, (-1, part)), axis % ids.dim())]])
        elif (
            name in {"channel_shuffle", "pixel_shuffle"} and (axis := ids.dim() - 3 if name[0] == "p" else 1) in before
        ):
            pieces = (operation.args[1], -1) if name[0] == "c" else (-1, operation.args[1] ** 2)
            self.tie([[alike(core(ids).unflatten(axis, pieces), axis + (name[0] == "p"))]])

    def tie(self, choices: list[list[tuple[Tensor, Tensor]]]) -> None:
        """Unite by the first of these choices; by the next, where that turns out not to do."""
        self.ties.setdefault(len(self.operations), []).append(choices)

    def choices_of(self, ids: Tensor) -> list[list]:
        """The choices of the views that made several axes of one with any of these ids, where there is another."""
        found = [self.pieces[each][2] for each in ids.abs().unique().tolist() if each in self.pieces]
        return [choices for choices in {id(each): each for each in found}.values() if len(choices) > 1]

    def on_cat(self, pieces: list[Value], dim: int = 0) -> None:
        """Ids along the axis are laid end to end; those along another one meet."""
        result = self.operation.results[0]
        result.raw = all(piece.raw for piece in pieces)
        dim %= len(result.shape)
        pieces = [piece for piece in pieces if len(piece.shape) == len(result.shape)]
        joined = []
        across: dict[tuple, list[Tensor]] = {}
        for piece in pieces:
            own = [ids for ids in piece.ids if dim in varying(ids)]
            self.fix(own[1:], "is one of two axes in a concatenation")
            joined.append(own[0] if own else torch.zeros((), dtype=torch.int64).expand(piece.shape))
            for ids in piece.ids:
                if dim not in varying(ids):
                    ids = self.as_in_others(ids, pieces)
                    across.setdefault(varying(ids), []).append(core(ids))
        if any(varying(ids) for ids in joined):
            self.add(concatenated(joined, dim))
        for ids in across.values():
            if len(ids) < len(pieces):
                self.fix(ids, "meets what is fixed")
                continue
            for other in ids[1:]:
                self.unite(ids[0], other)
            positive = torch.stack([each > 0 for each in ids]).all(0)
            result.ids.append(self.signed(ids[0], positive).expand(result.shape))

    def as_in_others(self, ids: Tensor, pieces: list[Value]) -> Tensor:
        """The ids of several axes as those of the one along which all other pieces have channels, if they do."""
        along = [{varying(each) for each in piece.ids} for piece in pieces]
        for axis in varying(ids) if len(varying(ids)) > 1 else ():
            others = [axes for axes in along if varying(ids) not in axes]
            if others and all((axis,) in axes for axes in others):
                return self.lines(ids, axis)
        return ids

    def on_stack(self, pieces: list[Value], dim: int = 0) -> None:
        dim %= len(self.operation.results[0].shape)
        self.on_cat(
            [
                Value(
                    torch.Size((*piece.shape[:dim], 1, *piece.shape[dim:])),
                    [ids.unsqueeze(dim) for ids in piece.ids],
                    raw=piece.raw,
                )
                for piece in pieces
            ],
            dim,
        )

    def on_glu(self, x: Value, dim: int = -1) -> None:
        """The first half times the sigmoid of the second."""
        dim %= len(x.shape)
        for ids in x.ids:
            first, second = ids.chunk(2, dim)
            if dim in varying(ids):
                self.unite(core(first), core(second))
            self.add(first)

    def on_index(self, x: Value, indices: list[Value | None]) -> None:
        """Along an axis where channels lie the index must be known; along others it may be any."""
        for index in indices:
            self.fix(index.ids if index else [], "is a number that looks something up")
        result = self.operation.results[0]
        result.raw = x.raw
        for ids in x.ids:
            if all(
                index is None or index.known is not None or axis not in varying(ids)
                for axis, index in enumerate(indices)
            ):
                self.add(indexed(ids, indices))
            else:
                self.fix(ids, "is looked up by numbers that are not known beforehand")

    def on_index_select(self, x: Value, dim: int, index: Value) -> None:
        self.on_index(x, [None] * (dim % len(x.shape)) + [index])

    def on_gather(self, x: Value, dim: int, index: Value, *_: Any) -> None:  # noqa: ANN401
        self.fix(index.ids, "is a number that looks something up")
        for ids in x.ids:
            if dim % len(x.shape) in varying(ids) or any(x.shape[axis] != index.shape[axis] for axis in varying(ids)):
                self.fix(ids, "is looked up by numbers that are not known beforehand")
            else:
                self.result(core(ids).expand(index.shape))


def varying(ids: Tensor) -> tuple[int, ...]:
    """The axes along which expanded ids vary."""
    return tuple(
        axis for axis, (size, step) in enumerate(zip(ids.shape, ids.stride(), strict=True)) if size > 1 and step
    )


def core(ids: Tensor) -> Tensor:
    """The ids without their repetitions: every axis along which they do not vary has length 1."""
    for axis, (size, step) in enumerate(zip(ids.shape, ids.stride(), strict=True)):
        if size > 1 and not step:
            ids = ids.narrow(axis, 0, 1)
    return ids


def alike(ids: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """All ids along an axis beside the first."""
    return ids.flatten().abs(), ids.narrow(axis, 0, 1).expand_as(ids).flatten().abs()


def one_along(choice: list[tuple[Tensor, Tensor]], grid: Tensor, axis: int) -> bool:
    """Whether channels of a grid that differ along an axis are one by a choice."""
    different = grid.movedim(axis, 0).flatten(1)[:, 0].abs().unique()[:2]
    for ids, others in choice:
        found = [others[ids == each].unique() for each in different]
        if len(found) == 2 and len(found[0]) and torch.equal(*found):
            return True
    return False


def first_of_each(ids: Tensor, count: int) -> Tensor:
    """The ids of `(..., C * count, H, W)`, those of the first of every `count` for all of them."""
    if ids.dim() - 3 not in varying(ids):
        return ids
    grid = core(ids).unflatten(-3, (-1, count))
    return grid.narrow(-3, 0, 1).expand_as(grid).flatten(-4, -3).expand(ids.shape)


def spread(ids: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """Ids `(C,)` along `axis` of a tensor of this shape."""
    return ids.view([-1 if index == axis % len(shape) else 1 for index in range(len(shape))]).expand(shape)


def settled(ids: Tensor) -> Tensor:
    """The same ids, expanded along every axis along which they do not vary."""
    inner = core(ids)
    for axis in varying(inner):
        first = inner.narrow(axis, 0, 1)
        if torch.equal(inner, first.expand_as(inner)):
            inner = first
    return inner.clone().expand(ids.shape)


def concatenated(pieces: list[Tensor], dim: int) -> Tensor:
    """torch.cat of expanded tensors, made where they vary."""
    together = {axis for piece in pieces for axis in varying(piece)} | {dim}
    shape = list(pieces[0].shape)
    shape[dim] = -1
    inner = [
        piece[tuple(slice(None) if axis in together else slice(1) for axis in range(piece.dim()))] for piece in pieces
    ]
    joined = torch.cat(inner, dim)
    return joined.expand([size if axis != dim else joined.shape[dim] for axis, size in enumerate(shape)])


def indexed(ids: Tensor, indices: list[Value | None]) -> Tensor:
    """Expanded ids at these places; where the place is not known, it does not matter."""
    places = tuple(
        slice(None)
        if index is None
        else torch.zeros(index.shape, dtype=torch.int64)
        if index.known is None
        else index.known.cpu()
        for index in indices
    )
    return ids[places]


def moved_by(operation: Operation, ids: Tensor, args: list) -> Any:  # noqa: ANN401
    """What a data movement makes of expanded ids, expanded again."""
    name = operation.name
    if name in {"_to_copy", "clone", "contiguous", "alias", "detach", "lift_fresh", "lift_fresh_copy"}:
        return ids
    if name in {"view", "_unsafe_view", "reshape"}:
        return reshaped(ids, operation.results[0].shape)
    if name in {"roll", "flip"}:
        dims = args[1] if name == "roll" and len(args) > 1 else args[0]
        if not {dim % ids.dim() for dim in dims} & set(varying(ids)):
            return ids
    moved = operation.function(ids, *args, **operation.kwargs)
    return (
        moved
        if isinstance(moved, list | tuple)
        or name not in {"roll", "flip", "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"}
        else settled(moved)
    )


def reshaped(ids: Tensor, shape: torch.Size) -> Tensor:
    """Expanded ids in another shape; axes that stay as they are at either end are not copied."""
    small, target = list(ids.shape), list(shape)
    kept = set(varying(ids))
    for step in (1, -1):
        axes = range(min(len(small), len(target))) if step == 1 else range(-1, -1 - min(len(small), len(target)), -1)
        for axis in axes:
            if ids.shape[axis] != shape[axis]:
                break
            if axis % ids.dim() not in kept:
                small[axis] = target[axis] = 1
    inner = ids[tuple(slice(size) for size in small)].reshape(target).expand(shape)
    same = inner.untyped_storage().data_ptr() == ids.untyped_storage().data_ptr()
    return inner if same and len(varying(inner)) <= len(kept) else settled(inner)


def leaves(tree: Any, kind: type) -> Iterator[Any]:  # noqa: ANN401
    """All leaves of that kind in nested tuples, lists, dicts and objects that hold any."""
    if isinstance(tree, tuple | list):
        branches = tree
    elif isinstance(tree, dict):
        branches = tree.values()
    elif is_dataclass(tree):
        branches = (getattr(tree, each.name) for each in fields(tree))
    elif isinstance(tree, SimpleNamespace):
        branches = vars(tree).values()
    else:
        branches = ()
        if isinstance(tree, kind):
            yield tree
    for branch in branches:
        yield from leaves(branch, kind)


def returned(output: Any) -> Iterator[Any]:  # noqa: ANN401
    """All that an output holds, also as attributes of objects."""
    for leaf in leaves(output, object):
        attributes = {} if isinstance(leaf, Tensor | nn.Module | type) else getattr(leaf, "__dict__", {})
        yield from leaves(attributes, object) if attributes else [leaf]


def lies_so(tensor: Tensor, shape: list[int], strides: list[int]) -> bool:
    """Whether a tensor has this shape, and these strides along the axes that have any places to step to."""
    steps = zip(shape, strides, tensor.stride(), strict=True)
    return list(tensor.shape) == list(shape) and all(new == old for size, new, old in steps if size > 1)


def order_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The axes of a tensor as they lie in memory, the outermost first; None if they lie as they stand."""
    if tensor.is_contiguous():
        return None
    return tuple(sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis)))


def among(args: tuple, kwargs: dict, kind: type) -> list[Any]:
    """Those arguments of an operation, or members of its lists, that are of that kind."""
    found = []
    for each in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(each, kind):
            found.append(each)
        elif isinstance(each, list | tuple):
            found.extend(one for one in each if isinstance(one, kind))
    return found


def instead(args: tuple, kwargs: dict, kind: type, by: Callable) -> tuple[tuple, dict]:
    """The arguments of an operation with each of that kind replaced."""

    def one(each: Any) -> Any:  # noqa: ANN401
        if isinstance(each, kind):
            return by(each)
        return (
            [by(member) if isinstance(member, kind) else member for member in each] if isinstance(each, list) else each
        )

    return tuple([one(each) for each in args]), {key: one(each) for key, each in kwargs.items()}


def without_numbers(example: Any) -> Any:  # noqa: ANN401
    """Nested tuples, lists and dicts with each tensor on the meta device."""
    return tree_map(lambda leaf: torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf, example)


@dataclass
class Shadow:
    """A copy of a network on the meta device, its modules by path, and the first ids of its tensors' axes, by path and
    name."""

    model: nn.Module
    modules: dict[str, nn.Module]
    births: dict[tuple[str, str], list[int]]
    count: int
    values: list[tuple[Tensor, Value]]


def shadow(model: nn.Module) -> Shadow:
    """A copy of the network without numbers, whose parameters and buffers carry ids of their own."""
    model = deep_copy(model, {id(tensor): on_meta(tensor) for _, _, tensor in tensors_of(model)})
    births, count, known, values = {}, 1, {}, []
    for path, name, tensor in tensors_of(model):
        if tensor.is_meta and id(tensor) not in known:
            starts = [count + sum(tensor.shape[:axis]) for axis in range(tensor.dim())]
            known[id(tensor)] = starts
            ids = [
                spread(torch.arange(start, start + size), axis, tensor.shape)
                for axis, (start, size) in enumerate(zip(starts, tensor.shape, strict=True))
                if size > 1
            ]
            tensor._value = Value(tensor.shape, ids, source=f"{path}.{name}", raw=True)
            values.append((tensor, tensor._value))
            count += sum(tensor.shape)
        if tensor.is_meta:
            births[path, name] = known[id(tensor)]
    return Shadow(model, dict(model.named_modules()), births, count, values)


def hold_sizes(model: nn.Module) -> None:
    """Make each whole number that a module has as an attribute remember where, see `Held`."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) is int:
                vars(module)[name] = held(value, path, name)
            elif type(value) in {tuple, list} and all(type(each) is int for each in value):
                vars(module)[name] = type(value)(held(each, path, name, place) for place, each in enumerate(value))


def held(value: int, path: str, name: str, place: int | None = None) -> Held:
    """The same number, which remembers where a module holds it."""
    number = Held(value)
    number.at = path, name, place
    return number


def deep_copy(model: nn.Module, tensors: dict[int, Tensor]) -> nn.Module:
    """A deep copy of the model that has these tensors instead of those of that id.

    Tensors that were computed and kept are copied without their history, with which deepcopy refuses them. PyTorch's
    own layers, which consist of empty dicts for the most part, are copied here, several times as fast.
    """
    computed = (each for each in leaves(attributes_of(model), Tensor) if each.grad_fn)
    memo: dict[int, Any] = {id(each): each.detach().clone() for each in computed} | tensors
    for module in model.modules():
        if is_simple(module):
            memo[id(module)] = same = module.__new__(type(module))
            for name, value in vars(module).items():
                vars(same)[name] = value.copy() if isinstance(value, dict | list | set) else value
            for own in (same._parameters, same._buffers):
                own.update((name, copy.deepcopy(tensor, memo)) for name, tensor in own.items())
    return copy.deepcopy(model, memo)


def is_simple(module: nn.Module) -> bool:
    """Whether a layer is PyTorch's own and holds nothing but its tensors, numbers, and lists of numbers."""
    return type(module).__module__.startswith("torch.nn.modules.") and all(
        name in {"_parameters", "_buffers"}
        or isinstance(value, SIMPLE)
        or (isinstance(value, dict) and not value)
        or (isinstance(value, list | tuple | set) and all(isinstance(each, SIMPLE) for each in value))
        for name, value in vars(module).items()
    )


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same form without numbers; whole numbers stay, as they may be places."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return tensor.detach().clone()
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def tensors_of(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Each parameter and buffer, with the path of its module and its name there."""
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield path, name, tensor


def value_of(tensor: Tensor) -> Value:
    """What is known of a tensor; nothing of one that was made unseen."""
    return tensor._value if hasattr(tensor, "_value") else Value(tensor.shape)


def positions(indices: list) -> list:
    """Masks among the indices of `x[i, j, ...]` as numbers, where they are known."""
    found: list = []
    for index in indices:
        is_mask = index is not None and not index.is_meta and index.dtype in {torch.bool, torch.uint8}
        found.extend(index.nonzero(as_tuple=True) if is_mask else [index])
    return found


def weight_of(operation: Operation, trace: Trace) -> Value | None:
    """The weight of a convolution, or of a linear layer, which is turned before it is multiplied with."""
    if operation.name not in {"convolution", "mm", "addmm"}:
        return None
    weight = operation.args[1] if operation.name == "convolution" else operation.args[-1]
    is_turned = isinstance(weight.source, tuple) and trace.operations[weight.source[0]].name == "t"
    return trace.operations[weight.source[0]].args[0] if is_turned else weight
