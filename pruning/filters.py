"""Which filters go: their scores, the cutoff, and the cutoff that leaves a network of a wanted size."""

import copy
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from pruning.methods import FILTER_METHODS
from pruning.surgery import BATCH_NORM, POOLING, kind_of, module_at


@torch.no_grad()
def filter_scores(model: nn.Module, method: str = "l2", generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """A score `(C_out,)` for each filter of every convolution (without groups); those of the lowest go first.

    method "l2" or "l1": the filter's norm as the network uses it (Li et al. 2017, arXiv:1608.08710, §3.1). Where a
        BatchNorm stands behind the convolution, at once or after a pooling, that takes the filter's own scale out again
        and puts its |gamma| in: there it is the geometric mean of the norm and |gamma|, which counts twice. Both fade
        together, as a filter of little gamma gets little gradient against weight decay: a product would count that
        twice. And the norm says less of the two: it varies from seed to seed where |gamma| does not.
    method "fpgm": the same, with the sum of the distances to the layer's other filters for the norm, so that the most
        replaceable filter goes (He et al. 2019, arXiv:1811.00250, §3.3).
    method "bn_scale": |gamma| alone (Liu et al. 2017, arXiv:1708.06519, §3), 1 where no BatchNorm stands behind.

    To compare with, method "random" draws all scores alike, and "shuffled" takes those of "l2" in another order, so
    that as many filters of each layer go; by `generator`, which is on the CPU. Raises ValueError for another method,
    and what torch.fx raises where it cannot trace the network.
    """
    if method not in FILTER_METHODS:
        raise ValueError(f"method {method!r}; allowed: {', '.join(FILTER_METHODS)}")
    scores = {}
    for node in fx.symbolic_trace(copy.deepcopy(model)).graph.nodes:
        layer = module_at(model, node)
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1:
            batch_norm = batch_norm_behind(model, node)
            gamma = None if batch_norm is None else batch_norm.weight.abs()
            scores[node.target] = layer_scores(layer.weight.flatten(1), gamma, method, generator)
    return scores


def layer_scores(
    filters: Tensor, gamma: Tensor | None, method: str, generator: torch.Generator | None = None
) -> Tensor:
    """The scores `(C_out,)` of the filters `(C_out, C_in * kH * kW)` of one layer, `gamma` `(C_out,)` not negative."""
    if method == "random":
        return torch.rand(len(filters), generator=generator).to(filters)
    if method == "shuffled":
        return layer_scores(filters, gamma, "l2")[torch.randperm(len(filters), generator=generator).to(filters.device)]
    if method == "bn_scale":
        return torch.ones_like(filters[:, 0]) if gamma is None else gamma
    if method == "fpgm":
        norm = torch.cdist(filters, filters).sum(1)
    elif method == "l1":
        norm = filters.norm(1, dim=1)
    else:
        norm = filters.norm(2, dim=1)
    return norm if gamma is None else (norm * gamma.square()).pow(1 / 3)


def batch_norm_behind(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """The BatchNorm with a gamma that alone reads what the node computes, perhaps through a pooling."""
    while len(node.users) == 1:
        (node,) = node.users
        module = module_at(model, node)
        if isinstance(module, BATCH_NORM) and module.affine:
            return module
        if kind_of(node, module) not in POOLING:
            break
    return None


def filters_to_keep(
    scores: dict[str, Tensor], threshold: float, mode: str = "relative", round_to: int = 1
) -> dict[str, int]:
    """How many filters of each layer stay: all whose score is not below the cutoff, the strongest at the least.

    The cutoff is `threshold` times the layer's highest score (relative), or `threshold` itself (absolute); by quantile
    that fraction of the layer's filters goes, whatever their scores. The number that stays is rounded up to a multiple
    of `round_to` where the layer has as many. filters_to_keep({"conv": tensor([1.0, 4.0, 2.0])}, 0.5) = {"conv": 2}
    """
    return {
        layer: round_up(len(score) - count_weak(score, threshold, mode), round_to, len(score))
        for layer, score in scores.items()
    }


def count_weak(score: Tensor, threshold: float, mode: str) -> int:
    """How many filters of a layer, of scores `(C_out,)`, the threshold dooms; all of them may be."""
    if mode == "quantile":
        return math.floor(threshold * len(score))
    if mode == "relative":
        score = score / score.max()  # not the threshold times the highest, which may underflow
    return int((score < threshold).sum())


def filters_for_target(
    scores: dict[str, Tensor], target: int, count: Callable[[dict[str, int]], int], round_to: int = 1
) -> tuple[float, dict[str, int]]:
    """The lowest relative threshold that leaves at most `target` parameters, and how many filters of each layer stay.

    `count(keep)` tells how many parameters the network has with `keep[layer]` filters in each layer. Where the
    threshold leaves room, the strongest of the filters below it that still fit stay too. Raises ValueError where no
    threshold leaves so few parameters.
    """
    ratios = {layer: (score / score.max()).sort().values.tolist() for layer, score in scores.items()}
    weakest_first = sorted((ratio, layer) for layer in ratios for ratio in ratios[layer][:-1])

    def keep_without(gone: int) -> dict[str, int]:
        weak = Counter(layer for _, layer in weakest_first[:gone])
        return {layer: round_up(len(score) - weak[layer], round_to, len(score)) for layer, score in scores.items()}

    gone = bisect_left(range(len(weakest_first) + 1), -target, key=lambda gone: -count(keep_without(gone)))
    if gone > len(weakest_first):
        raise ValueError(f"one filter in every layer already makes {count(keep_without(gone)):,} parameters")
    keep = keep_without(gone)
    for _, layer in reversed(weakest_first[:gone]):
        more = {**keep, layer: min(keep[layer] + round_to, len(scores[layer]))}
        keep = more if count(more) <= target else keep
    threshold = weakest_first[gone][0] if gone < len(weakest_first) else 1.0
    return threshold, keep


def round_up(number: int, multiple: int, most: int) -> int:
    """The next multiple of what is at least 1, but not more than `most`."""
    return min(math.ceil(max(1, number) / multiple) * multiple, most)


def mark_weakest(scores: dict[str, Tensor], keep: dict[str, int]) -> dict[str, Tensor]:
    """True for the filters that go, boolean `(C_out,)` per layer: all but the `keep[layer]` of highest score.

    Of equal scores the first stays.
    """
    marked = {}
    for layer, score in scores.items():
        marked[layer] = torch.ones(len(score), dtype=torch.bool)
        marked[layer][score.argsort(descending=True, stable=True)[: keep[layer]].cpu()] = False
    return marked
