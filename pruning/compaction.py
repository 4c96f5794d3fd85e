"""From many scattered zeros to fewer channels: what unstructured pruning has made useless is taken out for good."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pruning.magnitude import PRUNABLE
from pruning.surgery import Channels, eval_mode, find_channels, is_masked, remove_channels
from pruning.tracing import FIXED, call, deep_copy, leaves, left_as_it_was
from pruning.unknowns import Unknowns, mark, unknowns

PLAIN = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


def compact(model: nn.Module, example: Any) -> nn.Module:  # noqa: ANN401
    """A narrower copy of `model` that computes the same outputs in eval mode, up to the rounding of sums.

    That holds for any batch and any image size at which the network's code takes the same way. A channel is removed if
    nothing depends on it, all the weights that read it being zero. So is one that is a constant, as those whose own
    weights are all zero are, if the constant can be folded into the biases of the layers that read it. That in turn
    leaves other channels unread or constant; it ends when nothing is left to remove. Zeros are not seen in
    weights that are computed: make masks of torch.nn.utils.prune permanent before. `example` is any input, as for
    `remove_filters`; what it holds beside tensors counts as constant. Raises ValueError where it cannot be run.
    """
    model = deep_copy(model, {})
    while True:
        channels = find_channels(model, example)
        fold_constants(model, example)
        model, removed = remove_channels(model, channels, unread(model, example, channels))
        if not removed.any():
            return model


@torch.no_grad()
def fold_constants(model: nn.Module, example: Any) -> None:  # noqa: ANN401
    """Move what constant channels contribute into the biases of the layers that read them, in place.

    That is exact for linear layers and for convolutions without padding. Convolutions with padding see zeros around
    the constant, and layers without a bias of their own have no place for it: there, only a constant of 0 is folded.
    """
    try:
        constants, uses = constant_inputs(model, example)
    except ValueError:  # its code depends on numbers: nothing is known to be constant
        return
    constants = {path: values for path, values in constants.items() if not values.isnan().all()}
    for size in other_sizes(example) if constants else ():
        try:
            others, _ = constant_inputs(model, size)
        except Exception:  # the network does not accept this size, whatever it raises
            continue
        for path, values in constants.items():
            same = torch.isclose(values, others.get(path, torch.full_like(values, torch.nan)))
            constants[path] = values.where(same, torch.nan)
    for path, values in constants.items():
        fold(model.get_submodule(path), values, uses)


def fold(layer: nn.Module, values: Tensor, uses: dict[int, int]) -> None:
    """Fold the inputs of a layer that are the constants `values (C_in,)`, NaN where they are none, in place."""
    foldable, bias = ~values.isnan(), layer._parameters.get("bias")  # a parametrized one cannot be written to
    if bias is None or uses[id(bias)] > 1 or not sees_constants_everywhere(layer):
        foldable &= values == 0
    else:
        per_input = layer.weight.flatten(2).sum(2) if layer.weight.dim() > 2 else layer.weight  # (C_out, C_in)
        bias += per_input[:, foldable] @ values[foldable].to(per_input)
    layer.weight.index_fill_(reading_axis(layer), foldable.nonzero().squeeze(1), 0)


def sees_constants_everywhere(layer: nn.Module) -> bool:
    """Whether a constant input makes a constant output: not where padding or striding puts zeros between."""
    if isinstance(layer, nn.Linear):
        return True
    return not layer.transposed and (layer.padding == "valid" or set(layer.padding) == {0})


def constant_inputs(model: nn.Module, example: Any) -> tuple[dict[str, Tensor], dict[int, int]]:  # noqa: ANN401
    """The constants `(C_in,)` that each plain layer reads, NaN where an input is none, and how often tensors are used.

    Left out are layers whose weight something else uses, too. Raises ValueError where the network's code depends on
    the numbers it computes with.
    """
    layers = {path: layer for path, layer in model.named_modules() if is_plain(layer)}
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, path=path: inputs.update({path: (args or tuple(kwargs.values()))[0].clone()}),
            with_kwargs=True,
        )
        for path, layer in layers.items()
    ]
    try:
        mode = Unknowns(constants=True)
        run(model, unknown_input(example), mode)
    finally:
        for hook in hooks:
            hook.remove()
    constants = {}
    for path, given in inputs.items():
        if mode.uses[id(layers[path].weight)] == 1:
            axis = -1 if isinstance(layers[path], nn.Linear) else -layers[path].weight.dim() + 1
            values = given.movedim(axis, 0).flatten(1)  # (C_in, everything else)
            constants[path] = values[:, 0].where((values == values[:, :1]).all(1), torch.nan)
    return constants, mode.uses


def is_plain(layer: nn.Module) -> bool:
    """Whether it reads each channel with a weight of its own, by PyTorch's own code."""
    return (
        any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in PLAIN)
        and isinstance(layer._parameters.get("weight"), nn.Parameter)
        and getattr(layer, "groups", 1) == 1
    )


