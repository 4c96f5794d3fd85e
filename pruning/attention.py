"""What attention asks of a cut: widths that are one number in its code, and a factor that is derived from one.

The queries of a transformer are as wide in all as the tokens, by `x.reshape(B, N, C)` or the like, and attention is
divided by the root of the width of a head. Both follow from sizes when the narrow network runs. So channels whose
axes the code takes to be equally long are made one, and what another factor would change is made up for by the weights
that it is multiplied with.
"""

import torch
from torch import Tensor, nn

from pruning.tracing import MOVEMENT, Operation, Shadow, Trace, Value, core, varying, weight_of


Entries = tuple[str, str, tuple[int, ...]]  # of a tensor along its first axis: the module's path, its name, places


def ties_within(dense: Shadow) -> list[tuple[Tensor, Tensor]]:
    """Ids to unite: each nn.MultiheadAttention asserts that queries, keys and values are as wide as what it reads."""
    ties = []
    for path, module in dense.model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            width = module.embed_dim
            packed = (path, "in_proj_weight") in dense.births
            names = ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
            _, read = dense.births[path, names[0]]
            for name in names:
                made = dense.births[path, name][0]
                made = torch.arange(made, made + getattr(module, name).shape[0])
                ties.append((made, torch.arange(read, read + width).repeat(len(made) // width)))
    return ties


def follow_width(trace: Trace, step: int, sizes: list[int], gone: Tensor) -> bool:
    """Unite the channels along an axis of a view with those along an axis before it whose size it was given.

    `sizes`: what the view was given when the ids that are `gone` had been removed. Returns whether there were any. It
    is a choice of the trace: refuted, they are no longer one.
    """
    (value,) = trace.operations[step].results
    for axis, (old, new) in enumerate(zip(trace.operations[step].args[1], sizes, strict=True)):
        own = [ids for ids in value.ids if axis in varying(ids)]
        if old == new or not own or (step, axis) in trace.followers:
            continue
        if (followed := nearest_of_size(trace, step, old, new, gone)) is not None:
            trace.followers.add((step, axis))
            grid = core(own[0]).movedim(axis, -1)
            pair = (grid.flatten().abs(), followed.expand_as(grid).flatten())
            trace.ties.setdefault(step, []).append([[pair], []])
            return True
    return False


def nearest_of_size(trace: Trace, step: int, old: int, new: int, gone: Tensor) -> Tensor | None:
    """The ids along the last axis before a step that was `old` long and now is `new`."""
    for operation in reversed(trace.operations[:step]):
        for value in operation.values:
            for ids in value.ids:
                along = core(ids).flatten().abs()
                if len(varying(ids)) == 1 and len(along) == old and old - int(gone[along].sum()) == new:
                    return along
    return None


def makers_alone(trace: Trace, step: int) -> list[Entries]:
    """The entries of a weight and its bias that make the first tensor that an operation is given, and nothing else.

    Empty where there are none: where anything else reads what they make, or they are no parameters.
    """
    readers = trace.readers
    operation, value, biases = trace.operations[step], trace.operations[step].values[0], []
    ids = value.ids
    while isinstance(value.source, tuple) and repr(value.source) not in trace.output:
        if not all(reader is operation or apart(operation, reader) for reader in readers[value.source]):
            break
        operation = trace.operations[value.source[0]]
        if operation.name == "bmm":  # of queries and keys; it is the queries that are multiplied
            ids = operation.args[0].ids
        elif operation.name == "add" and isinstance(operation.args[1], Value) and not operation.kwargs:
            biases.append(operation.args[1])
        elif operation.name not in MOVEMENT:
            return entries(trace, operation, biases, ids)
        value = operation.args[0]
    return []


def apart(operation: Operation, other: Operation) -> bool:
    """Whether two operations take different parts of one tensor."""
    if operation.name != other.name or operation.args[1:2] != other.args[1:2]:
        return False
    if operation.name == "select":
        return operation.args[2] != other.args[2]
    return operation.name == "slice" and (operation.args[3] <= other.args[2] or other.args[3] <= operation.args[2])


def entries(trace: Trace, layer: Operation, biases: list[Value], ids: list[Tensor]) -> list[Entries]:
    """The entries of the weight of a layer, and of its biases, that make the channels with these ids."""
    weight, readers = weight_of(layer, trace), trace.readers
    if weight is None or (layer.name == "convolution" and layer.args[6]):  # transposed
        return []
    bias = layer.args[2] if layer.name == "convolution" else layer.args[0] if layer.name == "addmm" else None
    parameters = [weight, *biases] if bias is None else [weight, *biases, bias]
    if not all(isinstance(each.source, str) and len(readers[each.source]) == 1 for each in parameters):
        return []
    wanted = torch.cat([core(each).flatten().abs() for each in ids])
    made = [core(each).flatten() for value in parameters for each in value.ids if varying(each) == (0,)]
    places = torch.stack([torch.isin(each, wanted) for each in made]).any(0).nonzero().flatten().tolist()
    paths = [each.source.rpartition(".") for each in parameters]
    return [(path, name, tuple(places)) for path, _, name in paths] if places else []
