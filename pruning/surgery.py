"""Taking channels out of a network for good.

A filter that goes takes much with it: its bias, its BatchNorm entries, and an input of every layer that reads it, be
it behind a pooling, a flatten, an addition or a concatenation. To find all of that, the network's graph is run once
on names instead of numbers: every element of every tensor carries the name of the channel that it belongs to.

- A convolution or a linear layer gives its outputs new names.
- Data movement (flatten, reshape, cat, chunk, ...) moves the names by the very same operation.
- An element-wise operation on two tensors makes the two names one; a depthwise convolution passes its inputs' on.
- The network's output is pinned, and so is whatever an operation touches that is unknown here: it never goes.

Then a channel goes everywhere its name stands, or nowhere. The network that is left is run on names once more, and
what would arrive anywhere in another place than before is put back: never wrong, at worst less pruned.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

PINNED = 0  # the name of all that stays

CONVOLUTION, BATCH_NORM = nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm

# What operations do to names. Spelled alike as functions, methods and modules: max_pool2d and MaxPool2d are one.
MOVEMENT = set(
    "flatten unflatten reshape view permute transpose movedim swapaxes squeeze unsqueeze contiguous identity cat "
    "concat stack chunk split getitem narrow select unbind flip channelshuffle pixelshuffle pixelunshuffle".split()
)
POOLING = {f"{kind}pool{n}d" for kind in ("max", "avg", "adaptivemax", "adaptiveavg") for n in (1, 2, 3)}
ELEMENTWISE = set(
    "add iadd sub isub mul imul div truediv neg abs clamp relu relu6 leakyrelu elu selu celu gelu silu mish hardswish "
    "hardtanh hardsigmoid sigmoid tanh softplus dropout dropout1d dropout2d dropout3d".split()
)


@dataclass(frozen=True)
class Channels:
    """Where each channel of a network stands, by name, a number from 1 to `count`; 0 is pinned.

    `filters`: the names of the outputs `(C_out,)` of each layer that makes new ones; those of one name go together.
    `slots`: the names along one axis of one tensor of a module, for each (module, tensor, axis) that has channels.
    `nodes`: the names that go into each operation of the graph, and those that come out, in order.
    `pinned`: why filters of a layer are, if any are.
    """

    count: int
    filters: dict[str, Tensor]
    slots: dict[tuple[str, str, int], Tensor]
    nodes: dict[str, tuple[Tensor, Tensor]]
    pinned: dict[str, str]


def find_channels(model: nn.Module, example: Tensor) -> Channels:
    """Name the channels of `model`; `example` is any batch `(N, C, ...)` that it accepts.

    Raises what torch.fx raises where it cannot trace the network.
    """
    naming = Naming(model)
    naming.run(example)
    naming.pin_shared_parameters()
    roots = torch.tensor([naming.root(name) for name in naming.parent])
    reasons = {layer: naming.reason(names) for layer, names in naming.filters.items()}
    return Channels(
        count=len(roots) - 1,
        filters={layer: roots[names] for layer, names in naming.filters.items()},
        slots={slot: roots[names] for slot, names in naming.slots.items()},
        nodes={node: (roots[before], roots[after]) for node, (before, after) in naming.nodes.items()},
        pinned={layer: reason for layer, reason in reasons.items() if reason},
    )


def remove_filters(model: nn.Module, example: Tensor, marked: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A narrower copy of `model`, and the filters that went: boolean `(C_out,)` per layer, True where gone.

    `marked` has the same form; a filter goes if it is marked and so is every filter of its name (those that a
    residual addition ties together), and none of them is pinned. Kept weights are bit-equal to the model's. Raises
    ValueError for a layer that the network does not have.
    """
    channels = find_channels(model, example)
    if unknown := marked.keys() - channels.filters.keys():
        raise ValueError(f"no convolution or linear layer with filters of its own: {', '.join(sorted(unknown))}")
    gone, stays = torch.zeros(2, channels.count + 1, dtype=torch.bool)
    for layer, names in channels.filters.items():
        mark = marked[layer].cpu() if layer in marked else torch.zeros(len(names), dtype=torch.bool)
        gone[names[mark]] = True
        stays[names[~mark]] = True
    narrow, gone = remove_channels(model, example, channels, gone & ~stays)
    return narrow, {layer: gone[names] for layer, names in channels.filters.items()}


