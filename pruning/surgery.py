"""Taking channels out of a network for good.

A filter that is removed takes much with it: its bias, its BatchNorm entries, and an input of every layer that reads it.
`tracing.py` finds what hangs together; a channel is removed everywhere, or nowhere. The network that is left then runs
once more beside the first, operation by operation, on shapes alone. Where something would arrive in another place than
before, or another number is derived from a shape, the channels concerned are put back: never wrong, at worst less
pruned. Sizes that are given to view, reshape, unflatten or split are followed where they are attributes of modules, or
in a tuple or list that is one: the narrow network's modules hold the sizes that are left. `attention.py` follows widths
that code takes from other axes, and the factors that it derives from them.
"""

import math
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruning.attention import follow_width, makers_alone, ties_within
from pruning.magnitude import bare_name
from pruning.tracing import (
    ACTIVATIONS,
    FACTORIES,
    FIXED,
    MOVEMENT,
    Operation,
    Run,
    Shadow,
    Trace,
    Value,
    among,
    core,
    deep_copy,
    form,
    indexed,
    leaves,
    moved_by,
    returned,
    shadow,
    spread,
    tensors_of,
    value_of,
    varying,
    weight_of,
    without_numbers,
)

ATTEMPTS = 12
MOVES = MOVEMENT | {"index", "index_select"}
TURNS = set("permute transpose t unsqueeze squeeze alias detach lift_fresh _to_copy clone contiguous".split())
# The positions of those arguments that may be others in a narrow network, or in train mode.
MAY_DIFFER = {
    "convolution": {8},
    "native_layer_norm": {1},
    "native_group_norm": {4, 6},
    "native_batch_norm": {5, 6},
}
CONVOLUTION, BATCH_NORM = nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Channels:
    """Where each channel of a network stands, by its id, a number from 1 to `count`; 0 is fixed.

    `filters`: the ids of the outputs `(C_out,)` of each layer that makes new ones; those of one id form a group.
    `axes`: along which axis of the layer's weight they lie.
    `slots`: the ids along one axis of one tensor of a module, for each (module, tensor, axis) that has channels.
    `reasons`: why filters of a layer are fixed, if any are.
    `batch_norms`: for a layer the BatchNorm with a gamma that alone reads what it computes, at once or pooled.
    `example`: the input that they were found by, without its numbers.
    """

    count: int
    filters: dict[str, Tensor]
    axes: dict[str, int]
    slots: dict[tuple[str, str, int], Tensor]
    reasons: dict[str, list[str]]
    batch_norms: dict[str, str]
    shadow: Shadow
    traces: list[Trace]
    ids: Tensor
    example: Any


def find_channels(model: nn.Module, example: Any) -> Channels:  # noqa: ANN401
    """The channels of `model`; `example` is any input that it accepts, a tuple of several, or a dict of keywords.

    What turns out to be fixed when half of all groups are taken out on trial, is fixed. Raises ValueError where the
    network cannot be run.
    """
    dense, example = shadow(model), without_numbers(example)
    trace = trace_eval_mode(dense, example)
    channels = resolve(dense, [trace], example)
    gone = half_of(channels, 0)[channels.ids]
    with trimmed(channels, gone):
        run = compare(in_mode(dense.model, True), example, trace, gone)
    if not (run.misplaced or run.factors):  # in train mode and with half of its channels it does what it did
        return channels
    if others := trace_train_mode(dense, example, trace):
        return tried(resolve(dense, [trace, *others], example))
    return tried(channels, [run])


def tried(channels: Channels, first: list["Comparison"] | None = None) -> Channels:
    """The channels after half of them were taken out on trial; `first`: the runs of the first trial, if it was made."""
    for attempt in range(ATTEMPTS):
        gone = half_of(channels, attempt)[channels.ids]
        runs = first if first and not attempt else compare_modes(channels, gone)
        if not any(run.misplaced for run in runs):
            break
        if not (followed(channels, runs, gone, split=False) or followed(channels, runs, gone, split=True)):
            refute(find_misplaced(channels, runs, gone, attempt))
        channels = resolve(channels.shadow, channels.traces, channels.example)
    return channels


def followed(channels: Channels, runs: list["Comparison"], gone: Tensor, split: bool) -> bool:
    """Whether any width of a view was made to follow another one; `split` as for `follow_width`."""
    sizes = [(run.trace, step, sizes) for run in runs for step, sizes in run.sizes.items()]
    return any([follow_width(*each, channels.ids, gone, split) for each in sizes])  # all of them  # noqa: C419


