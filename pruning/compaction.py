"""From many scattered zeros to fewer channels: what unstructured pruning has made useless is taken out for good."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pruning.magnitude import PRUNABLE
from pruning.surgery import Channels, eval_mode, find_channels, is_masked, remove_channels
from pruning.tracing import FIXED, call, deep_copy, leaves, left_as_it_was, returned
from pruning.unknowns import Reading, Unknowns, has_unknowns, mark


def compact(model: nn.Module, example: Any) -> nn.Module:  # noqa: ANN401
    """A narrower copy of `model` that computes the same outputs in eval mode, up to the rounding of sums.

    That holds for any batch and any image size at which the network's code takes the same way. A channel is removed if
    nothing depends on it, all the weights that read it being zero. So is one that is a constant, as those whose own
    weights are all zero are, if the constant can be folded into the biases of the layers that read it. That in turn
    leaves other channels unread or constant; it ends when nothing is left to remove. Nothing counts as constant
    in a network that keeps what it computed from one call to the next. Zeros are not seen in weights that are
    computed: make masks of torch.nn.utils.prune permanent before. `example` is any input, as for
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
        readings, uses = readings_of(model, example)
    except ValueError:  # its code depends on numbers, or on earlier calls: nothing is known to be constant
        return
    readings = {id(each.weight): each for each in readings if not each.values.isnan().all()}
    for size in other_sizes(example) if readings else ():
        try:
            others = {id(each.weight): each.values for each in readings_of(model, size)[0]}
        except Exception:  # the network does not accept this size, whatever it raises
            continue
        for weight, reading in readings.items():
            other = others.get(weight, torch.full_like(reading.values, torch.nan))
            reading.values = reading.values.where(torch.isclose(reading.values, other), torch.nan)
    own = set(map(id, model.parameters()))
    for reading in readings.values():
        if id(reading.weight) in own and uses[id(reading.weight)] == 1:
            has_place = id(reading.bias) in own and uses[id(reading.bias)] == 1 and reading.bias.dim() == 1
            fold(reading, has_place)


def fold(reading: Reading, has_place: bool) -> None:
    """Fold the inputs that are constants into the bias, which has a place for others than 0 or not, in place."""
    weight, values, foldable = reading.weight, reading.values, ~reading.values.isnan()
    if has_place and reading.everywhere:
        per_input = weight.movedim(reading.axis, 1)  # (C_out, C_in, ...)
        per_input = per_input.flatten(2).sum(2) if weight.dim() > 2 else per_input
        reading.bias += per_input[:, foldable] @ values[foldable].to(per_input)
    else:
        foldable &= values == 0
    weight.index_fill_(reading.axis, foldable.nonzero().squeeze(1), 0)


def readings_of(model: nn.Module, example: Any) -> tuple[list[Reading], dict[int, int]]:  # noqa: ANN401
    """How parameters are read, with the constants among what they read, and how often each tensor is used.

    Raises ValueError where the network's code depends on the numbers it computes with, or on those of earlier calls.
    """
    mode = Unknowns(constants=True)
    _, changes = run(model, unknown_input(example), mode)
    if any(old is not None or any(map(has_unknowns, leaves(new, Tensor))) for old, new in changes):
        raise ValueError("the network keeps something from one call to the next")
    return mode.readings, mode.uses


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


def run(model: nn.Module, example: Any, mode: Unknowns) -> tuple[Any, list[tuple[Any, Any]]]:  # noqa: ANN401
    """The output in eval mode, and what modules hold then that they did not before, each after what it takes the place
    of. The model is afterwards as it was.
    """
    with eval_mode(model), left_as_it_was(model) as changes, torch.no_grad():
        with mode:
            output = call(model, example)
        return output, changes()


def unread(model: nn.Module, example: Any, channels: Channels) -> Tensor:  # noqa: ANN401
    """Ids that the outputs do not depend on: boolean `(count + 1,)`.

    Candidates are those that convolutions and linear layers read with weights of 0 alone. Whether anything else reads
    them is tried out, if so for each layer's candidates by themselves.
    """
    candidates = torch.ones(channels.count + 1, dtype=torch.bool)
    candidates[FIXED] = False
    for path, layer in model.named_modules():
        if not isinstance(layer, PRUNABLE) or (path, "weight", reading_axis(layer)) not in channels.slots:
            continue
        if getattr(layer, "groups", 1) == 1 or layer.groups < layer.in_channels:  # not depthwise
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
        output, changes = run(model, example, Unknowns(constants=False))
    except ValueError:
        return True
    kept = leaves([new for _, new in changes], Tensor)
    return any(has_unknowns(each) for each in (*returned(output), *kept) if isinstance(each, Tensor))