def remove_channels(model: nn.Module, example: Tensor, channels: Channels, gone: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of `model` without the channels whose names are `gone`, boolean `(count + 1,)`, as far as they can go.

    Returns it with the names that went. At least one channel of each layer stays, and so does all that is pinned.
    """
    standing = torch.zeros_like(gone)
    for names in channels.filters.values():
        standing[names] = True
    standing[PINNED] = False
    gone = gone & standing
    for names in channels.slots.values():
        if gone[names].all():  # no layer works on nothing
            gone[names[0]] = False
    while True:
        narrow = without(model, channels, gone)
        misplaced = find_misplaced(narrow, example, channels, gone)
        if misplaced is None:
            return narrow, gone
        gone[misplaced] = False


def without(model: nn.Module, channels: Channels, gone: Tensor) -> nn.Module:
    """A copy of `model` whose tensors have lost the entries of every name that is gone."""
    model = copy.deepcopy(model)
    for (path, tensor, axis), names in channels.slots.items():
        module = model.get_submodule(path)
        old = getattr(module, tensor)
        kept = (~gone[names]).nonzero().squeeze(1).to(old.device)
        new = old.detach().index_select(axis, kept)
        setattr(module, tensor, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    for path in {path for path, _, _ in channels.slots}:
        adjust_sizes(model.get_submodule(path))
    return model


def adjust_sizes(module: nn.Module) -> None:
    """Bring the numbers that a layer was built with into line with its tensors."""
    if isinstance(module, BATCH_NORM):
        module.num_features = len(module.weight)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif module.groups > 1 and module.groups == module.in_channels:  # depthwise
        module.groups = module.in_channels = len(module.weight) * module.groups // module.out_channels
        module.out_channels = len(module.weight)
    elif module.groups == 1:
        sizes = module.weight.shape[:2]  # (C_out, C_in), or (C_in, C_out) where transposed
        module.in_channels, module.out_channels = sizes if module.transposed else reversed(sizes)


def find_misplaced(narrow: nn.Module, example: Tensor, channels: Channels, gone: Tensor) -> Tensor | None:
    """Names that must come back, because without them the others do not arrive where they did before.

    A slice or a reshape of fixed size does that: in the place of the channels it knew it finds others. None if all
    is well.
    """
    naming = Naming(narrow, {layer: names[~gone[names]] for layer, names in channels.filters.items()})
    try:
        naming.run(example)
    except Exception:  # an operation that cannot work on the new shapes, whatever its error
        naming.nodes[naming.at] = None
    for node, arrived in naming.nodes.items():
        before, after = channels.nodes[node]
        if arrived is None or not torch.equal(arrived[1], after[~gone[after]]):
            return before if gone[before].any() else torch.arange(channels.count + 1)
    return None


class Naming(fx.Interpreter):
    """Runs a network on numbers and, operation by operation, on the names of their channels.

    `given` are the names that layers give to their outputs; without them every layer makes new ones. Names that
    have become one form a tree in `parent`, whose root is the smallest: PINNED, if any of them is pinned.
    """

    def __init__(self, model: nn.Module, given: dict[str, Tensor] | None = None) -> None:
        super().__init__(fx.symbolic_trace(copy.deepcopy(model).eval()))
        highest = max((int(names.max()) for names in (given or {}).values()), default=PINNED)
        self.parent = list(range(highest + 1))
        self.given = given
        self.filters: dict[str, Tensor] = {}
        self.slots: dict[tuple[str, str, int], Tensor] = {}
        self.nodes: dict[str, tuple[Tensor, Tensor]] = {}
        self.reasons: dict[int, str] = {}
        self.names: dict[fx.Node, Any] = {}
        self.read_directly: list[int] = []
        self.at = ""

    @torch.no_grad()
    def run_node(self, node: fx.Node) -> Any:  # noqa: ANN401  (whatever the operation returns)
        """One operation, on numbers and on names."""
        self.at = node.name
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.names.get)
        value = super().run_node(node)
        self.names[node] = self.name_result(node, value, args, kwargs) if tensors_in(value) else value
        self.nodes[node.name] = (flat((args, kwargs)).unique(), flat(self.names[node]))
        return value

    def name_result(self, node: fx.Node, value: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
        """The names of the operation's result, in the form of the result itself."""
        module = module_at(self.module, node)
        kind = kind_of(node, module)
        if node.op == "output":
            self.pin(args, "it is the network's output")
        elif node.op == "get_attr":
            self.read_directly.append(id(value))
        elif isinstance(module, CONVOLUTION):
            return self.convolution(node.target, module, args[0], value)
        elif isinstance(module, nn.Linear):
            return self.linear(node.target, module, args[0], value)
        elif isinstance(module, BATCH_NORM) and module.affine:
            return self.batch_norm(node.target, module, args[0])
        elif kind in POOLING and isinstance(value, Tensor):
            return spread(self.per_channel(args[0], 1), 1, value)
        elif kind == "mean" and kwargs.keys() <= {"dim", "keepdim"}:
            return self.mean(*args, **kwargs)
        elif kind in ELEMENTWISE:
            return self.elementwise(node, value, args, kwargs)
        elif kind in MOVEMENT:
            return self.movement(node, args, kwargs)
        elif kind == "pad" and len(args) == 2 and kwargs.get("mode", "constant") == "constant":
            return F.pad(*args, value=PINNED)  # what is added has no channel of its own, and it stays
        else:
            self.pin((args, kwargs), f"{kind} is unknown here")
        return tree_map(lambda leaf: torch.full(leaf.shape, PINNED), value)

    def convolution(self, path: str, layer: nn.Module, names: Tensor, value: Tensor) -> Tensor:
        inputs = self.per_channel(names, 1)
        in_axis, out_axis = (0, 1) if layer.transposed else (1, 0)
        if layer.groups == 1:
            outputs = self.new_names(path, layer.out_channels)
            self.add_slot(path, "weight", in_axis, inputs)
        elif layer.groups == layer.in_channels and not layer.transposed:  # depthwise
            outputs = inputs.repeat_interleave(layer.out_channels // layer.groups)
        else:
            self.pin(inputs, "a grouped convolution reads it")
            return torch.full(value.shape, PINNED)
        self.add_slot(path, "weight", out_axis, outputs)
        self.add_slot(path, "bias", 0, outputs)
        return spread(outputs, 1, value)

    def linear(self, path: str, layer: nn.Linear, names: Tensor, value: Tensor) -> Tensor:
        outputs = self.new_names(path, layer.out_features)
        self.add_slot(path, "weight", 1, self.per_channel(names, -1))
        self.add_slot(path, "weight", 0, outputs)
        self.add_slot(path, "bias", 0, outputs)
        return spread(outputs, -1, value)

    def batch_norm(self, path: str, layer: nn.Module, names: Tensor) -> Tensor:
        channels = self.per_channel(names, 1)
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            self.add_slot(path, tensor, 0, channels)
        return names

    def movement(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
        args, kwargs = tree_map(lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        moved = getattr(self, node.op)(node.target, args, kwargs)
        if isinstance(moved, tuple | list):  # pieces of a chunk stay of one size if they lose channels together
            for piece in moved[1:]:
                if piece.shape == moved[0].shape:
                    self.unite(moved[0], piece)
        return moved

    def mean(self, names: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        lowest, highest = names.amin(*args, **kwargs), names.amax(*args, **kwargs)
        if not torch.equal(lowest, highest):
            self.pin(names, "a mean is taken across channels")
        return lowest

    def elementwise(self, node: fx.Node, value: Tensor, args: tuple, kwargs: dict) -> Tensor:
        first, *others = (names.expand_as(value) for names in tensors_in((args, kwargs)))
        for other in others:
            self.unite(first, other)
        zeros = tree_map(lambda leaf: torch.zeros(leaf.shape) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        if getattr(self, node.op)(node.target, *zeros).count_nonzero():  # NaN is not zero either
            self.pin(first, f"{node.name} makes something of nothing")
        return first

    def new_names(self, path: str, count: int) -> Tensor:
        """The names of a layer's outputs: the same again where it is used again."""
        if path not in self.filters:
            if self.given is not None:
                self.filters[path] = self.given[path]
            else:
                self.filters[path] = torch.arange(len(self.parent), len(self.parent) + count)
                self.parent.extend(self.filters[path].tolist())
        return self.filters[path]

    def add_slot(self, path: str, tensor: str, axis: int, names: Tensor) -> None:
        """Note which channels stand along an axis of a module's tensor, if it has that tensor."""
        if getattr(self.module.get_submodule(path), tensor) is not None:
            self.unite(self.slots.setdefault((path, tensor, axis), names), names)

    def per_channel(self, names: Tensor, axis: int) -> Tensor:
        """The one name `(C,)` of each index along `axis`; where there are several, they are pinned."""
        rows = names.movedim(axis, -1).flatten(end_dim=-2)  # (everything else, C)
        mixed = (rows != rows[0]).any(0)
        self.pin(rows[:, mixed], "its elements are mixed with another channel's")
        return rows[0]

    def pin_shared_parameters(self) -> None:
        """Pin what a parameter touches that several modules share, that is read directly or is computed."""
        modules = list(self.module.modules())
        owners = Counter(id(tensor) for module in modules for tensor in module._parameters.values())
        owners.update(self.read_directly)
        for (path, tensor, _), names in self.slots.items():
            module = self.module.get_submodule(path)
            is_plain = tensor in module._parameters or tensor in module._buffers
            if not is_plain or owners[id(getattr(module, tensor))] > 1:
                self.pin(names, f"{path}.{tensor} is not {path}'s alone")

    def unite(self, names: Tensor, others: Tensor) -> None:
        """Make each name one with its counterpart."""
        if torch.equal(names, others):
            return
        for pair in (names * len(self.parent) + others).unique().tolist():
            low, high = sorted(self.root(name) for name in divmod(pair, len(self.parent)))
            if low == PINNED != high:
                self.reasons[high] = "it is added to what is pinned"
            self.parent[high] = low

    def pin(self, names: Any, reason: str) -> None:  # noqa: ANN401
        """Make all these names PINNED."""
        for leaf in tensors_in(names):
            for root in {self.root(name) for name in leaf.unique().tolist()} - {PINNED}:
                self.parent[root] = PINNED
                self.reasons[root] = reason

    def root(self, name: int) -> int:
        """What a name is called by now."""
        while self.parent[name] != name:
            name = self.parent[name]
        return name

    def reason(self, names: Tensor) -> str:
        """Why these names are pinned, as far as they are."""
        found = set()
        for name in names.tolist():
            if self.root(name) == PINNED:
                while name not in self.reasons:
                    name = self.parent[name]
                found.add(self.reasons[name])
        return "; ".join(sorted(found))


def module_at(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a node of the graph calls, if it calls one."""
    return model.get_submodule(node.target) if node.op == "call_module" else None


def kind_of(node: fx.Node, module: nn.Module | None) -> str:
    """What a node of the graph does, `module` being what it calls, if it calls one: "maxpool2d" in all its forms."""
    kind = type(module).__name__ if module else getattr(node.target, "__name__", str(node.target))
    return kind.lower().replace("_", "")


def spread(names: Tensor, axis: int, value: Tensor) -> Tensor:
    """Names `(C,)` along `axis` of a tensor of the value's shape."""
    return names.view([-1 if index == axis % value.dim() else 1 for index in range(value.dim())]).expand(value.shape)


def tensors_in(tree: Any) -> list[Tensor]:  # noqa: ANN401
    """The tensors among the leaves of nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def flat(tree: Any) -> Tensor:  # noqa: ANN401
    """All the names in nested tuples, lists and dicts, one after the other."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *(leaf.flatten() for leaf in tensors_in(tree))])
