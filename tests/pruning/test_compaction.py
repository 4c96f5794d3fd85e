import math
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from models.mnist_cnn import MnistCNN
from pruning.compaction import compact
from pruning.magnitude import dense_masks, update_masks


def widths(model):
    return [layer.weight.shape[0] for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def assert_same_outputs(model, small, example):
    model.eval()
    small.eval()
    for batch in (example, torch.randn_like(example), 100 * torch.randn_like(example)):
        torch.testing.assert_close(small(batch), model(batch), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99, 0.995, 0.999])
@pytest.mark.parametrize("scope", ["global", "lamp"])
def test_lenet_computes_the_same_with_fewer_channels(sparsity, scope):
    torch.manual_seed(0)
    model, example = MnistCNN().double(), torch.randn(4, 1, 28, 28, dtype=torch.double)
    with torch.no_grad():
        for parameter in model.parameters():  # heavy tails, as training makes them: zeros gather in some channels
            parameter *= torch.randn(len(parameter), *[1] * (parameter.dim() - 1)).exp()
    update_masks(model, dense_masks(model), sparsity, scope)
    small = compact(model, example)
    assert_same_outputs(model, small, example)
    if sparsity == 0:
        assert widths(small) == [20, 50, 500, 10]
    if sparsity >= 0.99:
        assert sum(widths(small)) < sum(widths(model)) / 2


def test_by_hand():
    """Neuron 0 is read by nobody; neuron 1 has no input and is always relu(2) = 2, worth 2 * 5 and 2 * 0; 2 stays."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    model[0].weight.data = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]).double()
    model[0].bias.data = torch.tensor([1.0, 2.0, 3.0]).double()
    model[2].weight.data = torch.tensor([[0.0, 5.0, 6.0], [0.0, 0.0, 7.0]]).double()
    model[2].bias.data = torch.tensor([0.5, 0.25]).double()
    small = compact(model, torch.randn(3, 2).double())
    assert small[0].weight.tolist() == [[3, 4]]
    assert small[2].weight.tolist() == [[6], [7]]
    assert small[2].bias.tolist() == [10.5, 0.25]


def test_one_useless_layer_makes_the_next_useless():
    """fc2 reads only neuron 0 of fc1, which reads only channel 1 of the convolution."""
    model = MnistCNN().double()
    with torch.no_grad():
        model.fc2.weight[:, 1:] = 0
        model.fc1.weight[0] = 0
        model.fc1.weight[0, 16:32] = 1
    example = torch.randn(2, 1, 28, 28, dtype=torch.double)
    small = compact(model, example)
    assert widths(small) == [20, 1, 1, 10]
    assert_same_outputs(model, small, example)


def dead_filter(bias, padding):
    """Channel 0 of the first convolution is `bias` whatever the input; BatchNorm and ReLU come before its reader."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=padding)
    )
    model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(5, 2)).double()
    nn.init.normal_(model[1].running_mean)
    nn.init.uniform_(model[1].weight, 0.5, 2)
    model[0].weight.data[0] = 0
    model[0].bias.data[0] = model[1].running_mean[0] + bias  # after BatchNorm: bias times a positive number
    nn.init.zeros_(model[1].bias)
    return model


@pytest.mark.parametrize(
    ("bias", "padding", "left"),
    [(3.0, 0, 3), (3.0, "valid", 3), (3.0, 1, 4), (3.0, "same", 4), (-3.0, 1, 3)],
    ids=[
        "folds",
        "folds",
        "padding shows the constant's edge",
        "so does same",
        "relu makes it zero, which has no edge",
    ],
)
def test_a_constant_channel_goes_where_that_is_exact(bias, padding, left):
    model, example = dead_filter(bias, padding), torch.randn(2, 3, 8, 6, dtype=torch.double)
    small = compact(model, example)
    assert widths(small) == [left, 5, 2]
    assert_same_outputs(model, small, example)


