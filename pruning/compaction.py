"""From many scattered zeros to fewer channels: what unstructured pruning has made useless is taken out for good."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pruning.surgery import PINNED, Channels, find_channels, remove_channels


def compact(model: nn.Module, example: Tensor) -> nn.Module:
    """A narrower copy of `model` that computes the same outputs in eval mode, up to the rounding of sums.

    A channel goes if all the weights that read it are zero. So does one whose making weights are all zero, if what it
    always is, its bias, can be folded into the biases of the layers that read it. That in turn leaves other channels
    unread or constant; it ends when nothing is left to take. `example` is any batch `(N, C, ...)` for the network.
    """
    model = copy.deepcopy(model)
    while True:
        channels = find_channels(model, example)
        fold_constants(model, example, channels)
        model, gone = remove_channels(model, example, channels, ~alive(model, channels, made=False))
        if not gone.any():
            return model


@torch.no_grad()
def fold_constants(model: nn.Module, example: Tensor, channels: Channels) -> None:
    """Move what channels without incoming weights contribute into the biases of their readers, in place.

    That is exact for linear layers and for convolutions without padding. Convolutions with padding see zeros around
    the constant, and layers without a bias have no place for it: there, only a constant of zero is folded.
    """
    constant = ~alive(model, channels, made=True)
    constant[PINNED] = False  # the input is made by nothing, but it is not constant
    readers = list(weights_of(model, channels, made=False))
    inputs = layer_inputs(model, example, [layer for layer, _, _ in readers])
    for (layer, axis, names), seen in zip(readers, inputs, strict=True):
        if len(seen) != 1:  # used several times, perhaps on different constants
            continue
        values = seen[0].movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)  # (C_in, everything else)
        foldable = constant[names].to(values.device) & (values == values[:, :1]).all(1)
        if layer.bias is None or not sees_constants_everywhere(layer):
            foldable &= values[:, 0] == 0
        else:
            per_input = layer.weight.flatten(2).sum(2) if layer.weight.dim() > 2 else layer.weight  # (C_out, C_in)
            layer.bias += per_input[:, foldable] @ values[foldable, 0]
        layer.weight.index_fill_(axis, foldable.nonzero().squeeze(1), 0)


def sees_constants_everywhere(layer: nn.Module) -> bool:
    """Whether a constant input makes a constant output: not where padding or striding puts zeros between."""
    if isinstance(layer, nn.Linear):
        return True
    return not layer.transposed and (layer.padding == "valid" or set(layer.padding) == {0})


def layer_inputs(model: nn.Module, example: Tensor, layers: list[nn.Module]) -> list[list[Tensor]]:
    """What each of the layers is given, call by call, when the network runs on `example` in eval mode."""
    inputs: list[list[Tensor]] = [[] for _ in layers]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0]))
        for layer, calls in zip(layers, inputs, strict=True)
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()(example)
    for module, mode in modes.items():
        module.training = mode
    for hook in hooks:
        hook.remove()
    return inputs


def alive(model: nn.Module, channels: Channels, made: bool) -> Tensor:
    """Names that some nonzero weight makes, or else reads: boolean `(count + 1,)`."""
    found = torch.zeros(channels.count + 1, dtype=torch.bool)
    for layer, axis, names in weights_of(model, channels, made):
        found[names[layer.weight.movedim(axis, 0).flatten(1).any(1).cpu()]] = True
    return found


def weights_of(model: nn.Module, channels: Channels, made: bool) -> Iterator[tuple[nn.Module, int, Tensor]]:
    """Each layer whose weights make channels, or else read them, with the axis of its weight and the names there.

    Depthwise convolutions do neither: a channel goes through them under one name.
    """
    for (path, tensor, axis), names in channels.slots.items():
        layer = model.get_submodule(path)
        if tensor == "weight" and layer.weight.dim() > 1 and getattr(layer, "groups", 1) == 1:
            makes = axis == (1 if getattr(layer, "transposed", False) else 0)
            if makes == made:
                yield layer, axis, names
