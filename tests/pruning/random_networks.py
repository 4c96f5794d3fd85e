"""Random networks, written as source text so that one that fails can be read, pasted and shortened by hand."""

import re
import textwrap
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 2
Sizes = tuple[tuple[int, int], tuple[int, int]]  # (H, W) at either of the two sizes that the network is used at


class Value(NamedTuple):
    """A variable of `forward`: a map `(N, C, H, W)`, tokens `(N, H * W, C)`, or flat `(N, C)`, whose sizes are ()."""

    name: str
    kind: str
    channels: int
    sizes: Sizes | tuple[()] = ()


@dataclass
class Source:
    """A network in the making."""

    random: Random
    any_size: bool = False
    inputs: list[Value] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    result: str = ""

    def layer(self, source: str) -> str:
        """Add a layer, a buffer or a parameter; returns how `forward` reads it."""
        self.layers.append(source)
        return f"self.l{len(self.layers) - 1}"

    def add(self, expression: str, like: Value, **changes) -> Value:
        """Add one line to `forward`; its value is `like` another but for the changes."""
        value = like._replace(name=f"v{len(self.values)}", **changes)
        self.lines.append(f"{value.name} = {expression}")
        self.values.append(value)
        return value

    def like(self, value: Value, channels: bool = True) -> Value:
        """Another value of the same form, an existing one or one computed for it."""
        found = [
            other
            for other in self.values
            if other.name != value.name and other.kind == value.kind and other.sizes == value.sizes
            and (not channels or other.channels == value.channels)
        ]  # fmt: skip
        if found and self.random.random() < 0.7:
            return self.random.choice(found)
        source = self.random.choice([value, *found])
        return linear(self, source, value.channels) if value.kind != "map" else pointwise(self, source, value.channels)

    def drop_unread(self) -> None:
        """Leave out the lines that nothing depends on."""
        needed, kept = set(re.findall(r"\w+", self.result)), []
        for line in reversed(self.lines):
            name = re.match(r"\w+", line)[0]
            if name in needed or "_(" in line or "inplace" in line:
                kept.append(line)
                needed.update(re.findall(r"\w+", line))
        self.lines = kept[::-1]

    def module(self) -> nn.Module:
        """The network itself, in float32, with the same numbers every time."""
        space = {"torch": torch, "nn": nn, "F": F, "shuffle": shuffle}
        exec(self.text(), space)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return space["Net"]()

    def text(self) -> str:
        """The source of the class `Net`."""
        lines = [*self.lines, f"return {self.result}"]
        used = set(re.findall(r"self\.l\d+\b", " ".join(lines)))
        layers = [f"self.l{i} = {layer}" for i, layer in enumerate(self.layers) if f"self.l{i}" in used]
        return (
            "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            + textwrap.indent("\n".join(layers), " " * 8)
            + f"\n    def forward(self, {', '.join(value.name for value in self.inputs)}):\n"
            + textwrap.indent("\n".join(lines), " " * 8)
        )

    def example(self, size: int = 0) -> Tensor | tuple[Tensor, ...]:
        """The input in float64, or a tuple of several, at the first or at the second size."""
        generator = torch.Generator().manual_seed(size)
        shapes = [(BATCH, value.channels, *(value.sizes[size] if value.sizes else ())) for value in self.inputs]
        inputs = tuple(torch.randn(shape, generator=generator, dtype=torch.double) for shape in shapes)
        return inputs if len(inputs) > 1 else inputs[0]


