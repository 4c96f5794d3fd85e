"""What attention asks of a cut: widths that are one number in its code, and a factor that is derived from one.

The queries of a transformer are as wide in all as the tokens, by `x.reshape(B, N, C)` or the like, and attention is
divided by the root of the width of a head. Both follow from sizes when the narrow network runs. So channels whose
axes the code takes to be equally long are made one, and what another factor would change is made up for by the weights
that it is multiplied with. A factor is taken to depend on the width as it does at the example's size, which
`max(tokens, width)` does not.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pruning.tracing import Operation, Shadow, Trace, Value, core, varying, weight_of

# What only puts numbers elsewhere, each channel by an id of its own.
LINEAR_MOVES = set(
    "view _unsafe_view reshape permute transpose unsqueeze squeeze expand slice select split split_with_sizes chunk "
    "unbind alias detach clone contiguous".split()
)
Entries = tuple[Value, int, tuple[int, ...]]  # of a parameter: along which axis they lie, and where


def ties_within(dense: Shadow) -> list[tuple[Tensor, Tensor]]:
    """Ids to unite: each nn.MultiheadAttention asserts that queries, keys and values are as wide as what it reads."""
    ties = []
    for path, module in dense.model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
            births = {name: dense.births[path, name] for name in names if (path, name) in dense.births}
            for name, (made, _) in births.items():
                _, read = next(iter(births.values()))
                made = torch.arange(made, made + len(getattr(module, name)))
                read = torch.arange(read, read + module.embed_dim)
                ties.append((made, read.repeat(len(made) // len(read))))
    return ties


def follow_width(trace: Trace, step: int, sizes: list[int], labels: Tensor, gone: Tensor, split: bool) -> bool:
    """Unite the channels along an axis of a view with those along an axis before it whose size it was given.

    `sizes`: what the view was given when the ids that are `gone` had been removed; `labels`: the groups of all ids.
    `split`: only of a view that splits an axis, as into heads, where it may be the size of all of them; or only of
    others. Returns whether there were any. It is a choice of the trace: refuted, they are not united.
    """
    dense = trace.operations[step]
    for axis, (old, new) in enumerate(zip(dense.args[1], sizes, strict=True)):
        own = [ids for ids in dense.results[0].ids if axis in varying(ids)]
        if old == new or not own or (step, axis) in trace.followers or (len(varying(own[0])) > 1) != split:
            continue
        grid = core(own[0]).abs()
        for first in (*reversed([each for each in varying(grid) if each < axis]), axis):
            several = grid.shape[first:axis].numel()
            left = range(several * new, several * (new + 1))  # as of C // heads
            followed = nearest_of_size(trace, step, several * old, left, gone)
            if followed is not None:
                trace.followers.add((step, axis))
                grid = grid.flatten(first, axis).movedim(first, -1)
                followed = by_heads(followed, labels[followed], several)
                pairs = [(grid.flatten(), followed.expand_as(grid).flatten())]
                trace.ties.setdefault(step, []).append([pairs, []])
                return True
    return False


def by_heads(ids: Tensor, labels: Tensor, heads: int) -> Tensor:
    """The ids such that those at the same place of each head are of one group, if they form groups of one of each."""
    _, counts = labels.unique(return_counts=True)
    if heads == 1 or not (counts == heads).all():
        return ids
    return ids[labels.argsort(stable=True)].view(-1, heads).T.flatten()


def nearest_of_size(trace: Trace, step: int, old: int, left: range, gone: Tensor) -> Tensor | None:
    """The ids along the last axis before a step that was `old` long and of which one of these numbers is left."""
    for operation in reversed(trace.operations[:step]):
        for value in operation.values:
            for ids in value.ids:
                along = core(ids).flatten().abs()
                if len(varying(ids)) == 1 and len(along) == old and old - int(gone[along].sum()) in left:
                    return along
    return None


def makers_alone(trace: Trace, step: int) -> list[Entries]:
    """What makes the first tensor that an operation is given, and nothing else: of a weight and of its bias.

    Empty where there is nothing: where anything else reads what they make, or they are not parameters.
    """
    operation, value, bias = trace.operations[step], trace.operations[step].values[0], None
    ids = value.ids
    while isinstance(value.source, tuple) and repr(value.source) not in trace.output:
        if not is_read_alone(trace, value, operation):
            break
        operation = trace.operations[value.source[0]]
        if operation.name == "native_layer_norm" and value.source[1] > 0:  # its mean or its deviation
            break
        if bias is not None and not operation.name.endswith("view"):
            return entries(trace, operation, bias, ids)
        if operation.name == "bmm":  # of queries and keys; it is the queries that are multiplied
            ids = operation.args[0].ids
        elif operation.name == "add" and is_bias(*operation.args, **operation.kwargs):
            bias = operation.args[1]
        elif operation.name not in LINEAR_MOVES:
            return entries(trace, operation, None, ids)
        value = operation.args[0]
    return []


def is_read_alone(trace: Trace, value: Value, operation: Operation) -> bool:
    """Whether this operation alone reads the value, or the part of it that it takes, and does so once."""
    others = list(trace.readers[value.source])
    others.remove(operation)
    return all(apart(taken(operation, value), taken(other, value)) for other in others)


def taken(operation: Operation, value: Value) -> tuple[int, set[int]] | None:
    """The axis of a value along which a select or slice takes some, and which; None of another operation."""
    if operation.name not in {"select", "slice"}:
        return None
    axis = (operation.bound("dim") or 0) % len(value.shape)
    places = range(value.shape[axis])
    if operation.name == "select":
        return axis, {places[operation.bound("index")]}
    return axis, set(places[slice(*map(operation.bound, ("start", "end", "step")))])


def apart(one: tuple[int, set[int]] | None, other: tuple[int, set[int]] | None) -> bool:
    """Whether two parts of one value are known not to overlap."""
    return one is not None and other is not None and one[0] == other[0] and not one[1] & other[1]


def is_bias(x: Value, other: Any, **more: Any) -> bool:  # noqa: ANN401
    """Whether what is added is a number for each place along the last axis."""
    return isinstance(other, Value) and other.shape == x.shape[-1:] and not more


def entries(trace: Trace, layer: Operation, bias: Value | None, ids: list[Tensor]) -> list[Entries]:
    """Those of the weight of a layer or norm, and of its bias, if it has one, that make the channels with these ids."""
    parts = parts_of(trace, layer, bias)
    if not parts or any(parameter_of(trace, part) is None for part, _ in parts):
        return []
    wanted = torch.cat([core(each).flatten().abs() for each in ids])  # by the ids of one of the parts
    places = torch.stack([torch.isin(along_axis(*part), wanted) for part in parts]).any(0)
    if layer.name == "native_layer_norm":  # of all heads, each of which has ids of its own
        places = torch.ones_like(places)
    found = []
    for part, axis in parts if places.any() else ():
        whole = parameter_of(trace, part)
        own = torch.isin(along_axis(whole, axis), along_axis(part, axis)[places])
        found.append((whole, axis, tuple(own.nonzero().flatten().tolist())))
    return found


def parts_of(trace: Trace, layer: Operation, bias: Value | None) -> list[tuple[Value, int]]:
    """The weight of a layer or norm, and its bias, or `bias` if it has none, each with the axis of what they make.

    Empty of another operation, and where the weight is turned once for several.
    """
    weight, own, axis = weight_of(layer, trace), None, 0
    if layer.name == "native_layer_norm":
        weight, own = layer.args[2:4]
    elif layer.name == "convolution":
        own = layer.args[2]
        weight = None if layer.args[6] else weight  # transposed
    elif weight is not None:
        own = layer.args[0] if layer.name == "addmm" else None
        axis = int(weight is layer.args[-1])  # of (C_in, C_out), not turned
        weight = weight if len(trace.readers[layer.args[-1].source]) == 1 else None
    bias = own if bias is None else bias
    if weight is None or (own is not None and bias is not own):
        return []
    if bias is None:
        return [(weight, axis)]
    return [(weight, axis), (bias, 0)] if bias.shape == weight.shape[axis : axis + 1] else []


def along_axis(value: Value, axis: int) -> Tensor:
    """The ids along an axis of a parameter, or of a part of one."""
    found = [core(ids).flatten() for ids in value.ids if varying(ids) == (axis,)]
    return found[0] if found else torch.zeros(value.shape[axis], dtype=torch.int64)


def parameter_of(trace: Trace, value: Value) -> Value | None:
    """The parameter of which this is all or a part, if nothing else reads it."""
    while len(trace.readers[value.source]) == 1:
        if isinstance(value.source, str):
            return value
        maker = trace.operations[value.source[0]]
        if maker.name not in {"split", "split_with_sizes"}:  # as MultiheadAttention takes apart its bias
            return None
        value = maker.args[0]
    return None
