"""Importance of filters and of groups of tied filters, the cutoff, and the cutoff that leaves a wanted size."""

import copy
import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from pruning.surgery import Channels, find_channels

METHODS = ("l2", "l1", "fpgm", "bn_scale", "layerwise_random", "random")
THRESHOLD_MODES = ("relative", "absolute", "quantile")

Example = Tensor | Sequence[Any] | Mapping[str, Any] | Channels  # an input, several, keywords, or what was found by it
POOLING = {f"{kind}pool{n}d" for kind in ("max", "avg", "adaptivemax", "adaptiveavg") for n in (1, 2, 3)}


@torch.no_grad()
def filter_scores(
    model: nn.Module, method: str = "l2", generator: torch.Generator | None = None, example: Example | None = None
) -> dict[str, Tensor]:
    """The importance of every filter, a score `(C_out,)` per layer; filters of the lowest score are removed first.

    With an `example`, any input of the network as `remove_filters` takes it, importance belongs to the group: filters
    that can only be removed together share the mean of their scores (DepGraph, Fang et al. 2023, arXiv:2301.12900,
    §3.3, sums the squared weights of all tied layers instead), so that one cutoff marks whole groups. All layers
    whose filters can be removed have scores then: convolutions, also grouped ones, and linear layers.
    Without, torch.fx reads the network, every layer stands for itself, and only convolutions without groups have
    scores; in a network without ties these are the same numbers.

    method "l2" or "l1": the filter's norm as the network uses it (Li et al. 2017, arXiv:1608.08710, §3.1). Where a
        BatchNorm alone reads the convolution, at once or after a pooling, it takes the filter's own scale out again
        and puts its |gamma| in: there the score is the geometric mean of the norm and |gamma|, which counts twice.
        Both fade together, as a filter of little gamma gets little gradient against weight decay: a product would
        count that twice. And the norm says less of the two: it varies from seed to seed where |gamma| does not.
    method "fpgm": the same, with the sum of the distances to the layer's other filters for the norm, so that the most
        replaceable filter is removed (He et al. 2019, arXiv:1811.00250, §3.3).
    method "bn_scale": |gamma| alone (Liu et al. 2017, arXiv:1708.06519, §3), 1 where no BatchNorm reads the filter.

    Two baselines draw from `generator`, on the CPU: "random" draws all scores from one distribution, and
    "layerwise_random" shuffles those of "l2" in each layer, so that as many filters of each layer are removed.

    Raises ValueError for another method, and what torch.fx raises where it cannot trace a network without an example.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}; allowed: {', '.join(METHODS)}")
    ids, axes, batch_norms = layers_by_fx(model) if example is None else layers_by_example(model, example)
    criterion = "l2" if method in ("layerwise_random", "random") else method
    scores = {}
    for path in ids:
        gamma = model.get_submodule(batch_norms[path]).weight.abs() if path in batch_norms else None
        scores[path] = layer_scores(filters_of(model, path, axes.get(path, 0)), gamma, criterion)
    importance, kinds = group_means(ids, scores), kinds_of_groups(ids)
    for groups in kinds.values():
        if method == "random":
            importance[groups] = torch.rand(len(groups), generator=generator).double()
        elif method == "layerwise_random":
            importance[groups] = importance[groups[torch.randperm(len(groups), generator=generator)]]
    level_kinds(kinds, importance)
    return {path: back_to_filters(scores[path], ids[path], importance) for path in ids}


def layers_by_example(model: nn.Module, example: Example) -> tuple[dict[str, Tensor], dict[str, int], dict[str, str]]:
    """The group of each filter, `(C_out,)` per layer, 0 where fixed; along which axis the filters of some weights lie,
    as in `x @ weight`, else 0; and the BatchNorm that alone reads a layer, where one does.
    """
    channels = example if isinstance(example, Channels) else find_channels(model, example)
    ids = {path: ids for path, ids in channels.filters.items() if ids.any()}
    axes = {}
    for (path, name, axis), found in channels.slots.items():
        layer = path if name == "weight" else f"{path}.{name}".lstrip(".")
        if layer in ids and torch.equal(ids[layer], found):
            axes[layer] = axis
    return ids, axes, channels.batch_norms


def layers_by_fx(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int], dict[str, str]]:
    """The same for the convolutions without groups of a network, as if there were no ties and nothing fixed."""
    ids, batch_norms, count = {}, {}, 0
    for node in fx.symbolic_trace(copy.deepcopy(model)).graph.nodes:
        layer = module_at(model, node)
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1:
            ids[node.target] = torch.arange(count + 1, count + 1 + layer.out_channels)
            count += layer.out_channels
            batch_norms[node.target] = batch_norm_behind(model, node)
    return ids, {}, {path: batch_norm for path, batch_norm in batch_norms.items() if batch_norm}


def module_at(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a node of the graph calls, if it calls one."""
    return model.get_submodule(node.target) if node.op == "call_module" else None