def refute(found: list) -> None:
    """Give up the choices of the traces that put something in another place, or else what is there stays."""
    refuted: dict[int, list] = {}
    for trace, step, ids, reason in found:
        choices = [choices for choices in trace.ties.get(step, []) if len(choices) > 1] or trace.choices_of(ids)
        refuted |= {id(each): each for each in choices}
        if not choices:
            trace.fixed.append((ids, reason))
    for choices in refuted.values():
        del choices[0]


def half_of(channels: Channels, seed: int) -> Tensor:
    """About half of all groups, at random.

    Two of each layer's stay where it has more: along an axis of length 1 PyTorch may leave out copies, and take another
    way than the network with half of its channels would. One at least leaves where it has several.
    """
    chosen = torch.rand(channels.count + 1, generator=torch.Generator().manual_seed(seed)) < 0.5
    for ids in channels.filters.values():
        groups = ids[ids != FIXED].unique()
        if len(groups) > 2 and (~chosen[groups]).sum() < 2:
            chosen[groups[-2:]] = False
        if len(groups) > 1 and not chosen[groups].any():
            chosen[groups[0]] = True
    return standing(channels, chosen)


def trace_eval_mode(dense: Shadow, example: Any) -> Trace:  # noqa: ANN401
    """The operations in eval mode. Raises ValueError where the network cannot be run, or returns no tensor."""
    trace = Trace(in_mode(dense.model, False), dense.count)
    try:
        output = trace.execute(dense.values, example)
    except Exception as error:
        raise ValueError(cannot_run(error)) from error
    if not any(isinstance(leaf, Tensor) for leaf in returned(output)):
        raise ValueError(f"the network returns a {type(output).__name__}, in which no tensor is found")
    trace.united.extend(ties_within(dense))
    return with_output(trace, output)


def trace_train_mode(dense: Shadow, example: Any, trace: Trace) -> list[Trace]:  # noqa: ANN401
    """The operations in train mode, if they are others than in `trace` and the network can train on the example."""
    nothing = torch.zeros(trace.count, dtype=torch.bool)
    if not compare(in_mode(dense.model, True), example, trace, nothing).misplaced:
        return []
    try:
        train = Trace(dense.model, trace.count)
        return [with_output(train, train.execute(dense.values, example))]
    except Exception as error:
        warnings.warn(f"in train mode, which is left out, {cannot_run(error)}", stacklevel=2)
        return []


def in_mode(model: nn.Module, train: bool) -> nn.Module:
    """The model in train or eval mode; dropout, which moves nothing, is left out."""
    for module in model.train(train).modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ in {
            "StochasticDepth",
            "DropPath",
        }:
            module.eval()
    return model


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode; every module comes back in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def with_output(trace: Trace, output: Any) -> Trace:  # noqa: ANN401
    """The trace of a run that has ended with this output, which stays as it is."""
    trace.output = described(output)
    tensors = [leaf for leaf in returned(output) if isinstance(leaf, Tensor)]
    trace.fix([ids for tensor in tensors for ids in value_of(tensor).ids], "is the network's output")
    return trace


def cannot_run(error: Exception) -> str:
    """One line that says where the network stopped: the innermost line of a module's own code."""
    frames = list(traceback.walk_tb(error.__traceback__))
    own = [each for each in frames if isinstance(each[0].f_locals.get("self"), nn.Module)] or frames
    frame, line = own[-1]
    what = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"the network cannot be followed beyond {frame.f_code.co_filename}:{line}, which runs without numbers here, "
        f"on tensors of the meta device: {what}"
    )


def described(output: Any) -> list[str]:  # noqa: ANN401
    """What an output holds: where each tensor came from, and all that is no tensor or has numbers."""
    found = []
    for leaf in returned(output):
        if isinstance(leaf, Tensor) and leaf.is_meta:
            leaf = value_of(leaf).source
        found.append(repr(leaf.tolist() if hasattr(leaf, "tolist") else leaf))
    return found


