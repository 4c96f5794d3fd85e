"""Which filters go: their norms, the cutoff, and the cutoff that leaves a network of a wanted size."""

import copy
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from pruning.surgery import BATCH_NORM, POOLING, kind_of, module_at

MODES = ("relative", "absolute", "quantile")


@torch.no_grad()
def filter_norms(model: nn.Module) -> dict[str, Tensor]:
    """The L2 norm `(C_out,)` of each filter of every convolution (without groups), as the network uses it.

    Where a BatchNorm stands behind the convolution, at once or after a pooling, it takes the filter's own scale out
    again and puts its |gamma| in. There it is the geometric mean of the norm (Li et al. 2017, arXiv:1608.08710, §3.1)
    and |gamma| (Liu et al. 2017, arXiv:1708.06519, §3): a filter of no use loses both to weight decay, and their
    product would count its decline twice. Raises what torch.fx raises where it cannot trace the network.
    """
    norms = {}
    for node in fx.symbolic_trace(copy.deepcopy(model)).graph.nodes:
        layer = module_at(model, node)
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1:
            norm, batch_norm = layer.weight.flatten(1).norm(dim=1), batch_norm_behind(model, node)
            norms[node.target] = norm if batch_norm is None else (norm * batch_norm.weight.abs()).sqrt()
    return norms


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
    norms: dict[str, Tensor], threshold: float, mode: str = "relative", round_to: int = 1
) -> dict[str, int]:
    """How many filters of each layer stay: all whose norm is not below the cutoff, the strongest at the least.

    The cutoff is `threshold` times the layer's largest norm (relative), or `threshold` itself (absolute); by quantile
    that fraction of the layer's filters goes, whatever their norms. The number that stays is rounded up to a multiple
    of `round_to` where the layer has as many. filters_to_keep({"conv": tensor([1.0, 4.0, 2.0])}, 0.5) = {"conv": 2}
    """
    return {
        layer: round_up(len(norm) - count_weak(norm, threshold, mode), round_to, len(norm))
        for layer, norm in norms.items()
    }


def count_weak(norm: Tensor, threshold: float, mode: str) -> int:
    """How many filters of a layer, of norms `(C_out,)`, the threshold dooms; all of them may be."""
    if mode == "quantile":
        return math.floor(threshold * len(norm))
    return int((norm < threshold * (norm.max() if mode == "relative" else 1)).sum())


def filters_for_target(
    norms: dict[str, Tensor], target: int, count: Callable[[dict[str, int]], int], round_to: int = 1
) -> tuple[float, dict[str, int]]:
    """The lowest relative threshold that leaves at most `target` parameters, and how many filters of each layer stay.

    `count(keep)` tells how many parameters the network has with `keep[layer]` filters in each layer. Where the
    threshold leaves room, the strongest of the filters below it that still fit stay too. Raises ValueError where no
    threshold leaves so few parameters.
    """
    ratios = {layer: (norm / norm.max()).sort().values.tolist() for layer, norm in norms.items()}
    weakest_first = sorted((ratio, layer) for layer in ratios for ratio in ratios[layer][:-1])

    def keep_without(gone: int) -> dict[str, int]:
        weak = Counter(layer for _, layer in weakest_first[:gone])
        return {layer: round_up(len(norm) - weak[layer], round_to, len(norm)) for layer, norm in norms.items()}

    gone = bisect_left(range(len(weakest_first) + 1), -target, key=lambda gone: -count(keep_without(gone)))
    if gone > len(weakest_first):
        raise ValueError(f"one filter in every layer already makes {count(keep_without(gone)):,} parameters")
    keep = keep_without(gone)
    for _, layer in reversed(weakest_first[:gone]):
        more = {**keep, layer: min(keep[layer] + round_to, len(norms[layer]))}
        keep = more if count(more) <= target else keep
    threshold = weakest_first[gone][0] if gone < len(weakest_first) else 1.0
    return threshold, keep


def round_up(number: int, multiple: int, most: int) -> int:
    """The next multiple of what is at least 1, but not more than `most`."""
    return min(math.ceil(max(1, number) / multiple) * multiple, most)


def mark_weakest(norms: dict[str, Tensor], keep: dict[str, int]) -> dict[str, Tensor]:
    """True for the filters that go, boolean `(C_out,)` per layer: all but the `keep[layer]` of largest norm.

    Of equal norms the first stays.
    """
    marked = {}
    for layer, norm in norms.items():
        marked[layer] = torch.ones(len(norm), dtype=torch.bool)
        marked[layer][norm.argsort(descending=True, stable=True)[: keep[layer]].cpu()] = False
    return marked