def test_an_input_that_is_constant_by_chance_is_not_folded():
    """The output layer is all zeros, so that nothing makes a pinned channel, and the example is all zeros too."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).double()
    nn.init.zeros_(model[1].weight)
    small = compact(model, torch.zeros(1, 2).double())
    assert torch.isin(small[0].weight, model[0].weight).all()
    assert_same_outputs(model, small, torch.randn(3, 2).double())


def test_the_model_itself_is_left_as_it_was():
    model, example = dead_filter(3.0, 0).train(), torch.randn(2, 3, 8, 6, dtype=torch.double)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compact(model, example)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_constant_is_one_at_any_image_size():
    """A depthwise convolution sees the edge of the constant, of which a mean over a small image has more."""
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3),
        nn.Conv2d(2, 2, 3, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 2),
    ).double()
    nn.init.zeros_(model[0].weight[0])
    small = compact(model, torch.randn(1, 3, 8, 8).double())
    assert_same_outputs(model, small, torch.randn(2, 3, 16, 16).double())
    assert widths(small) == [2, 2, 2]


class TimesHeight(nn.Module):
    def forward(self, x):
        return x * x.shape[2]


def test_a_number_derived_from_the_size_is_no_constant():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), TimesHeight(), nn.Conv2d(2, 2, 1)).double()
    nn.init.zeros_(model[0].weight[0])
    small = compact(model, torch.randn(1, 3, 8, 8).double())
    assert_same_outputs(model, small, torch.randn(2, 3, 5, 6).double())


@pytest.mark.parametrize("shared", ["bias", "weight"])
def test_a_shared_tensor_takes_no_constant(shared):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)).double()
    nn.init.zeros_(model[0].weight[0])
    setattr(model[2], shared, getattr(model[1], shared))
    batch = torch.randn(4, 3).double()
    assert_same_outputs(model, compact(model, batch), batch)


def test_a_number_derived_from_the_size_of_a_square_is_no_constant():
    class Square(TimesHeight):
        def forward(self, x):
            assert x.shape[2] == x.shape[3]
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 2, 1), Square(), nn.Conv2d(2, 2, 1)).double()
    nn.init.zeros_(model[0].weight[0])
    small = compact(model, torch.randn(1, 3, 6, 6).double())
    assert_same_outputs(model, small, torch.randn(2, 3, 9, 9).double())


class Between(nn.Module):
    """Something between two convolutions, of one input or of two."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), function
        self.double()

    def forward(self, x, *others):
        return self.b(self.function(self.a(x), *others))


def written(y):
    """The strongest place of each image, in a table of whole numbers that is written through a view."""
    places = torch.zeros(len(y), 2, dtype=torch.long)
    places[:, 0] = y.flatten(1).argmax(1)
    return y * 0 + places[:, :1, None, None].double()


@pytest.mark.parametrize(
    ("function", "others"),
    [
        (lambda y: y * (y > 0), ()),
        (lambda y: y.mul_(y > 0), ()),
        (lambda y: y * y.argmax(1, keepdim=True), ()),
        (lambda y, mask: y * mask, (torch.zeros(2, 1, 6, 5, dtype=torch.bool),)),
        (lambda y, count: y * (count / count.amax())[:, None, None, None], (torch.tensor([2, 3]),)),
        (lambda y: (y > 0).mean((2, 3), keepdim=True, dtype=torch.double), ()),
        (written, ()),
    ],
    ids=["comparison", "in place", "argmax", "mask", "counts", "share", "written through a view"],
)
def test_whole_numbers_are_no_constants(function, others):
    model, example = Between(function), torch.randn(2, 3, 6, 5).double()
    small = compact(model, (example, *others))
    assert widths(small) == [8, 4]
    others = [torch.randint(1, 9, other.shape).to(other.dtype) for other in others]
    torch.testing.assert_close(small(10 * example, *others), model(10 * example, *others))


def test_what_a_gamma_of_zero_makes_is_constant():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    nn.init.zeros_(model[1].weight[1:3])
    nn.init.normal_(model[1].bias)
    example = torch.randn(2, 3, 6, 5).double()
    small = compact(model, example)
    assert_same_outputs(model, small, example)
    assert widths(small) == [2, 2]


class InBfloat16(nn.Sequential):
    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x):
        return super().forward(x)