def resolve(dense: Shadow, traces: list[Trace], example: Any) -> Channels:  # noqa: ANN401
    """Make one what was united, and 0 what is fixed."""
    labels = components(traces[-1].count, [pair for trace in traces for pair in united(trace)])
    reasons, why = ["is tied to what is fixed"], torch.full((len(labels),), -1)
    why[labels[FIXED]] = 0
    slid_over = [(torch.cat(trace.slid_over), "is slid over by a convolution") for trace in traces if trace.slid_over]
    made = {int(each[0].abs()) for trace in traces for each in trace.made if len(each)}
    for ids, reason in slid_over + made_twice(dense, made) + [fixed for trace in traces for fixed in trace.fixed]:
        why[labels[ids[why[labels[ids]] < 0]]] = len(reasons)
        reasons.append(reason)
    fixed = why >= 0
    is_root = (labels == torch.arange(len(labels))) & ~fixed
    ids = torch.where(fixed[labels], FIXED, is_root.cumsum(0)[labels])
    slots, filters, axes, told = {}, {}, {}, {}
    for (path, name), starts in dense.births.items():
        module = dense.modules[path]
        for axis, (start, size) in enumerate(zip(starts, getattr(module, name).shape, strict=True)):
            if axis < 2 or ids[start : start + size].any():
                slots[path, name, axis] = ids[start : start + size]
            own = name == "weight" or (name == "weight_mask" and is_masked(module, "weight"))
            layer = path if own else f"{path}.{name}".lstrip(".")
            if start in made and layer not in filters:
                axes[layer] = axis
                copies = module.groups if getattr(module, "transposed", False) and name == "weight" else 1
                filters[layer] = ids[start : start + size].repeat(copies)
                told[layer] = []
                if not filters[layer].all():
                    found = why[labels[start : start + size]].unique().tolist()
                    told[layer] = [reasons[each] for each in found if each >= 0]
    for path, module in dense.modules.items():
        if isinstance(module, CONVOLUTION | nn.Linear) and path not in filters:
            count = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            computed = (path, "weight") not in dense.births and not is_masked(module, "weight")
            if computed or count == 1:
                filters[path] = torch.full((count,), FIXED)
                axes[path] = 1 if getattr(module, "transposed", False) else 0
                told[path] = ["is of a weight that is computed" if computed else "is its layer's only one"]
    return Channels(int(is_root.sum()), filters, axes, slots, told, batch_norms(traces[0]), dense, traces, ids, example)


def made_twice(dense: Shadow, made: set[int]) -> list[tuple[Tensor, str]]:
    """The ids along the second axis of a weight that makes channels along both, as of an autoencoder whose decoder is
    its transposed encoder: a mark of a filter means one along the first.
    """
    found, reason = [], "is made by a weight that makes others along another axis"
    for (path, name), starts in dense.births.items():
        shape = getattr(dense.modules[path], name).shape
        axes = [torch.arange(start, start + size) for start, size in zip(starts, shape, strict=True) if start in made]
        found += [(ids, reason) for ids in axes[1:]]
    return found


def united(trace: Trace) -> list[tuple[Tensor, Tensor]]:
    """All pairs of ids that are one."""
    chosen = [choices[0] for several in trace.ties.values() for choices in several]
    return trace.united + [pair for pairs in chosen for pair in pairs]


def batch_norms(trace: Trace) -> dict[str, str]:
    """The BatchNorm with a gamma that alone reads what a layer computes, at once or behind poolings."""
    readers, found = trace.readers, {}
    for operation in trace.operations:
        weight = weight_of(operation, trace)
        if weight is None or len(readers[weight.source]) > 1:
            continue
        reader = operation
        while len(readers.get(reader.results[0].source, [])) == 1:
            (reader,) = readers[reader.results[0].source]
            if reader.name.endswith("batch_norm") and reader.args[1] is not None:
                found[layer_of(weight)] = layer_of(reader.args[1])
            if not is_pooling(reader):
                break
    return {conv: norm for conv, norm in found.items() if conv and norm}


def is_pooling(operation: Operation) -> bool:
    """Whether the operation pools; a pooling to one place is a mean over all others."""
    return "_pool" in operation.name or (operation.name == "mean" and operation.bound("keepdim") is True)


def layer_of(value: Value) -> str | None:
    """The path of the module whose weight this is, if it is one."""
    path, _, name = value.source.rpartition(".") if isinstance(value.source, str) else (None, None, None)
    return path if name == "weight" else None