def batch_norm_behind(model: nn.Module, node: fx.Node) -> str | None:
    """The BatchNorm with a gamma that alone reads what the node computes, perhaps through a pooling."""
    while len(node.users) == 1:
        (node,) = node.users
        module = module_at(model, node)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            return node.target
        operation = type(module) if module else node.target  # MaxPool2d and max_pool2d are one
        if getattr(operation, "__name__", "").lower().replace("_", "") not in POOLING:
            break
    return None


def filters_of(model: nn.Module, path: str, axis: int = 0) -> Tensor:
    """The filters of a layer as rows, `(C_out, everything else)`; those of any other weight lie along `axis`."""
    layer = attrgetter(path)(model) if path else model
    weight = layer if isinstance(layer, Tensor) else layer.weight
    if getattr(layer, "transposed", False):  # (C_in, C_out / groups, kH, kW)
        return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    is_layer = isinstance(layer, nn.modules.conv._ConvNd | nn.Linear)  # (C_out, C_in / groups, kH, kW)
    return weight.movedim(0 if is_layer else axis, 0).flatten(1)


def layer_scores(filters: Tensor, gamma: Tensor | None, method: str) -> Tensor:
    """The scores `(C_out,)` of the filters `(C_out, C_in * kH * kW)` of one layer, `gamma` `(C_out,)` not negative."""
    if method == "bn_scale":
        return torch.ones_like(filters[:, 0]) if gamma is None else gamma
    if method == "fpgm":
        norm = torch.cdist(filters, filters).sum(1)
    elif method == "l1":
        norm = filters.norm(1, dim=1)
    else:
        norm = filters.norm(2, dim=1)
    return norm if gamma is None else (norm * gamma.square()).pow(1 / 3)


def group_means(ids: dict[str, Tensor], scores: dict[str, Tensor]) -> Tensor:
    """The mean score of the filters of each group, float64 `(groups + 1,)`; that of a single filter is its own."""
    everything = torch.cat([torch.zeros(1, dtype=torch.double), *(scores[path].double().cpu() for path in ids)])
    groups = torch.cat([torch.zeros(1, dtype=torch.int64), *ids.values()])
    count = groups.bincount()
    return torch.zeros(len(count), dtype=torch.double).index_add(0, groups, everything) / count.clamp(min=1)


def kinds_of_groups(ids: dict[str, Tensor]) -> dict[tuple[str, ...], Tensor]:
    """Groups are of one kind if they stand in the same layers, as often: the ids of each kind, by its layers."""
    layers, kinds = defaultdict(list), defaultdict(list)
    for path, groups in ids.items():
        for group in groups[groups != 0].tolist():
            layers[group].append(path)
    for group, paths in layers.items():
        kinds[tuple(paths)].append(group)
    return {paths: torch.tensor(groups) for paths, groups in kinds.items()}


def level_kinds(kinds: dict[tuple[str, ...], Tensor], importance: Tensor) -> None:
    """Give kinds that share a layer the same distribution of scores, in place.

    A cutoff is made for each layer. Where it sorts groups of several kinds, as in `cat([a(x), b(x)], 1) + c(x)` the
    layer c does, it takes the same share of each kind, and so marks the same filters of c as of a and b.
    """
    component_of: dict[str, list] = {}  # of each layer: the kinds that share it, and those that share layers with them
    for paths, groups in kinds.items():
        found = {id(component_of[path]): component_of[path] for path in paths if path in component_of}
        component = [(paths, groups), *chain.from_iterable(found.values())]
        component_of.update((path, component) for paths, _ in component for path in paths)
    for component in {id(component): component for component in component_of.values()}.values():
        pool = importance[torch.cat([groups for _, groups in component])]
        for _, groups in component:
            importance[groups] = at_same_rank(importance[groups], pool)