def shuffle(x: Tensor, groups: int) -> Tensor:
    """ShuffleNet's."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def resized(value: Value, kernel: int, stride: int, padding: int) -> Sizes:
    return tuple(tuple((side + 2 * padding - kernel) // stride + 1 for side in size) for size in value.sizes)


def smallest(value: Value) -> int:
    return min(min(size) for size in value.sizes)


def width(net: Source) -> int:
    return net.random.choice([4, 6, 8, 12])


def pointwise(net: Source, x: Value, channels: int) -> Value:
    return net.add(f"{net.layer(f'nn.Conv2d({x.channels}, {channels}, 1)')}({x.name})", x, channels=channels)


def linear(net: Source, x: Value, channels: int | None = None) -> Value:
    channels = channels or width(net)
    layer = net.layer(f"nn.Linear({x.channels}, {channels}, bias={net.random.random() < 0.8})")
    return net.add(f"{layer}({x.name})", x, channels=channels)


def convolution(net: Source, x: Value) -> Value:
    channels, kernel = width(net), net.random.choice([1, 1, 3])
    groups = 1
    if net.random.random() < 0.2:
        groups = net.random.choice([g for g in (2, 3, 4, 6) if x.channels % g == channels % g == 0] or [1])
    stride = 2 if smallest(x) >= 6 and net.random.random() < 0.2 else 1
    padding = kernel // 2 if smallest(x) < 4 else net.random.choice([kernel // 2, 0])
    layer = net.layer(
        f"nn.Conv2d({x.channels}, {channels}, {kernel}, {stride}, {padding}, groups={groups}, "
        f"bias={net.random.random() < 0.5})"
    )
    return net.add(f"{layer}({x.name})", x, channels=channels, sizes=resized(x, kernel, stride, padding))


def depthwise(net: Source, x: Value) -> Value:
    channels = x.channels * (2 if x.channels <= 6 and net.random.random() < 0.3 else 1)
    layer = net.layer(
        f"nn.Conv2d({x.channels}, {channels}, 3, padding=1, groups={x.channels}, bias={net.random.random() < 0.5})"
    )
    return net.add(f"{layer}({x.name})", x, channels=channels)


def transposed(net: Source, x: Value) -> Value:
    if smallest(x) > 6:
        return activation(net, x)
    groups = net.random.choice([1, 1, 2, x.channels])
    channels = x.channels if groups == x.channels else width(net)
    groups = groups if channels % groups == x.channels % groups == 0 else 1
    layer = net.layer(f"nn.ConvTranspose2d({x.channels}, {channels}, 2, 2, groups={groups})")
    sizes = tuple(tuple(2 * side for side in size) for size in x.sizes)
    return net.add(f"{layer}({x.name})", x, channels=channels, sizes=sizes)


def norm(net: Source, x: Value) -> Value:
    c = x.channels
    if x.kind == "tokens":
        return net.add(f"{net.layer(f'nn.LayerNorm({c})')}({x.name})", x)
    if x.kind == "flat":
        return net.add(f"{net.layer(net.random.choice([f'nn.BatchNorm1d({c})', f'nn.LayerNorm({c})']))}({x.name})", x)
    kinds = [f"nn.BatchNorm2d({c})"] * 5
    kinds += [
        f"nn.BatchNorm2d({c}, affine=False)",
        f"nn.BatchNorm2d({c}).requires_grad_(False)",
        f"nn.GroupNorm({net.random.choice([g for g in (1, 2, 3, c) if c % g == 0])}, {c})",
        f"nn.InstanceNorm2d({c}, affine={net.random.random() < 0.5})",
    ]
    if net.random.random() < 0.15:
        return net.add(f"{net.layer(f'nn.LayerNorm({c})')}({x.name}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)", x)
    if net.random.random() < 0.05 and not net.any_size:
        return net.add(f"{net.layer(f'nn.LayerNorm([{c}, {x.sizes[0][0]}, {x.sizes[0][1]}])')}({x.name})", x)
    return net.add(f"{net.layer(net.random.choice(kinds))}({x.name})", x)


def activation(net: Source, x: Value) -> Value:
    """Some make something of nothing."""
    options = (
        "F.relu({}) F.relu({}) {}.relu() F.gelu({}) F.silu({}) F.hardswish({}) torch.tanh({}) F.leaky_relu({},0.1) "
    )
    options += "F.relu6({}) {}**2 {}.abs() -{} {}*2 {}/3 {}.clone() {}.contiguous() torch.clamp({},-1,1) F.elu({})"
    options = options.split()
    if net.random.random() < 0.1:
        options = ["torch.sigmoid({})", "{}+1", "F.softplus({})", "{}.cos()", "1-{}"]
    elif net.random.random() < 0.1 and x.kind == "map":
        options = [net.layer(f"nn.PReLU({net.random.choice([1, x.channels])})") + "({})"]
    return net.add(net.random.choice(options).format(x.name), x)


def pooling(net: Source, x: Value) -> Value:
    if smallest(x) < 4 or net.random.random() < 0.3:
        pool = net.random.choice(["max_pool2d", "avg_pool2d"])
        return net.add(f"F.{pool}({x.name}, 3, 1, 1)", x)
    if smallest(x) <= 6 and net.random.random() < 0.2:
        sizes = tuple(tuple(2 * side for side in size) for size in x.sizes)
        return net.add(f"F.interpolate({x.name}, scale_factor=2)", x, sizes=sizes)
    pool = net.random.choice(["F.max_pool2d({}, 2)", "F.avg_pool2d({}, 2)", "nn.functional.max_pool2d({}, 2)"])
    return net.add(pool.format(x.name), x, sizes=resized(x, 2, 2, 0))


def binary(net: Source, x: Value) -> Value:
    other = net.like(x)
    return net.add(f"{x.name} {net.random.choice('+++-*')} {other.name}", x)


def residual(net: Source, x: Value) -> Value:
    """A block around which a shortcut goes."""
    y = x
    for _ in range(net.random.randint(1, 2)):
        y = activation(net, norm(net, y)) if net.random.random() < 0.5 else norm(net, y)
        y = pointwise(net, y, x.channels) if x.kind == "map" else linear(net, y, x.channels)
    return net.add(f"{x.name} + {y.name}", x)


def concatenation(net: Source, x: Value) -> Value:
    others = [net.like(x, channels=False) for _ in range(net.random.randint(1, 2))]
    parts = [x, *others]
    if sum(part.channels for part in parts) > 32:
        return x
    names = ", ".join(part.name for part in parts)
    channels = sum(part.channels for part in parts)
    return net.add(f"torch.cat([{names}], {-1 if x.kind == 'tokens' else 1})", x, channels=channels)


def pieces(net: Source, x: Value) -> Value:
    """Chunks, splits and slices along the channels."""
    c, axis = x.channels, -1 if x.kind == "tokens" else 1
    start = ":, :, " if x.kind == "tokens" else ":, "
    if c < 4 or c % 2:
        return x
    kind = net.random.randrange(8)
    if kind == 7:  # by sizes that the network holds
        part = net.random.randrange(1, c)
        sizes = net.layer(f"[{part}, {c - part}]")
        return net.add(f"torch.cat({x.name}.split({sizes}, {axis})[::-1], {axis})", x)
    if kind <= 1:
        cut = net.random.choice(["{}.chunk(2, {})", "torch.split({}, {}.shape[{}] // 2, {})"])
        both = cut.format(x.name, axis) if "chunk" in cut else cut.format(x.name, x.name, axis, axis)
        pair = net.add(both, x)
        net.values.pop()
        first = net.add(f"{pair.name}[0]", x, channels=c // 2)
        net.lines[-2] = f"pair{first.name} = {both}"
        net.lines[-1] = f"{first.name} = pair{first.name}[0]"
        second = net.add(f"pair{first.name}[1]", x, channels=c // 2)
        return net.random.choice([first, second, net.add(f"{first.name} * {second.name}", first)])
    if kind == 2:
        low = net.random.randrange(c // 2)
        high = net.random.randint(low + 2, c)
        return net.add(f"{x.name}[{start}{low}:{high}]", x, channels=high - low)
    if kind == 3:
        return net.add(f"{x.name}[{start}::2]", x, channels=c // 2)
    if kind == 4:
        other = net.add(f"{x.name}[{start}{c // 2}:]", x, channels=c // 2)
        rest = net.add(f"{x.name}[{start}:{c // 2}]", x, channels=c // 2)
        return net.add(f"torch.cat([{other.name}, {rest.name}], {axis})", x)
    index = net.random.sample(range(c), net.random.choice([c, c // 2]))
    buffer = net.layer(f"nn.Buffer(torch.tensor({index}))")
    read = net.random.choice([f"{x.name}[{start}{buffer}]", f"{x.name}.index_select({axis}, {buffer})"])
    return net.add(read, x, channels=len(index))


def reordering(net: Source, x: Value) -> Value:
    c, n = x.channels, x.name
    options = [
        f"torch.flip({n}, [1])", f"{n}.roll(1, 1)", f"shuffle({n}, 2)", f"{n}.flatten(2).view_as({n})",
        f"{n}.transpose(1, 3).transpose(1, 3)", f"{n}.reshape({n}.shape[0], -1, *{n}.shape[2:])",
        f"torch.stack([{n}, {n}]).sum(0)", f"F.channel_shuffle({n}, 2)",
    ]  # fmt: skip
    return net.add(net.random.choice(options), x) if c % 2 == 0 else x


def excitation(net: Source, x: Value) -> Value:
    """Squeeze and excitation."""
    down, up = net.layer(f"nn.Conv2d({x.channels}, 4, 1)"), net.layer(f"nn.Conv2d(4, {x.channels}, 1)")
    pool = net.random.choice(["F.adaptive_avg_pool2d({}, 1)", "{}.mean((2, 3), keepdim=True)"]).format(x.name)
    gate = net.random.choice(["torch.sigmoid", "F.hardsigmoid"])
    return net.add(f"{x.name} * {gate}({up}(F.relu({down}({pool}))))", x)


def arithmetic_on_shapes(net: Source, x: Value) -> Value:
    n = x.name
    options = [f"{n} * {n}.shape[1] ** -0.5", f"{n} / {n}.size(1)", f"{n} - {n}.mean(1, keepdim=True)",
               f"{n} * ({n}.sum(1, keepdim=True) / {n}.shape[1])", f"{n} * float({n}.shape[-1])"]  # fmt: skip
    return net.add(net.random.choice(options), x)


def factor(net: Source, x: Value) -> Value:
    """A parameter of its own."""
    if net.random.random() < 0.4:
        vector, shape = net.layer(f"nn.Parameter(torch.ones({x.channels}))"), net.layer(f"({x.channels}, 1, 1)")
        parameter = f"{vector}.view({shape})"
    else:
        parameter = net.layer(f"nn.Parameter(torch.ones({x.channels}, 1, 1))")
    return net.add(f"{x.name} {net.random.choice('**+')} {parameter}", x)


def again(net: Source, x: Value) -> Value:
    """A layer that is there already, perhaps on other channels than before."""
    form = f"nn.Linear({x.channels}, " if x.kind != "map" else f"nn.Conv2d({x.channels}, "
    found = [i for i, layer in enumerate(net.layers) if layer.startswith(form) and (x.kind != "map" or ", 1)" in layer)]
    if not found:
        return x
    i = net.random.choice(found)
    return net.add(f"self.l{i}({x.name})", x, channels=int(net.layers[i].removeprefix(form).split(",")[0].strip(")")))


def in_place(net: Source, x: Value) -> Value:
    """What came before is written to; a batch is shifted as in TSM."""
    n, part = x.name, x.channels // 2
    options = ["F.relu({}, inplace=True)", "{}.mul_(2)", "{}.add_(OTHER)", "{}.clone().relu_()"]
    value = net.add(written(net, net.random.choice(options).format(n), x), x)
    if x.kind == "map" and net.random.random() < 0.4:
        value = net.add(f"torch.zeros_like({n})", x)
        net.lines.append(f"{value.name}[:, :{part}] = {n}[:, :{part}]")
    return value


def written(net: Source, expression: str, x: Value) -> str:
    """The expression with what it needs: another value, a parameter or a layer."""
    c = x.channels
    needed = {"OTHER": lambda: net.like(x).name, "PARAMETER": lambda: net.layer(f"nn.Parameter(torch.ones({c}))")}
    needed["ONE"] = lambda: net.layer(f"nn.Conv2d(1, 1, 3, padding=1, bias={net.random.random() < 0.5})")
    needed["WEIGHT_NORM"] = lambda: net.layer(f"nn.utils.parametrizations.weight_norm(nn.Conv2d({c}, 4, 1))")
    for word, make in needed.items():
        if word in expression:
            expression = expression.replace(word, make())
    return expression


def rare(net: Source, x: Value) -> Value:
    """What few networks do."""
    same = """F.normalize({}, dim=1); torch.where({} > 0, {}, torch.zeros_like({})); {}.masked_fill({} < 0, 0)
        {}.softmax(1); torch.maximum({}, OTHER); F.local_response_norm({}, 3); {}.cumsum(1); {}.sort(1)[0]
        torch.einsum('nchw,c->nchw', {}, PARAMETER); {} * torch.sigmoid(OTHER); {} * {}.amax(1, keepdim=True)
        ({}.flatten(2) @ ({}.flatten(2).mT @ {}.flatten(2)).softmax(-1)).view_as({}); {} / (1 + OTHER.abs())
        {}.gather(1, {}.argsort(1)); {}.unsqueeze(1).squeeze(1); {} ** 2 + {}; torch.stack({}.unbind(1), 1)
        {} * ({} > 0); {} * {}.argmax(1, keepdim=True); {} * F.max_pool2d({}, 3, 1, 1, return_indices=True)[1]
        {} + (OTHER > 0).mean((2, 3), keepdim=True, dtype={}.dtype); ONE({}.flatten(0, 1)[:, None]).view_as({})"""
    options = [(part.strip(), x.channels) for part in same.replace("\n", ";").split(";")] + [("WEIGHT_NORM({})", 4)]
    if x.channels <= 8:
        options += [("{}.repeat(1, 2, 1, 1)", 2 * x.channels), ("{}.repeat_interleave(2, 1)", 2 * x.channels)]
    if x.channels % 2 == 0:
        options += [("F.glu({}, 1)", x.channels // 2), ("{}.unflatten(1, (2, -1)).sum(1)", x.channels // 2)]
    expression, channels = net.random.choice(options)
    return net.add(written(net, expression.replace("{}", x.name), x), x, channels=channels)


def padding(net: Source, x: Value) -> Value:
    sizes = tuple((h + 2, w + 1) for h, w in x.sizes)
    if max(max(size) for size in sizes) > 16:
        return x
    if net.random.random() < 0.2 and x.channels <= 8:
        return net.add(f"F.pad({x.name}, (0, 0, 0, 0, 1, 2))", x, channels=x.channels + 3)
    options = ["F.pad({}, (0, 1, 1, 1))", net.layer("nn.ZeroPad2d((1, 0, 2, 0))") + "({})"]
    return net.add(net.random.choice(options).format(x.name), x, sizes=sizes)


def to_tokens(net: Source, x: Value) -> Value:
    return net.add(f"{x.name}.flatten(2).transpose(1, 2)", x, kind="tokens")


def attention(net: Source, x: Value) -> Value:
    c = x.channels
    if c % 4:
        return linear(net, x)
    heads = net.random.choice([2, c // 2])
    if net.random.random() < 0.5:
        layer = net.layer(f"nn.MultiheadAttention({c}, {heads}, batch_first=True)")
        return net.add(f"{layer}({x.name}, {x.name}, {x.name}, need_weights=False)[0]", x)
    held, followed = net.layer(f"{heads}"), f"{heads}, {x.name}.shape[-1] // {heads}"
    sizes = net.random.choice([f"{heads}, {c // heads}", f"-1, {c // heads}", f"{held}, {c // heads}", followed])
    whole = f"reshape({x.name}.shape)" if sizes == followed else "flatten(2)"
    layers = [net.layer(f"nn.Linear({c}, {c})") for _ in range(3)]
    q, k, v = (f"{layer}({x.name}).unflatten(-1, ({sizes})).transpose(1, 2)" for layer in layers)
    if net.random.random() < 0.3:
        q = f"F.normalize({q}, dim=-1)"
    mixed = net.add(f"F.scaled_dot_product_attention({q}, {k}, {v}).transpose(1, 2).{whole}", x)
    return linear(net, mixed, c)


def to_flat(net: Source, x: Value) -> Value:
    if x.kind == "tokens":
        return net.add(f"{x.name}.mean(1)", x, kind="flat", sizes=())
    pool = net.random.choice(["{}.mean((2, 3))", "F.adaptive_avg_pool2d({}, 1).flatten(1)", "{}.amax((2, 3))"])
    area = x.sizes[0][0] * x.sizes[0][1]
    if not net.any_size and x.channels * area <= 400 and net.random.random() < 0.5:
        n = x.name
        options = [f"{n}.flatten(1)", f"{n}.contiguous().view({n}.size(0), -1)"]
        options += [f"{n}.reshape(-1, int({n}.nelement() / {n}.shape[0]))"]
        flatten = net.random.choice(options)
        return net.add(flatten, x, kind="flat", channels=x.channels * area, sizes=())
    return net.add(pool.format(x.name), x, kind="flat", sizes=())


def to_map(net: Source, x: Value) -> Value:
    if x.channels % 4 or x.channels > 48:
        return activation(net, x)
    channels, sizes = x.channels // 4, ((2, 2), (2, 2))
    options = [net.layer(f"nn.Unflatten(1, ({channels}, 2, 2))") + "({0})", "{0}.view(len({0}), -1, 2, 2)"]
    return net.add(net.random.choice(options).format(x.name), x, kind="map", channels=channels, sizes=sizes)


ON_MAPS = [convolution] * 6 + [depthwise] * 2 + [norm] * 5 + [activation] * 4 + [pooling] * 2 + [binary] * 3
ON_MAPS += [residual] * 3 + [concatenation] * 2 + [pieces] * 2 + [reordering, excitation, arithmetic_on_shapes, factor]
ON_MAPS += [transposed, padding, to_tokens, to_flat, again, again, in_place, rare, rare]
ON_TOKENS = [linear] * 3 + [norm] * 3 + [activation] * 2 + [attention] * 3 + [residual] * 2
ON_TOKENS += [binary, pieces, to_flat, again, in_place]
ON_FLAT = [linear] * 4 + [norm, activation, activation, binary, residual, concatenation, again, in_place, to_map]


def random_network(random: Random, steps: int = 12, any_size: bool = False) -> Source:
    """A network of about so many operations; of any size: one without flatten, usable at both image sizes."""
    net = Source(random, any_size)
    sizes = ((random.randint(6, 8), random.randint(6, 8)), (random.randint(9, 12), random.randint(9, 12)))
    net.inputs = [Value("v0", "map", 3, sizes)]
    if random.random() < 0.15:
        net.inputs.append(Value("v1", "map", random.choice([3, 4]), sizes))
    if random.random() < 0.1:
        net.inputs.append(Value(f"v{len(net.inputs)}", "flat", 5))
    net.values = list(net.inputs)
    for value in net.inputs:
        convolution(net, value) if value.kind == "map" else linear(net, value)
    for _ in range(random.randint(2, steps)):
        # mostly one after the other, now and then from a value before
        value = net.values[-1] if random.random() < 0.75 else random.choice(net.values[len(net.inputs) :])
        random.choice({"map": ON_MAPS, "tokens": ON_TOKENS, "flat": ON_FLAT}[value.kind])(net, value)
    last = net.values[-1]
    heads = [head(net, last)]
    if random.random() < 0.2:
        heads.append(head(net, random.choice(net.values[len(net.inputs) :])))
    names = ", ".join(value.name for value in heads)
    forms = ["({},)", "[{}]", "{{'out': [{}]}}", "({}, None)", "({}, 3)"]
    net.result = names if len(heads) == 1 and random.random() < 0.8 else random.choice(forms).format(names)
    if random.random() < 0.9:
        net.drop_unread()
    return net


def head(net: Source, value: Value) -> Value:
    if value.kind == "map" and net.random.random() < 0.3:
        return pointwise(net, value, 2)
    return linear(net, value if value.kind == "flat" else to_flat(net, value), 2)