def components(count: int, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The smallest id that each of the ids below `count` is one with, by way of these pairs."""
    labels = torch.arange(count)
    if not pairs:
        return labels
    one, other = (torch.cat(side) for side in zip(*pairs, strict=True))
    while True:
        one, other = labels[one], labels[other]
        apart = one != other
        if not apart.any():
            return labels
        one, other = one[apart], other[apart]
        low, high = torch.minimum(one, other), torch.maximum(one, other)
        labels.scatter_reduce_(0, high, low, "amin")
        while not torch.equal(shorter := labels[labels], labels):
            labels = shorter


def standing(channels: Channels, chosen: Tensor) -> Tensor:
    """Those of the chosen ids that filters have, without those that would leave a layer nothing."""
    removed = torch.zeros_like(chosen)
    for ids in channels.filters.values():
        removed[ids] = chosen[ids]
    removed[FIXED] = False
    for ids in channels.slots.values():
        if removed[ids].all() and len(ids):
            removed[ids[0]] = False
    return removed


def remove_filters(model: nn.Module, example: Any, marked: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:  # noqa: ANN401
    """A narrower copy of `model`, and the filters that were removed: boolean `(C_out,)` per layer.

    `example` is any input, as `find_channels` takes it, or what that found in this model, which saves finding it again.
    `marked` has the same form, or lists, or numbers 0 and 1; a filter is removed if it is marked and so is every filter
    of its group, and it is not fixed. The narrow network computes what the model does with the removed channels masked:
    their weights, gamma and beta, statistics and other buffers are zero. Kept weights are bit-equal to the model's, but
    for those of queries and keys whose heads are narrower: they make up for the root of that width, by which attention
    is divided. Raises ValueError for a layer that the network does not have, marks that do not fit it, and
    channels of another network.
    """
    channels = channels_of(model, example)
    narrow, removed = remove_channels(model, channels, groups_marked(channels, marked))
    return narrow, {layer: removed[ids] for layer, ids in channels.filters.items()}


def channels_of(model: nn.Module, example: Any) -> Channels:  # noqa: ANN401
    """The channels of `model`; `example` may be what was found before. Raises ValueError for another network's."""
    if not isinstance(example, Channels):
        return find_channels(model, example)
    for path, name, tensor in tensors_of(model):
        known = getattr(example.shadow.modules.get(path), name, None)
        if known is None or known.shape != tensor.shape:
            raise ValueError(f"the channels were found in another network, in which {path}.{name} has another shape")
    return example


def groups_marked(channels: Channels, marked: dict[str, Any]) -> Tensor:
    """The ids all of whose filters are marked, boolean `(count + 1,)`."""
    if unknown := marked.keys() - channels.filters.keys():
        raise ValueError(f"no convolution or linear layer with filters of its own: {', '.join(sorted(unknown))}")
    removed, stays = torch.zeros(2, channels.count + 1, dtype=torch.bool)
    for layer, ids in channels.filters.items():
        mark = torch.as_tensor(marked.get(layer, [False] * len(ids))).cpu()
        if mark.shape != ids.shape:
            raise ValueError(f"{layer} has {len(ids)} filters, but marks of shape {tuple(mark.shape)}")
        removed[ids[mark != 0]] = True
        stays[ids[mark == 0]] = True
    return removed & ~stays


def explain(model: nn.Module, example: Any) -> str:  # noqa: ANN401
    """A table of all layers that make channels: which can lose filters, with whom, and why others cannot.

    For each layer how many filters it has, in how many groups they can be removed, how many are fixed, another layer
    that loses filters with it, if any does, and the reasons.
    """
    channels = find_channels(model, example)
    owners: dict[int, list[str]] = {}
    for layer, ids in channels.filters.items():
        for group in ids.unique().tolist():
            owners.setdefault(group, []).append(layer)
    rows = [("layer", "filters", "groups", "fixed", "together with", "fixed because it")]
    for layer, ids in channels.filters.items():
        groups = [group for group in ids.unique().tolist() if group != FIXED]
        others = list(dict.fromkeys(other for group in groups for other in owners[group] if other != layer))
        tied = others[0] + (f" and {len(others) - 1} more" if len(others) > 1 else "") if others else ""
        fixed = int((ids == FIXED).sum())
        rows.append((layer, str(len(ids)), str(len(groups)), str(fixed), tied, "; ".join(channels.reasons[layer])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def remove_channels(model: nn.Module, channels: Channels, removed: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of `model` without the channels whose ids are `removed`, boolean `(count + 1,)`, as far as possible.

    Returns it with the ids that were removed. At least one channel of each layer stays, and so does all that is fixed.
    """
    removed = standing(channels, removed)
    for attempt in range(ATTEMPTS):
        gone = removed[channels.ids]
        runs = compare_modes(channels, gone) if removed.any() else []
        if not any(run.misplaced for run in runs):
            return narrowed(model, channels, gone, runs), removed
        for _, _, ids, _ in find_misplaced(channels, runs, gone, attempt):
            removed[channels.ids[ids]] = False
    removed[:] = False
    return narrowed(model, channels, removed[channels.ids], []), removed


def narrowed(model: nn.Module, channels: Channels, gone: Tensor, runs: list["Comparison"]) -> nn.Module:
    """A copy of the model whose tensors lack the entries that are gone, boolean by the ids of birth.

    `runs`: the comparisons of the narrow network with the dense one, which know by what its weights are multiplied.
    """
    narrow, changed, births = {}, [], channels.shadow.births
    holds = [(path, vars(module)["_hold"]) for path, module in model.named_modules() if "_hold" in vars(module)]
    masks = [
        (bare_name(f"{path}.{name}".lstrip(".")), mask)
        for path, hold in holds
        for masks in hold.masks
        for name, mask in masks.items()
    ]
    for path, name, tensor in tensors_of(model):
        if kept := (path, name) in births and places_left(tensor, births[path, name], gone):
            changed.append(path)
            if id(tensor) not in narrow:
                narrow[id(tensor)] = selected(multiplied(tensor, path, name, runs), kept)
            own = bare_name(f"{path}.{name}".lstrip("."))
            narrow.update((id(mask), selected(mask, kept)) for name, mask in masks if name == own)
    model = deep_copy(model, narrow)
    modules = dict(model.named_modules())
    for path in dict.fromkeys(changed):
        adjust_sizes(modules[path])
    for (path, name), sizes in sizes_left(channels, gone).items():
        vars(modules[path])[name] = sizes
    return model


def multiplied(tensor: Tensor, path: str, name: str, runs: list["Comparison"]) -> Tensor:
    """The tensor, or a copy whose entries make up for factors that are others in the narrow network."""
    for (source, axis, places), factor in runs[0].factors.items() if runs else ():
        if source == f"{path}.{name}":
            new = tensor.detach().clone()
            new.movedim(axis, 0)[list(places)] *= factor
            tensor = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return tensor


def sizes_left(channels: Channels, gone: Tensor) -> dict[tuple[str, str], Any]:
    """What attributes of modules, by path and name, hold that were sizes of axes which lose channels.

    A number stays as it is where it would have to become two.
    """
    uses: dict[tuple, set[int]] = {}
    for trace in channels.traces:
        narrow = Comparison(channels.shadow.model, trace, gone)
        for at, value, axis in trace.sizes:
            uses.setdefault(at, set()).add(narrow.shape(value)[axis])
    left: dict[tuple[str, str], Any] = {}
    for (path, name, place), sizes in uses.items():
        whole = vars(channels.shadow.modules[path])[name]
        if len(sizes) == 1 and sizes != {whole if place is None else whole[place]}:
            (size,) = sizes
            now = left.get((path, name), whole)
            left[path, name] = size if place is None else type(whole)([*now[:place], size, *now[place + 1 :]])
    return {at: type(held)(map(int, held)) if isinstance(held, list | tuple) else held for at, held in left.items()}


def selected(tensor: Tensor, kept: dict[int, Tensor]) -> Tensor:
    """The entries of a tensor at these places of its axes."""
    if tensor.is_meta:
        shape = torch.Size([len(kept[axis]) if axis in kept else size for axis, size in enumerate(tensor.shape)])
        new = torch.empty(shape, dtype=tensor.dtype, device="meta")
    else:
        new = tensor.detach()
        for axis, places in kept.items():
            new = new.index_select(axis, places.to(tensor.device))
    new = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    if tensor.is_meta:
        new._value = Value(new.shape, source=value_of(tensor).source)
    return new


def is_masked(module: nn.Module, name: str) -> bool:
    """Whether torch.nn.utils.prune computes this tensor of the module from an original and a mask."""
    return f"{name}_orig" in module._parameters and f"{name}_mask" in module._buffers


def adjust_sizes(module: nn.Module) -> None:
    """Bring the numbers that a layer was built with into line with its tensors."""
    for name in ("weight", "bias"):
        if is_masked(module, name):  # as torch.nn.utils.prune does before each run
            whole, mask = getattr(module, f"{name}_orig"), getattr(module, f"{name}_mask")
            setattr(module, name, whole.detach() * mask)
    weight = getattr(module, "weight", None)
    if weight is None and isinstance(module, CONVOLUTION | nn.Linear):
        return  # it is computed before each run
    if isinstance(module, CONVOLUTION):
        ins, outs = weight.shape[:2] if module.transposed else reversed(weight.shape[:2])
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise
            multiple = module.out_channels // module.groups
            module.groups = ins if module.transposed else outs // multiple
        module.in_channels = ins if module.transposed else ins * module.groups
        module.out_channels = outs * module.groups if module.transposed else outs
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(weight if weight is not None else module.running_mean)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = len(weight) if module.num_groups == module.num_channels else module.num_groups
        module.num_channels = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.MultiheadAttention):
        apart = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        ways = apart if module.in_proj_weight is None else [module.in_proj_weight] * 3
        module.embed_dim, module.kdim, module.vdim = (way.shape[1] for way in ways)
        module.head_dim = module.embed_dim // module.num_heads
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape


def compare_modes(channels: Channels, gone: Tensor) -> list["Comparison"]:
    """The network without the ids of birth that are `gone` beside each trace of the dense one."""
    with trimmed(channels, gone):
        model, runs = channels.shadow.model, []
        for mode, trace in enumerate(channels.traces):
            runs.append(compare(in_mode(model, bool(mode)), channels.example, trace, gone))
            if runs[-1].factors != runs[0].factors:
                runs[-1].wrong("is multiplied otherwise in train mode")
    return runs


def find_misplaced(channels: Channels, runs: list["Comparison"], gone: Tensor, attempt: int) -> list:
    """The steps of each trace at which something is misplaced, the ids that are to blame, and why."""
    found = []
    for run in runs:
        for step, reason in run.misplaced:
            found.append((run.trace, step, concerned(run.trace, step, gone, attempt), reason))
        if run.stopped is not None:
            kind = type(run.stopped)
            ids = ids_of(channels.shadow, kind)
            found.append((run.trace, -1, ids, f"belongs to a {kind.__name__}, which checks its sizes"))
    return found


def ids_of(dense: Shadow, kind: type) -> Tensor:
    """The ids of all tensors that modules of one kind have themselves."""
    ids = [torch.zeros(1, dtype=torch.int64)]
    for path, name, tensor in tensors_of(dense.model):
        if tensor.is_meta and type(dense.modules[path]) is kind:
            for start, size in zip(dense.births[path, name], tensor.shape, strict=True):
                ids.append(torch.arange(start, start + size))
    return torch.cat(ids)


def compare(model: nn.Module, example: Any, trace: Trace, gone: Tensor) -> "Comparison":  # noqa: ANN401
    """Run a model beside a trace of it, or of what it was before ids were removed, boolean by the ids of birth."""
    comparison = Comparison(model, trace, gone)
    try:
        output = comparison.execute([], example)
        if described(output) != trace.output or comparison.step < len(trace.operations) - 1:
            comparison.wrong("is behind an output that is another then")
    except Exception as error:  # whatever its code raises on the new shapes
        comparison.wrong(f"is needed: {type(error).__name__}: {error}")
        modules = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        comparison.stopped = [module for module in modules if isinstance(module, nn.Module)][-1]
    return comparison


@contextmanager
def trimmed(channels: Channels, gone: Tensor) -> Iterator[None]:
    """Within, the shadow lacks the entries that are gone."""
    dense, before, new = channels.shadow, {}, {}

    def remember(path: str) -> nn.Module:
        module = dense.modules[path]
        if path not in before:
            before[path] = (module, dict(vars(module)), dict(module._parameters), dict(module._buffers))
        return module

    for path, name, tensor in tensors_of(dense.model):
        if tensor.is_meta and (kept := places_left(tensor, dense.births[path, name], gone)):
            module = remember(path)
            new.setdefault(id(tensor), selected(tensor, kept))
            (module._parameters if name in module._parameters else module._buffers)[name] = new[id(tensor)]
    for module, *_ in before.values():
        adjust_sizes(module)
    for (path, name), sizes in sizes_left(channels, gone).items():
        vars(remember(path))[name] = sizes
    try:
        yield
    finally:
        for module, attributes, parameters, buffers in before.values():
            vars(module).update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def places_left(tensor: Tensor, births: list[int], gone: Tensor) -> dict[int, Tensor]:
    """The places that are left along those axes of a tensor that lose any; `births` are the first ids of its axes."""
    left = {}
    for axis, (start, size) in enumerate(zip(births, tensor.shape, strict=True)):
        lost = gone[start : start + size]
        if lost.any():
            left[axis] = (~lost).nonzero().squeeze(1)
    return left


def concerned(trace: Trace, step: int, gone: Tensor, attempt: int) -> Tensor:
    """The ids to blame: along those axes of an operation that lose some, or of the nearest one before it that lose any.

    There the size came from that the operation does not expect. Late attempts blame ever more before it.
    """
    reach = 0 if attempt < ATTEMPTS // 2 else 4 ** (attempt - ATTEMPTS // 2)
    found = [torch.zeros(1, dtype=torch.int64)]
    for index in range(step, -1, -1):
        operation = trace.operations[index]
        axes = [core(ids).flatten().abs() for value in (*operation.values, *operation.results) for ids in value.ids]
        found += [ids for ids in axes if gone[ids].any()]
        if len(found) > 1 and step - index >= reach:
            break
    return torch.cat(found)


class Comparison(Run):
    """A run of a narrow network beside the operations of the network that it was; `removed` by the ids of birth.

    `misplaced` lists the steps after which something is not where it was, and why. A result of a wrong shape is
    replaced by one of the right shape, so that one run finds all. `sizes` are those that views were given which did
    not fit, by step, and `factors` those of entries of parameters that make up for another factor.
    """

    def __init__(self, model: nn.Module, trace: Trace, removed: Tensor) -> None:
        super().__init__(model)
        self.trace, self.operations = trace, trace.operations
        self.removed, self.any_removed = removed, bool(removed.any())
        self.misplaced: list[tuple[int, str]] = []
        self.sizes: dict[int, list[int]] = {}
        self.factors: dict[tuple[str, int, tuple[int, ...]], float] = {}
        self.stopped: nn.Module | None = None
        self.step = -1
        self.left: dict[int, list[Tensor | None] | None] = {}

    def wrong(self, reason: str) -> None:
        """Note a reason at the step that the run has come to."""
        self.misplaced.append((min(max(self.step, 0), len(self.operations) - 1), reason))

    def operate(self, operation: Operation, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
        """Compare one operation with what it was."""
        self.step += 1
        dense = self.operations[self.step] if self.step < len(self.operations) else None
        if dense is None or dense.function is not operation.function:
            raise RuntimeError("the network takes another way then")
        reason, output = self.differing(dense, operation), None
        if reason is None and follows_from_arguments(operation):
            output = self.as_expected(dense, args)
        else:
            try:
                output = operation.function(*args, **kwargs)
                operation.results = [Value(tensor.shape) for tensor in leaves(output, Tensor)]
                if [value.shape for value in operation.results] != [self.shape(value) for value in dense.results]:
                    reason = reason or "has a size that is written into the network"
                    output = None
                elif reason is None and operation.name in MOVES and not self.in_place(dense, operation):
                    reason = "arrives in another place then"
            except Exception:  # whatever it raises on the new shapes
                reason = reason or "has a size that is written into the network"
        if reason is not None:
            self.misplaced.append((self.step, f"{reason} ({operation.name} in {self.place()})"))
            if operation.name == "view":
                self.sizes[self.step] = operation.args[1]
            output = self.as_expected(dense, args) if output is None else output
        for index, tensor in enumerate(leaves(output, Tensor)):
            tensor._value = Value(tensor.shape, source=(self.step, index))
        return output

    def as_expected(self, dense: Operation, args: tuple) -> Any:  # noqa: ANN401
        """What an operation should return."""
        if form(dense.function)[1]:
            return args[0]
        results = [
            torch.empty_permuted(
                self.shape(value), value.order or tuple(range(len(value.shape))), dtype=value.dtype, device="meta"
            )
            for value in dense.results
        ]
        returns = dense.function._schema.returns
        return results[0] if len(returns) == 1 and str(returns[0].type) == "Tensor" else results

    def differing(self, dense: Operation, operation: Operation) -> str | None:
        """What of an operation's arguments is not as it was."""
        if len(dense.values) != len(operation.values):
            raise RuntimeError("the network takes another way then")
        for old, new in zip(dense.values, operation.values, strict=True):
            if old.source != new.source:
                raise RuntimeError("the network takes another way then")
            if not isinstance(old.source, str) and new.shape != self.shape(old):  # the model's own tensors were cut so
                return "has another size then"
            same = old.known is None or (new.known is not None and torch.equal(old.known, new.known))
            if not same and operation.name not in MOVES:
                return "meets numbers derived from a shape"
        if operation.name in MOVES | FACTORIES and not operation.name.endswith("full"):
            return None
        if operation.name in {"convolution", "native_group_norm"}:
            at = 8 if operation.name == "convolution" else 6
            whole, now = dense.args[at] == dense.values[0].shape[1], operation.values[0].shape[1]
            if operation.args[at] != (now if whole else dense.args[at]):
                return "has as many groups as are written into the network"
        exempt = MAY_DIFFER.get(operation.name, ())
        numbers = zip(
            (*dense.args, *dense.kwargs.values()), (*operation.args, *operation.kwargs.values()), strict=False
        )
        for at, (old, new) in enumerate(numbers):
            is_size = isinstance(old, list | tuple) and operation.name.endswith("full")
            if at in exempt or is_size or among((old,), {}, Value):
                continue
            if old != new and not self.makes_up_for(operation.name, old, new):
                return f"meets a number derived from a shape, {old} and then {new}"
        return None

    def makes_up_for(self, name: str, old: Any, new: Any) -> bool:  # noqa: ANN401
        """Whether weights can make up for another factor, the root of a width; notes what multiplies which."""
        if name not in {"mul", "div"} or not (isinstance(old, float | int) and old and new):
            return False
        makers = makers_alone(self.trace, self.step)
        factor = old / new if name == "mul" else new / old
        left = 1.0
        if makers:
            weight, axis, _ = makers[0]
            left = self.shape(weight)[axis] / weight.shape[axis]
        if left == 1 or not any(math.isclose(factor**power, left) for power in (1, 2, 4)):
            return False  # or it might be another factor at another size of the image
        self.factors |= {(parameter.source, axis, places): factor for parameter, axis, places in makers}
        return True

    def shape(self, value: Value) -> torch.Size:
        """The shape that is left of a value."""
        kept = self.kept(value)
        if kept is None:
            return value.shape
        return torch.Size(
            size if places is None else len(places) for size, places in zip(value.shape, kept, strict=True)
        )

    def kept(self, value: Value) -> list[Tensor | None] | None:
        """Which places are left along each axis of what was this value; None where all are."""
        if not value.ids or not self.any_removed:
            return None
        if id(value) not in self.left:
            self.left[id(value)] = self.find_kept(value)
        return self.left[id(value)]

    def find_kept(self, value: Value) -> list[Tensor | None] | None:
        """The same, found out."""
        kept: list[Tensor | None] = [None] * len(value.shape)
        for ids in value.ids:
            if id(ids) not in self.left:
                self.left[id(ids)] = places_kept(ids, self.removed)
            for axis, along in self.left[id(ids)].items():
                kept[axis] = along if kept[axis] is None else along[torch.isin(along, kept[axis])]
        return kept if any(places is not None for places in kept) else None

    def in_place(self, dense: Operation, operation: Operation) -> bool:
        """Whether a data movement puts what is left where it would be without what is removed."""
        x = dense.args[0]
        left = self.kept(x) or [None] * len(x.shape)
        same = dense.args[1:] == operation.args[1:]
        if same and (operation.name in TURNS or all(places is None for places in left)):
            return True
        kept = [self.kept(value) or [None] * len(value.shape) for value in dense.results]
        for axis, size in enumerate(x.shape):
            places = torch.arange(size)
            before = moved(dense, spread(places, axis, x.shape))
            places = places if left[axis] is None else places[left[axis]]
            after = moved(operation, spread(places, axis, operation.args[0].shape))
            for one, other, keep in zip(before, after, kept, strict=True):
                for along, still in enumerate(keep):
                    if still is not None:
                        one = (
                            one.index_select(along, still)
                            if along in varying(one)
                            else one.narrow(along, 0, len(still))
                        )
                if one.shape != other.shape or not equal(one, other):
                    return False
        return True


def follows_from_arguments(operation: Operation) -> bool:
    """Whether the shape of the result need not be found out, if that of the arguments is right."""
    name = operation.name
    if name in {"convolution", "native_batch_norm", "native_layer_norm", "native_group_norm"}:
        return True
    return name in ACTIVATIONS or (torch.Tag.pointwise in operation.function.tags) or "_pool" in name


def places_kept(ids: Tensor, removed: Tensor) -> dict[int, Tensor]:
    """Which places are left along those axes of expanded ids that lose any."""
    inner, axes, kept = core(ids), varying(ids), {}
    lost = removed[inner.abs()]
    for axis in axes if lost.any() else ():
        along = lost if len(axes) == 1 else lost.all([other for other in range(inner.dim()) if other != axis])
        if along.any():
            kept[axis] = (~along.flatten()).nonzero().squeeze(1)
    return kept


def moved(operation: Operation, ids: Tensor) -> list[Tensor]:
    """What a data movement makes of the ids of its first argument."""
    if operation.name in {"index", "index_select"}:
        indices = operation.args[1]
        if operation.name == "index_select":
            indices = [None] * (operation.args[1] % ids.dim()) + [operation.args[2]]
        return [indexed(ids, indices)]
    pieces = moved_by(operation, ids, operation.args[1:])
    return [pieces] if isinstance(pieces, Tensor) else list(pieces)


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether expanded ids of the same shape are the same, looked at where they vary."""
    both = {*varying(one), *varying(other)}
    part = tuple(slice(None) if axis in both else slice(1) for axis in range(one.dim()))
    return torch.equal(one[part], other[part])
