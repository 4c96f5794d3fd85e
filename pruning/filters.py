"""Importance of filters and of groups of tied filters, the cutoff, and the cutoff that leaves a wanted size."""

import copy
import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from pruning.surgery import Channels, channels_of, eval_mode

METHODS = ("l2", "l1", "fpgm", "bn_scale", "taylor", "layerwise_random", "random")
THRESHOLD_MODES = ("standardized", "relative", "absolute", "quantile")

Losses = Callable[[nn.Module], Iterable[Tensor]]
Example = Tensor | Sequence[Any] | Mapping[str, Any] | Channels  # an input, several, keywords, or what was found by it
POOLING = {f"{kind}pool{n}d" for kind in ("max", "avg", "adaptivemax", "adaptiveavg") for n in (1, 2, 3)}


@torch.no_grad()
def filter_scores(
    model: nn.Module,
    method: str = "l2",
    generator: torch.Generator | None = None,
    example: Example | None = None,
    losses: Losses | None = None,
) -> dict[str, Tensor]:
    """The importance of every filter, a score `(C_out,)` per layer; filters of the lowest score are removed first.

    With an `example`, any input of the network as `remove_filters` takes it, importance belongs to the group: filters
    that can only be removed together share the mean of their scores (DepGraph, Fang et al. 2023, arXiv:2301.12900,
    §3.3, sums the squared weights of all tied layers instead), so that one cutoff marks whole groups. All layers
    whose filters can be removed have scores then: convolutions, also grouped ones, and linear layers.
    Without, torch.fx reads the network, every layer stands for itself, and only convolutions without groups have
    scores; in a network without ties these are the same numbers.

    method "l2" or "l1": the filter's norm (Li et al. 2017, arXiv:1608.08710, §3.1), times |gamma| where a BatchNorm
        alone reads the filter, at once or after a pooling.
    method "fpgm": the same with the sum of the distances to the layer's other filters for the norm, so that the most
        replaceable filter is removed (He et al. 2019, arXiv:1811.00250, §3.3).
    method "bn_scale": |gamma| alone (Liu et al. 2017, arXiv:1708.06519, §3), 1 where no BatchNorm reads the filter.
    method "taylor": what the loss would change by, to first order, without the filter: see `taylor_scores`, which also
        says what `losses` are.

    Two baselines draw from `generator`, on the CPU: "random" draws all scores from one distribution, and
    "layerwise_random" shuffles those of "l2" in each layer, so that as many filters of each layer are removed.

    Raises ValueError for another method, for "taylor" without losses and where it cannot see a layer's output, and what
    torch.fx raises where it cannot trace a network without an example.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}; allowed: {', '.join(METHODS)}")
    ids, axes, batch_norms = layers_by_fx(model) if example is None else layers_by_example(model, example)
    if method == "taylor":
        scores = taylor_scores(model, {path: batch_norms.get(path, path) for path in ids}, losses)
    else:
        gammas = {path: model.get_submodule(batch_norms[path]).weight.abs() for path in ids if path in batch_norms}
        filters = {path: filters_of(model, path, axes.get(path, 0)) for path in ids}
        scores = {path: layer_scores(filters[path], gammas.get(path), method) for path in ids}
    importance, kinds = group_means(ids, scores), kinds_of_groups(ids)
    for groups in kinds.values():
        if method == "random":
            importance[groups] = torch.rand(len(groups), generator=generator).double()
        elif method == "layerwise_random":
            importance[groups] = importance[groups[torch.randperm(len(groups), generator=generator)]]
    level_kinds(kinds, importance)
    if all(score.dtype != torch.double for score in scores.values()):
        importance = in_float32(importance)
    return {path: back_to_filters(scores[path], ids[path], importance) for path in ids}


def layers_by_example(model: nn.Module, example: Example) -> tuple[dict[str, Tensor], dict[str, int], dict[str, str]]:
    """The group of each filter, `(C_out,)` per layer, 0 where fixed; along which axis of the weight the filters lie, 1
    as in `x @ weight`; and the BatchNorm that alone reads a layer, where one does.
    """
    channels = channels_of(model, example)
    ids = {path: ids for path, ids in channels.filters.items() if ids.any()}
    return ids, channels.axes, channels.batch_norms


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
    return weight.movedim(axis, 0).flatten(1)  # of a convolution (C_out, C_in / groups, kH, kW)


def layer_scores(filters: Tensor, gamma: Tensor | None, method: str) -> Tensor:
    """The scores `(C_out,)` of the filters `(C_out, C_in * kH * kW)` of one layer, `gamma` `(C_out,)` not negative."""
    if method == "bn_scale":
        return torch.ones_like(filters[:, 0]) if gamma is None else gamma
    if method == "fpgm":
        wide = filters.to(torch.promote_types(filters.dtype, torch.float32))  # cdist knows no narrower ones on a CPU
        norm = torch.cdist(wide, wide).sum(1).to(filters)
    elif method == "l1":
        norm = filters.norm(1, dim=1)
    elif method in ("l2", "random", "layerwise_random"):  # the last two draw theirs later
        norm = filters.norm(2, dim=1)
    else:
        raise NotImplementedError(f"method {method!r} has no score here")
    return norm if gamma is None else norm * gamma


def taylor_scores(model: nn.Module, places: dict[str, str], losses: Losses | None) -> dict[str, Tensor]:
    """How much of the loss each filter carries, squared: the mean over examples of (sum of y * dL/dy)^2, `(C_out,)`.

    The sum runs over the positions of the filter's map y, as it comes from the module that `places` names for each
    layer. Behind a BatchNorm it is gamma * dL/dgamma + beta * dL/dbeta, the importance of a gate there (Molchanov et
    al. 2019, arXiv:1906.10771, §3.1 and eq. 8). The model is in eval mode, in which examples do not mix, and comes
    back as it was.

    `losses(model)` yields, for each batch, the sum of the losses of its examples:
        def losses(model):
            for images, labels in loader:
                yield F.cross_entropy(model(images), labels, reduction="sum")
    """
    if losses is None:
        raise ValueError("method 'taylor' needs losses")
    if not places:
        return {}
    modules = dict(model.named_modules())
    if bare := [path for path, place in places.items() if place not in modules]:
        raise ValueError(f"method 'taylor' needs a module's output to look at, which {', '.join(bare)} has not")
    outputs: list[tuple[str, Tensor]] = []

    def watch(path: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            outputs.append((path, output if output.requires_grad else output.requires_grad_()))
            return output.clone()  # so that what follows may work in place

        return hook

    handles = [modules[place].register_forward_hook(watch(path)) for path, place in places.items()]
    sums, examples = {}, 0
    try:
        with eval_mode(model), torch.enable_grad():
            for loss in losses(model):
                if unseen := places.keys() - {path for path, _ in outputs}:
                    raise ValueError(
                        f"method 'taylor': {', '.join(sorted(unseen))} does not run in eval mode as a module"
                    )
                gradients = torch.autograd.grad(loss, [output for _, output in outputs], materialize_grads=True)
                batch = {}
                for (path, output), gradient in zip(outputs, gradients, strict=True):
                    axis = -1 if isinstance(modules[places[path]], nn.Linear) else 1
                    change = (output.detach() * gradient).movedim(axis, 1)  # (N, C_out, ...)
                    change = change.reshape(*change.shape[:2], -1).sum(2)  # (N, C_out)
                    batch[path] = batch.get(path, 0) + change  # of all calls of a layer
                sums = {path: sums.get(path, 0) + change.square().sum(0) for path, change in batch.items()}
                examples += len(output)
                outputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    if not examples:
        raise ValueError("method 'taylor': losses yields no batch")
    return {path: sums[path] / examples for path in places}


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


def in_float32(importance: Tensor) -> Tensor:
    """The same in float32, still apart where rounding makes them equal: or layers might order groups differently."""
    order = importance.argsort(stable=True)
    rounded, differ = importance[order].float(), importance[order].diff() > 0
    while (equal := differ & (rounded.diff() <= 0)).any():
        rounded[1:][equal] = rounded[1:][equal].nextafter(torch.tensor(math.inf))
    return torch.empty_like(rounded).scatter_(0, order, rounded)


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
    return shared.to(scores.device)


def filters_to_keep(
    scores: dict[str, Tensor], threshold: float, mode: str = "standardized", round_to: int = 1
) -> dict[str, int]:
    """How many filters of each layer are kept: all whose score is not below `threshold`, at the least the strongest.

    Scores are compared in the mode's unit, see `in_units`; in mode "quantile" that fraction of the layer's filters is
    removed, whatever their scores. The number kept is rounded up to a multiple of `round_to` where the layer has as
    many. Raises ValueError for another mode and for scores that are NaN.
    filters_to_keep({"conv": tensor([1.0, 4.0, 2.0])}, 0.5, "relative") = {"conv": 2}
    """
    return {
        layer: round_up(len(score) - count_weak(score, threshold, mode), round_to, len(score))
        for layer, score in scores.items()
    }


def count_weak(score: Tensor, threshold: float, mode: str) -> int:
    """How many filters of a layer, of scores `(C_out,)`, are below the cutoff; all of them may be."""
    if mode == "quantile":
        refuse_nan(score)
        return math.floor(Fraction(str(float(threshold))) * len(score))  # 0.29 * 100 is 29, not 28.999...
    return int((in_units(score, mode) < threshold).sum())


def in_units(score: Tensor, mode: str) -> Tensor:
    """The scores `(C_out,)` of a layer in the unit in which a cutoff is given, in the same order.

    mode "standardized": moved and scaled to mean 1 and standard deviation 1 (all 1 where all are alike). Norms within
        a layer are nearly normally distributed, so a threshold removes about the same fraction of each layer whatever
        its scale: 0.5, half a standard deviation below the mean, about 31 %; 1, the mean, about half.
    mode "relative": as fractions of the layer's highest. One outlier moves the cutoff of its layer.
    mode "absolute": as they are.
    mode "quantile": by rank, the fraction of filters that are not stronger.
    """
    if mode not in THRESHOLD_MODES:
        raise ValueError(f"threshold mode {mode!r}; allowed: {', '.join(THRESHOLD_MODES)}")
    refuse_nan(score)
    if mode == "absolute":
        return score
    if mode == "quantile":
        return (score.argsort(stable=True).argsort() + 1).double() / len(score)
    largest = score.abs().max()  # of scores that a user has made some may be negative
    ratio = torch.where(score == largest, 1.0, score / largest)  # so small thresholds do not underflow
    if mode == "relative":
        return ratio
    deviation = ratio.double() - ratio.double().mean()
    spread = deviation.square().mean().sqrt()
    return 1 + (deviation / spread if spread > 0 else deviation)


def refuse_nan(score: Tensor) -> None:
    if score.isnan().any():
        raise ValueError("a score is NaN: some weight or gamma of the layer is")


def filters_for_target(
    scores: dict[str, Tensor],
    target: float,
    cost: Callable[[dict[str, int]], float],
    mode: str = "standardized",
    round_to: int = 1,
    fill: bool = True,
) -> tuple[float, dict[str, int]]:
    """The lowest threshold that leaves a network of at most the `target` cost, and how many filters each layer keeps.

    `cost(keep)` tells what the network costs with `keep[layer]` filters in each layer: parameters, multiply-adds,
    measured time. Where the threshold leaves room, the strongest of the filters below it that still fit are kept too,
    unless `fill` is False. Raises ValueError where no threshold costs so little, and for scores that are NaN.
    """
    values = {layer: in_units(score, mode).sort().values.tolist() for layer, score in scores.items()}
    weakest_first = sorted((value, layer) for layer in values for value in values[layer][:-1])

    def keep_without(removed: int) -> dict[str, int]:
        weak = Counter(layer for _, layer in weakest_first[:removed])
        return {layer: round_up(len(score) - weak[layer], round_to, len(score)) for layer, score in scores.items()}

    removed = bisect_left(range(len(weakest_first) + 1), -target, key=lambda removed: -cost(keep_without(removed)))
    if removed > len(weakest_first):
        raise ValueError(f"one filter in every layer already costs {cost(keep_without(removed)):,}")
    keep, full = keep_without(removed), set()
    for _, layer in reversed(weakest_first[:removed] if fill else []):
        more = {**keep, layer: min(keep[layer] + round_to, len(scores[layer]))}
        if layer not in full and cost(more) <= target:
            keep = more
        else:
            full.add(layer)
    thresholds = [value for value, _ in weakest_first] + [max(max(value) for value in values.values())]
    if mode == "quantile":  # there, what is at the threshold is removed
        thresholds = [0.0, *(math.nextafter(value, 1) for value in thresholds)]
    return thresholds[removed], keep


def round_up(number: int, multiple: int, most: int) -> int:
    """The next multiple of `multiple` that is at least 1 and `number`, but not more than `most`."""
    if multiple < 1:
        raise ValueError(f"round_to {multiple}; allowed: 1 or more")
    return min(math.ceil(max(1, number) / multiple) * multiple, most)


def mark_weakest(scores: dict[str, Tensor], keep: dict[str, int]) -> dict[str, Tensor]:
    """True for the filters to remove, boolean `(C_out,)` per layer: all but the `keep[layer]` of highest score.

    Of equal scores the first is kept. Raises ValueError for scores that are NaN and for a layer that `keep` lacks.
    """
    if missing := scores.keys() - keep.keys():
        raise ValueError(f"how many filters are kept is not told for {', '.join(sorted(missing))}")
    marked = {}
    for layer, score in scores.items():
        refuse_nan(score)
        marked[layer] = torch.ones(len(score), dtype=torch.bool)
        marked[layer][score.argsort(descending=True, stable=True)[: keep[layer]].cpu()] = False
    return marked
