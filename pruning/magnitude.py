"""Which weights go, and keeping them gone.

Masks are a plain dict, name of the parameter -> boolean tensor, True where a weight lives. The network itself is
never wrapped or changed in kind: its parameters stay plain tensors throughout, some of whose elements are 0.

    masks = dense_masks(model)
    hold = keep_at_zero(model, masks, optimizer)
    for step, batch in enumerate(batches):
        if schedule.prunes_at(step):
            update_masks(model, masks, schedule.sparsity(step))
        ...; optimizer.step()
    make_permanent(model, masks, hold)
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning.methods import SCOPES, WEIGHT_METHODS

Masks = dict[str, Tensor]

PRUNABLE = (nn.modules.conv._ConvNd, nn.Linear)


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all convolutions and linear layers by name, each once; no biases, no normalisation."""
    prunable = {id(module.weight) for module in model.modules() if isinstance(module, PRUNABLE)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in prunable}


def sparsity(model: nn.Module) -> float:
    """The fraction of the prunable weights that are exactly 0."""
    weights = prunable_weights(model).values()
    zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


def dense_masks(model: nn.Module) -> Masks:
    """Masks under which every prunable weight lives. Raises ValueError for a network without any."""
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable_weights(model).items()}
    if not masks:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer with a weight of its own")
    return masks


@torch.no_grad()
def update_masks(
    model: nn.Module,
    masks: Masks,
    sparsity: float | Mapping[str, float],
    scope: str = "global",
    method: str = "magnitude",
    generator: torch.Generator | None = None,
    squared_gradients: Mapping[str, Tensor] | None = None,
) -> None:
    """Prune the weights of least magnitude until a fraction `sparsity` of them is gone; masks change in place.

    scope "global": the smallest |w| of the whole network go, exactly round(sparsity * n) of its n weights.
    scope "layer": the smallest |w| of each layer go, exactly round(sparsity * n) of its n weights.
    scope "lamp": as global, with |w| replaced by the layer-adaptive score of `lamp_scores`.

    With a `sparsity` for each layer, by the name of its mask, each loses just that of its own, as by scope "layer".

    Method "obd" goes by the damage that is to be expected instead, h w^2 / 2: Optimal Brain Damage (LeCun et al. 1989,
    §2). For the curvature h stand `squared_gradients`, those of `average_squared_gradients`. Theis et al. 2018
    (arXiv:1801.05787, §2.1) have single examples' gradients there, whose mean square is in proportion to that of
    batches where the gradient of all examples together is near 0. To compare with, method "random" draws which weights
    go, by `generator`, on the CPU.

    Ties fall by position: earlier layers, then earlier elements, first. What is gone stays gone, and the strongest
    weight of each layer stays, even where that leaves more weights than the sparsity asks for. Linear time in n,
    but for "lamp", which sorts. Raises ValueError for an unknown scope or method, for "obd" without squared gradients
    and for a sparsity outside [0, 1).
    """
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r}; allowed: {', '.join(SCOPES)}")
    if method not in WEIGHT_METHODS:
        raise ValueError(f"method {method!r}; allowed: {', '.join(WEIGHT_METHODS)}")
    squares = squared_gradients or {}
    if method == "obd" and not masks.keys() <= squares.keys():
        raise ValueError('method "obd" without squared_gradients; allowed: one of each mask')
    by_layer = [sparsity[name] for name in masks] if isinstance(sparsity, Mapping) else [sparsity] * len(masks)
    for fraction in by_layer:
        if not 0 <= fraction < 1:
            raise ValueError(f"sparsity {fraction}; allowed: at least 0, below 1")
    weights = prunable_weights(model)
    scores = [
        removal_scores(weights[name], mask, scope, method, generator, squares.get(name)) for name, mask in masks.items()
    ]
    if scope == "layer" or isinstance(sparsity, Mapping):
        keep = [keep_strongest(score, fraction) for score, fraction in zip(scores, by_layer, strict=True)]
    else:
        sizes = [score.numel() for score in scores]
        keep = keep_strongest(torch.cat(scores), sparsity, keep_at_least=len(scores)).split(sizes)
    for mask, kept in zip(masks.values(), keep, strict=True):
        mask &= kept.view_as(mask)
    apply_masks(weights, masks)