def at_same_rank(scores: Tensor, pool: Tensor) -> Tensor:
    """For the k-th lowest of `n` scores the one of `pool` that as great a part of it lies below.

    at_same_rank(tensor([7.0, 9.0]), tensor([1.0, 2.0, 3.0, 4.0])) = tensor([2.0, 4.0])
    """
    rank = scores.argsort(stable=True).argsort()
    return pool.sort().values[(2 * rank + 1) * len(pool) // (2 * len(scores))]


def back_to_filters(scores: Tensor, ids: Tensor, importance: Tensor) -> Tensor:
    """The scores `(C_out,)` of a layer's filters from those of their groups.

    Fixed filters cannot be removed; scores like those of the others let a quantile take its part of the others.
    """
    shared = importance[ids]
    fixed = ids == 0
    if fixed.any():
        shared[fixed] = at_same_rank(scores[fixed.to(scores.device)].double().cpu(), shared[~fixed])
    return shared.to(scores)


def filters_to_keep(
    scores: dict[str, Tensor], threshold: float, mode: str = "relative", round_to: int = 1
) -> dict[str, int]:
    """How many filters of each layer are kept: all whose score is not below the cutoff, at the least the strongest.

    The cutoff is `threshold` times the layer's highest score (relative), or `threshold` itself (absolute); in mode
    "quantile" that fraction of the layer's filters is removed, whatever their scores. The number kept is rounded up to
    a multiple of `round_to` where the layer has as many. Raises ValueError for another mode and for scores that are
    NaN. filters_to_keep({"conv": tensor([1.0, 4.0, 2.0])}, 0.5) = {"conv": 2}
    """
    return {
        layer: round_up(len(score) - count_weak(score, threshold, mode), round_to, len(score))
        for layer, score in scores.items()
    }


def count_weak(score: Tensor, threshold: float, mode: str) -> int:
    """How many filters of a layer, of scores `(C_out,)`, are below the cutoff; all of them may be."""
    if mode not in THRESHOLD_MODES:
        raise ValueError(f"threshold mode {mode!r}; allowed: {', '.join(THRESHOLD_MODES)}")
    refuse_nan(score)
    if mode == "quantile":
        return math.floor(Fraction(str(float(threshold))) * len(score))  # 0.29 * 100 is 29, not 28.999...
    return int(((relative(score) if mode == "relative" else score) < threshold).sum())


def relative(score: Tensor) -> Tensor:
    """Scores as fractions of the highest, 1 where all are zero; so small thresholds do not underflow."""
    return torch.where(score == score.max(), 1.0, score / score.max())


def refuse_nan(score: Tensor) -> None:
    if score.isnan().any():
        raise ValueError("a score is NaN: some weight or gamma of the layer is")


def filters_for_target(
    scores: dict[str, Tensor], target: int, count: Callable[[dict[str, int]], int], round_to: int = 1
) -> tuple[float, dict[str, int]]:
    """The lowest relative threshold that leaves at most `target` parameters, and how many filters each layer keeps.

    `count(keep)` tells how many parameters the network has with `keep[layer]` filters in each layer. Where the
    threshold leaves room, the strongest of the filters below it that still fit are kept too. Raises ValueError where
    no threshold leaves so few parameters, and for scores that are NaN.
    """
    for score in scores.values():
        refuse_nan(score)
    ratios = {layer: relative(score).sort().values.tolist() for layer, score in scores.items()}
    weakest_first = sorted((ratio, layer) for layer in ratios for ratio in ratios[layer][:-1])

    def keep_without(removed: int) -> dict[str, int]:
        weak = Counter(layer for _, layer in weakest_first[:removed])
        return {layer: round_up(len(score) - weak[layer], round_to, len(score)) for layer, score in scores.items()}

    removed = bisect_left(range(len(weakest_first) + 1), -target, key=lambda removed: -count(keep_without(removed)))
    if removed > len(weakest_first):
        raise ValueError(f"one filter in every layer already makes {count(keep_without(removed)):,} parameters")
    keep = keep_without(removed)
    for _, layer in reversed(weakest_first[:removed]):
        more = {**keep, layer: min(keep[layer] + round_to, len(scores[layer]))}
        keep = more if count(more) <= target else keep
    threshold = weakest_first[removed][0] if removed < len(weakest_first) else 1.0
    return threshold, keep


def round_up(number: int, multiple: int, most: int) -> int:
    """The next multiple of `multiple` that is at least 1 and `number`, but not more than `most`."""
    return min(math.ceil(max(1, number) / multiple) * multiple, most)


def mark_weakest(scores: dict[str, Tensor], keep: dict[str, int]) -> dict[str, Tensor]:
    """True for the filters to remove, boolean `(C_out,)` per layer: all but the `keep[layer]` of highest score.

    Of equal scores the first is kept. Raises ValueError for scores that are NaN.
    """
    marked = {}
    for layer, score in scores.items():
        refuse_nan(score)
        marked[layer] = torch.ones(len(score), dtype=torch.bool)
        marked[layer][score.argsort(descending=True, stable=True)[: keep[layer]].cpu()] = False
    return marked
