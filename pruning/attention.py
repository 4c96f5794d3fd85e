"""What attention asks of a cut: widths that are one number in its code, and a factor that is derived from one.

The queries of a transformer are as wide in all as the tokens, by `x.reshape(B, N, C)` or the like, and attention is
divided by the root of the width of a head. Both follow from sizes when the narrow network runs. So channels whose
axes the code takes to be equally long are made one, and what another factor would change is made up for by the weights
that it is multiplied with.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pruning.tracing import MOVEMENT, Operation, Shadow, Trace, Value, core, varying, weight_of


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


def follow_width(trace: Trace, step: int, sizes: list[int], gone: Tensor) -> bool:
    """Unite the channels along an axis of a view with those along an axis before it whose size it was given.

    It may be the size of several axes together, as of all heads. `sizes`: what the view was given when the ids that are
    `gone` had been removed. Returns whether there were any. It is a choice of the trace: refuted, they are not united.
    """
    dense = trace.operations[step]
    for axis, (old, new) in enumerate(zip(dense.args[1], sizes, strict=True)):
        own = [ids for ids in dense.results[0].ids if axis in varying(ids)]
        if old == new or not own or (step, axis) in trace.followers:
            continue
        grid = core(own[0]).abs()
        for first in reversed([each for each in varying(grid) if each <= axis]):
            several = grid.shape[first:axis].numel()
            left = range(several * new, several * (new + 1))  # as of C // heads
            followed = nearest_of_size(trace, step, several * old, left, gone)
            if followed is not None:
                trace.followers.add((step, axis))
                grid = grid.flatten(first, axis).movedim(first, -1)
                pairs = [(grid.flatten(), followed.expand_as(grid).flatten())]
                trace.ties.setdefault(step, []).append([pairs, []])
                return True
    return False


def nearest_of_size(trace: Trace, step: int, old: int, left: range, gone: Tensor) -> Tensor | None:
    """The ids along the last axis before a step that was `old` long and of which one of these numbers is left."""
    for operation in reversed(trace.operations[:step]):
        for value in operation.values:
            for ids in value.ids:
                along = core(ids).flatten().abs()
                if len(varying(ids)) == 1 and len(along) == old and old - int(gone[along].sum()) in left:
                    return along
    return None


def makers_alone(trace: Trace, step: int) -> list[tuple[Value, tuple[int, ...]]]:
    """What makes the first tensor that an operation is given, and nothing else: rows of a weight and of its biases.

    Empty where there are none: where anything else reads what they make, or they are not those of parameters.
    """
    operation, value, bias = trace.operations[step], trace.operations[step].values[0], None
    ids = value.ids
    while isinstance(value.source, tuple) and repr(value.source) not in trace.output:
        if not all(reader is operation or apart(operation, reader) for reader in trace.readers[value.source]):
            break
        operation = trace.operations[value.source[0]]
        if bias is not None and not operation.name.endswith("view"):
            return rows(trace, operation, bias, ids)
        if operation.name == "bmm":  # of queries and keys; it is the queries that are multiplied
            ids = operation.args[0].ids
        elif operation.name == "add" and is_bias(*operation.args, **operation.kwargs):
            bias = operation.args[1]
        elif operation.name not in MOVEMENT:
            return rows(trace, operation, None, ids)
        value = operation.args[0]
    return []


def is_bias(x: Value, other: Any, **more: Any) -> bool:  # noqa: ANN401
    """Whether what is added is a number for each place along the last axis."""
    return isinstance(other, Value) and other.shape == x.shape[-1:] and not more


def apart(operation: Operation, other: Operation) -> bool:
    """Whether two operations take different parts of one tensor."""
    if operation.name != other.name or operation.args[1:2] != other.args[1:2]:
        return False
    if operation.name == "select":
        return operation.args[2] != other.args[2]
    return operation.name == "slice" and (operation.args[3] <= other.args[2] or other.args[3] <= operation.args[2])


def rows(trace: Trace, layer: Operation, bias: Value | None, ids: list[Tensor]) -> list[tuple[Value, tuple[int, ...]]]:
    """The rows of the weight of a layer, and of its bias, if it has one, that make the channels with these ids."""
    weight = weight_of(layer, trace)
    if weight is None or (layer.name != "mm" and bias is not None):
        return []
    if layer.name == "convolution":
        bias, transposed = layer.args[2], layer.args[6]
        if transposed:
            return []
    if layer.name == "addmm":
        bias = layer.args[0]
    parts = [weight] if bias is None else [weight, bias]
    if any(len(part.shape) == 0 or part.shape[0] != weight.shape[0] for part in parts):
        return []
    wanted = torch.cat([core(each).flatten().abs() for each in ids])
    places = torch.stack([torch.isin(along_rows(part), wanted) for part in parts]).any(0)  # they go on by ids of one
    found = []
    for part in parts:
        if (whole := parameter_of(trace, part)) is None:
            return []
        own = along_rows(part)[places]
        found.append((whole, tuple(torch.isin(along_rows(whole), own).nonzero().flatten().tolist())))
    return found if places.any() else []


def along_rows(value: Value) -> Tensor:
    """The ids along the first axis of a parameter, or of a part of one."""
    found = [core(ids).flatten() for ids in value.ids if varying(ids) == (0,)]
    return found[0] if found else torch.zeros(value.shape[:1], dtype=torch.int64)


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