def removal_scores(
    weight: Tensor,
    mask: Tensor,
    scope: str,
    method: str,
    generator: torch.Generator | None,
    squared_gradient: Tensor | None,
) -> Tensor:
    """One score per weight, flat; the lowest go first. -1 for what is gone already, infinity for the strongest."""
    alive = weight * mask
    if method == "obd":
        alive *= squared_gradient.sqrt()  # the root of twice the damage: so it takes the place of a magnitude
    scores = lamp_scores(alive) if scope == "lamp" else alive.abs().flatten()
    if method == "random":
        scores = torch.rand(len(scores), generator=generator).to(scores)
    scores = scores.masked_fill(~mask.flatten(), -1)
    scores[scores.argmax()] = math.inf
    return scores


def lamp_scores(weight: Tensor) -> Tensor:
    """Layer-adaptive magnitude: w_u^2 over the sum of w_v^2 of all v in the layer that are not smaller; flat, float64.

    Lee et al. 2021, "Layer-adaptive sparsity for the magnitude-based pruning", arXiv:2010.07611, eq. 1. The largest
    weight of every layer scores 1; among equals the earlier one scores lower.

    lamp_scores(tensor([1., 2., 2.])) = [1/9, 4/8, 4/4]
    """
    squares, order = weight.flatten().double().square().sort(stable=True)
    not_smaller = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = squares / not_smaller.clamp_min(torch.finfo(torch.float64).tiny)  # all-zero tails score 0, not NaN
    return scores


def keep_strongest(scores: Tensor, sparsity: float, keep_at_least: int = 1) -> Tensor:
    """A boolean tensor, False at the round(sparsity * n) lowest of the n scores, ties by index.

    It is True for the `keep_at_least` highest in any case.
    """
    remove = min(round(sparsity * len(scores)), len(scores) - keep_at_least)
    if remove == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    cutoff = scores.kthvalue(remove).values
    keep = scores > cutoff
    ties = (scores == cutoff).nonzero().squeeze(1)
    already_gone = int((scores < cutoff).sum())
    keep[ties[remove - already_gone :]] = True
    return keep


def average_squared_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, decay: float = 0.99
) -> dict[str, Tensor]:
    """The squared gradient of each prunable weight, by name, at first 0; every `optimizer.step()` moves them in place.

    They are running averages over the batches that lose all but `decay` of themselves at each step: long enough to be
    steady, short enough to forget the network of some cuts ago. Raises ValueError where a weight is frozen.
    """
    weights = prunable_weights(model)
    for name, weight in weights.items():
        if not weight.requires_grad:
            raise ValueError(f"{name} is frozen, so that it has no gradient to go by")
    averages = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    @torch.no_grad()
    def average(*_: object) -> None:
        for name, weight in weights.items():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            averages[name].lerp_(gradient.square(), 1 - decay)

    optimizer.register_step_pre_hook(average)
    return averages


def keep_at_zero(model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """From now on, every `optimizer.step()` ends with the masked weights at 0, whatever momentum or decay did."""
    weights = prunable_weights(model)
    return optimizer.register_step_post_hook(lambda *_: apply_masks(weights, masks))


@torch.no_grad()
def apply_masks(weights: dict[str, nn.Parameter], masks: Masks) -> None:
    """Set every weight that is gone to 0."""
    for name, mask in masks.items():
        weights[name].mul_(mask.view(torch.int8))  # twice as fast on the CPU as the product with a boolean


@torch.no_grad()
def make_permanent(model: nn.Module, masks: Masks, hold: RemovableHandle) -> None:
    """Let go of the optimiser and leave the plain network: same modules, same state_dict keys, zeros for good."""
    hold.remove()
    for name, weight in prunable_weights(model).items():
        weight.masked_fill_(~masks[name], 0.0)  # unlike a product with the mask, this leaves no -0.0