def reading_axis(layer: nn.Module) -> int:
    """The axis of the weight along which the inputs stand."""
    return 0 if getattr(layer, "transposed", False) else 1


def unknown_input(example: Any) -> Any:  # noqa: ANN401
    """Of the example's form and size, but unknown."""

    def hidden(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.full_like(tensor, torch.nan)
        tensor = tensor.clone()
        mark(tensor)
        return tensor

    return tree_map(lambda leaf: hidden(leaf) if isinstance(leaf, Tensor) else leaf, example)


def other_sizes(example: Any) -> Iterator[Any]:  # noqa: ANN401
    """The example with each of its axes, and all neighbouring ones together, twice as long: square images stay so."""
    count = max((tensor.dim() for tensor in leaves(example, Tensor)), default=0)
    for first in range(count):
        for last in range(first + 1, count + 1):
            yield tree_map(lambda leaf: twice(leaf, range(first, last)), example)  # noqa: B023


def twice(leaf: Any, axes: range) -> Any:  # noqa: ANN401
    """A tensor twice as long along these axes, as far as it has them; anything else as it is."""
    for axis in axes if isinstance(leaf, Tensor) else ():
        leaf = torch.cat([leaf, leaf], axis) if axis < leaf.dim() else leaf
    return leaf


def run(model: nn.Module, example: Any, mode: Unknowns) -> Any:  # noqa: ANN401
    """The output in eval mode; the model is afterwards as it was."""
    with eval_mode(model), left_as_it_was(model), torch.no_grad(), mode:
        return call(model, example)


def unread(model: nn.Module, example: Any, channels: Channels) -> Tensor:  # noqa: ANN401
    """Ids that the outputs do not depend on: boolean `(count + 1,)`.

    Candidates are those that convolutions and linear layers read with weights of 0 alone. Whether anything else reads
    them is tried out, if so for each layer's candidates by themselves.
    """
    candidates = torch.ones(channels.count + 1, dtype=torch.bool)
    candidates[FIXED] = False
    for path, layer in model.named_modules():
        is_depthwise = getattr(layer, "groups", 1) > 1 and layer.groups == layer.in_channels
        if isinstance(layer, PRUNABLE) and (path, "weight", reading_axis(layer)) in channels.slots and not is_depthwise:
            ids = channels.slots[path, "weight", reading_axis(layer)]
            candidates[ids[layer.weight.movedim(reading_axis(layer), 0).flatten(1).any(1).cpu()]] = False
    if not candidates.any() or not reaches_output(model, example, channels, candidates):
        return candidates
    found = torch.zeros_like(candidates)
    for ids in channels.filters.values():
        part = torch.zeros_like(candidates)
        part[ids] = candidates[ids]
        if part.any() and not reaches_output(model, example, channels, part):
            found |= part
    return found & torch.tensor(not reaches_output(model, example, channels, found))


def reaches_output(model: nn.Module, example: Any, channels: Channels, ids: Tensor) -> bool:  # noqa: ANN401
    """Whether any output is unknown if the filters of these ids are."""
    model = deep_copy(model, {})
    modules = dict(model.named_modules())
    for name, made in channels.filters.items():
        path, _, own = (name, "", "weight") if name in modules else name.rpartition(".")
        weight = getattr(modules[path], f"{own}_orig" if is_masked(modules[path], own) else own)
        axis = channels.axes[name]
        poisoned = ids[made].view(-1, weight.shape[axis]).any(0)  # a transposed convolution's groups share the axis
        weight.data.index_fill_(axis, poisoned.nonzero().squeeze(1).to(weight.device), torch.nan)
    try:
        output = run(model, example, Unknowns(constants=False))
    except ValueError:
        return True
    return any(bool(unknowns(tensor).any()) for tensor in leaves(output, Tensor))