def test_a_constant_is_folded_in_the_weights_own_precision():
    """Under autocast it is one of bfloat16; a parametrized bias has no place for it."""
    model = InBfloat16(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.zeros_(model[0].weight[0])
    nn.init.ones_(model[0].bias)
    assert widths(compact(model, torch.randn(2, 3))) == [3, 2]
    nn.utils.parametrize.register_parametrization(model[2], "bias", nn.Tanh())
    assert widths(compact(model, torch.randn(2, 3))) == [4, 2]


class Unread(nn.Module):
    """The first layer's neurons are read with weights of 0, but neuron 1 by something else, too."""

    def __init__(self, reader):
        super().__init__()
        self.a, self.b, self.reader = nn.Linear(3, 3), nn.Linear(3, 2), reader
        nn.init.zeros_(self.b.weight)
        self.double()

    def forward(self, x):
        x = self.a(x)
        return self.b(x) + self.reader(x)


@pytest.mark.parametrize(
    ("reader", "left"),
    [
        (lambda x: 0, 1),
        (lambda x: x[:, 1:2], 3),
        (lambda x: x.sum(1, keepdim=True), 3),
        (lambda x: x.softmax(1)[:, :1], 3),
        (lambda x: (x > 0).double().mean(1, keepdim=True), 3),
        (lambda x: float(x.detach().mean()) if not x.is_meta else 0.0, 3),
        (lambda x: x @ torch.ones(3, 1).double(), 3),
    ],
    ids=["nothing", "output", "sum", "softmax", "comparison", "python", "product"],
)
def test_what_anything_else_reads_stays(reader, left):
    model, batch = Unread(reader), torch.randn(4, 3).double()
    small = compact(model, batch)
    assert_same_outputs(model, small, batch)
    assert widths(small)[0] == left


@pytest.mark.parametrize("pruned", ["weight", "weight and bias"])
@pytest.mark.parametrize("kind", [nn.Linear, partial(nn.Conv1d, kernel_size=1)])
def test_masks_of_torch_are_read(pruned, kind):
    """The weights that torch.nn.utils.prune computes are no parameters, but are read all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 8), nn.ReLU(), kind(8, 4)).double()
    for layer in (model[0], model[2]):
        for name in pruned.split(" and "):
            prune.l1_unstructured(layer, name, 0.3)
    example = torch.randn(*[5, 3, 3][: model[0].weight.dim()], dtype=torch.double)
    assert_same_outputs(model, compact(model, example), example)


class Centred(nn.Module):
    """Subtracts a running mean that it updates in eval mode, too, and keeps its last input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.register_buffer("mean", torch.zeros(()))
        self.last = None

    def forward(self, x):
        self.mean.lerp_(x.mean(), 0.1)
        self.last = x
        return self.second(torch.relu(self.first(x - self.mean)))


def test_what_a_run_updates_is_left_as_it_was():
    torch.manual_seed(0)
    model, example = Centred().double(), torch.randn(2, 3, 4, 4, dtype=torch.double)
    nn.init.zeros_(model.second.weight[:, :3])
    small = compact(model, example)
    assert (float(small.mean), small.last, float(model.mean), model.last) == (0, None, 0, None)
    assert widths(small) == [5, 4]
    torch.testing.assert_close(small(example), model(example), rtol=1e-9, atol=1e-9)


class Equalised(nn.Conv2d):
    """Its weight is not used as it stands."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 0.1 * weight, bias)


class Called(nn.Conv2d):
    """A layer that is called with another weight."""

    def forward(self, x):
        layer = nn.Conv2d.forward
        weight, self._parameters["weight"] = self._parameters["weight"], 0.1 * self.weight
        try:
            return layer(self, x)
        finally:
            self._parameters["weight"] = weight


def tiled(layer):
    layer._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, bias)
    return layer


@pytest.mark.parametrize(
    "layer", [Equalised(8, 4, 3), Called(8, 4, 3), tiled(nn.Conv2d(8, 4, 3))], ids=["scaled", "called", "padded"]
)
def test_a_layer_that_reads_otherwise_than_it_looks(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), layer).double()
    nn.init.zeros_(model[0].weight[:3])
    nn.init.ones_(model[0].bias[:3])
    example = torch.randn(2, 3, 8, 8, dtype=torch.double)
    assert_same_outputs(model, compact(model, example), example)


OUTSIDE = nn.Linear(4, 2).double()


class Read(nn.Module):
    """Two layers, read as a function says. Of the first a neuron is always 1, and one is always 0."""

    def __init__(self, read):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.read = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 4), read
        self.t = nn.Buffer(torch.zeros(1))
        self.last = None
        self.double()
        self.a.weight.data[:2] = 0
        self.a.bias.data[:2] = torch.tensor([1.0, 0.0])

    def forward(self, x):
        return self.read(self, x)


def counted(self, x):
    self.t += 1
    return self.b(torch.cat([self.a(x)[:, :3], self.t.expand(len(x), 1)], 1))


def added_to_the_last(self, x):
    y, last = self.a(x), self.last
    self.last = x.mean()
    return self.b(y if last is None else y + last)


@pytest.mark.parametrize(
    "read",
    [
        lambda self, x: self.b(self.c(x)) + self.b(self.a(x)),
        lambda self, x: self.b(self.a(x)) + self.b(self.c(x)),
        lambda self, x: torch.addmm(self.b.bias, self.a(x), self.b.weight.t(), alpha=2),
        lambda self, x: OUTSIDE(self.a(x)),
        counted,
        added_to_the_last,
    ],
    ids=["twice", "twice, the constant first", "with a factor", "from outside", "a count", "the last input"],
)
def test_a_constant_that_cannot_be_folded(read):
    model, example, outside = Read(read), torch.randn(5, 3).double(), OUTSIDE.weight.clone()
    small = compact(model, example)
    for _ in range(3):
        torch.testing.assert_close(small(example), model(example), rtol=1e-9, atol=1e-9)
    assert torch.equal(OUTSIDE.weight, outside)


def test_a_layer_whose_neurons_something_else_reads_spares_no_other():
    model, example = (
        Read(lambda self, x: self.b(self.a(x)) + self.c(x).sum(1, keepdim=True)),
        torch.randn(5, 3).double(),
    )
    nn.init.zeros_(model.b.weight)
    small = compact(model, example)
    assert_same_outputs(model, small, example)
    assert (len(small.a.weight), len(small.c.weight)) == (1, 4)


class WrittenElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.a(x)
        twice = torch.mul(x, 2, out=torch.empty_like(x))
        return self.b(x) + twice[:, :4]


def test_what_is_written_into_a_tensor_that_was_there():
    torch.manual_seed(0)
    model, example = WrittenElsewhere().double().requires_grad_(False), torch.randn(2, 3, 8, 8, dtype=torch.double)
    assert_same_outputs(model, compact(model, example), example)


class Recurrent(nn.Module):
    """Its state is 0 at first, in a buffer, an attribute or a list, but not for long."""

    def __init__(self, kind):
        super().__init__()
        self.w, self.u, self.o, self.kind = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3), kind
        self.register_buffer("h", torch.zeros(1, 8))
        self.last, self.all = None, []

    def forward(self, x):
        state = {"buffer": self.h, "attribute": self.last, "list": self.all[-1] if self.all else None}[self.kind]
        now = torch.tanh(self.w(x) + (0 if state is None else self.u(state)))
        if self.kind == "buffer":
            self.h = now
        elif self.kind == "attribute":
            self.last = now
        else:
            self.all.append(now)
        return self.o(now)


@pytest.mark.parametrize("kind", ["buffer", "attribute", "list"])
def test_what_is_kept_for_the_next_call_is_not_constant(kind):
    torch.manual_seed(0)
    model, example = Recurrent(kind).double().requires_grad_(False), torch.randn(1, 5, dtype=torch.double)
    small = compact(model, example)
    for _ in range(3):
        torch.testing.assert_close(small(example), model(example), rtol=1e-9, atol=1e-9)


def test_one_example_without_a_batch_and_a_shuffle_of_channels():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    nn.init.zeros_(model[2].weight[:, :3])
    assert widths(compact(model, torch.randn(5).double())) == [5, 2]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ChannelShuffle(2), nn.Conv2d(8, 4, 3)).double()
    example = torch.randn(2, 3, 8, 8, dtype=torch.double)
    assert_same_outputs(model, compact(model, example), example)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)
        self.c.weight.data[:, 1] = 0
        self.a.weight.data[2] = 0
        self.b.weight.data[2] = 0
        self.double()

    def forward(self, x, y):
        return self.c(self.a(x) + self.b(y))


@pytest.mark.parametrize("as_dict", [False, True])
def test_several_inputs(as_dict):
    model, x, y = TwoInputs(), torch.randn(5, 3).double(), torch.randn(5, 2).double()
    small = compact(model, {"x": x, "y": y} if as_dict else (x, y))
    torch.testing.assert_close(small(x, y), model(x, y))
    assert widths(small) == [2, 2, 2]


class Branch(nn.Module):
    """Two convolutions of the same input, put together."""

    def __init__(self, width, kind):
        super().__init__()
        self.a, self.b, self.kind = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1), kind

    def forward(self, x):
        a, b = self.a(x), self.b(x).relu()
        return torch.cat([a, b], 1) if self.kind == "cat" else a + b if self.kind == "add" else a * b


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x):
        return x * self.b(self.a(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()


class Pad(nn.Module):
    def forward(self, x):
        return F.pad(x, (1, 0, 0, 2), value=0.5)


STEPS = {
    "conv": lambda draw, width: nn.Conv2d(
        width, 4, draw.choice([1, 3]), 1, draw.randint(0, 1), bias=draw.random() < 0.8
    ),
    "strided": lambda draw, width: nn.Conv2d(width, 5, 3, 2, draw.choice(["valid", 1])),
    "depthwise": lambda draw, width: nn.Conv2d(width, width, 3, 1, draw.randint(0, 1), groups=width),
    "transposed": lambda draw, width: nn.ConvTranspose2d(width, 4, 2, draw.randint(1, 2)),
    "grouped": lambda draw, width: nn.Conv2d(width, 6, 3, padding=1, groups=math.gcd(width, 2)),
    "transposed in groups": lambda draw, width: nn.ConvTranspose2d(width, 6, 2, 2, groups=math.gcd(width, 3)),
    "max pool": lambda draw, width: nn.MaxPool2d(3, 1, draw.randint(0, 1)),
    "mean pool": lambda draw, width: nn.AvgPool2d(3, 1, draw.randint(0, 1), count_include_pad=draw.random() < 0.7),
    "ragged pool": lambda draw, width: nn.AvgPool2d(2, 1, ceil_mode=True, divisor_override=3),
    "relu": lambda draw, width: nn.Sequential(nn.BatchNorm2d(width), nn.ReLU()),
    "sigmoid": lambda draw, width: nn.Sequential(nn.BatchNorm2d(width), nn.Sigmoid()),
    "add": lambda draw, width: Branch(width, "add"),
    "mul": lambda draw, width: Branch(width, "mul"),
    "cat": lambda draw, width: Branch(width, "cat"),
    "gate": lambda draw, width: Gate(width),
    "upsample": lambda draw, width: nn.Upsample(scale_factor=2, mode=draw.choice(["nearest", "bilinear"])),
    "pad": lambda draw, width: Pad(),
    "instance norm": lambda draw, width: nn.InstanceNorm2d(width, affine=True),
}


def random_network(seed):
    """A convolutional network, most of whose weights are zero, and many whole filters; any image size will do."""
    draw, width, steps = random.Random(seed), 3, []
    torch.manual_seed(seed)
    for _ in range(draw.randint(2, 7)):
        kind = draw.choice(["conv", *STEPS])
        steps.append(STEPS[kind](draw, width))
        width = 2 * width if kind == "cat" else getattr(steps[-1], "out_channels", width)
    model = nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            for axis in (0, 1):
                size = [-1 if index == axis else 1 for index in range(module.weight.dim())]
                module.weight.data *= (torch.rand(module.weight.shape[axis]) < 0.6).view(size)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize("seed", range(40))
def test_random_networks_compute_the_same_at_other_sizes(seed):
    model = random_network(seed)
    narrow = compact(model, torch.randn(2, 3, 8, 8).double())
    model.eval()
    narrow.eval()
    for size in ((2, 3, 8, 8), (1, 3, 16, 16), (3, 3, 9, 14)):
        batch = torch.randn(size).double()
        torch.testing.assert_close(narrow(batch), model(batch), rtol=1e-9, atol=1e-9)
