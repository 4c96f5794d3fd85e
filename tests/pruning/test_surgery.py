"""The oracle: a network without its filters computes what it computes with them zeroed: weights, bias, gamma, beta."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models.cifar_cnn import CifarCNN
from models.mnist_cnn import MnistCNN
from pruning.surgery import BATCH_NORM, find_channels, remove_filters


def randomize(model):
    """float64, and BatchNorm as if it had been trained: no statistic, gamma or beta at its initial value."""
    torch.manual_seed(0)
    for module in model.double().modules():
        if isinstance(module, BATCH_NORM):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def zeroed(model, channels, removed):
    """A copy of the model in its old shape, in which all that makes the removed filters is zero."""
    gone = torch.zeros(channels.count + 1, dtype=torch.bool)
    for layer, filters in removed.items():
        gone[channels.filters[layer][filters]] = True
    model = copy.deepcopy(model)
    for (path, tensor, axis), names in channels.slots.items():
        module = model.get_submodule(path)
        output_axis = 1 if isinstance(module, nn.ConvTranspose2d) and tensor == "weight" else 0
        if tensor in ("weight", "bias") and axis == output_axis:
            module.get_parameter(tensor).data.index_fill_(axis, gone[names].nonzero().squeeze(1), 0)
    return model


def outputs(model, example):
    result = model(example)
    return torch.cat(result, dim=1) if isinstance(result, tuple) else result


def prune_at_random(model, example, fraction=0.4, spared=()):
    """Removes that fraction of the names; checks all that must hold; returns the narrow network and what went."""
    channels = find_channels(model, example)
    chosen = torch.rand(channels.count + 1, generator=torch.Generator().manual_seed(1)) < fraction
    marked = {layer: chosen[names] for layer, names in channels.filters.items() if layer not in spared}
    narrow, removed = remove_filters(model, example, marked)
    reference = zeroed(model, channels, removed)
    for mode in (False, True):
        reference.train(mode)
        narrow.train(mode)
        for module in [*reference.modules(), *narrow.modules()]:
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        torch.testing.assert_close(outputs(narrow, example), outputs(reference, example), rtol=1e-9, atol=1e-9)
    for name, parameter in narrow.named_parameters():
        assert torch.isin(parameter, model.get_parameter(name)).all(), "kept weights are bit-equal"
    for module in narrow.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, BATCH_NORM):
            assert len(module.running_mean) == module.num_features
    return narrow, removed


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def vgg11_bn():
    model = torchvision.models.vgg11_bn(weights=None)
    model.classifier = nn.Linear(512 * 7 * 7, 10)  # the original's 123 million parameters show nothing more
    return model


@pytest.mark.parametrize(
    ("build", "most_left"),
    [
        (vgg11_bn, 0.5),
        (torchvision.models.resnet18, 0.5),
        (torchvision.models.densenet121, 0.5),
        (torchvision.models.mobilenet_v2, 0.6),
        (torchvision.models.shufflenet_v2_x0_5, 0.9),  # chunks and shuffles: its halves must shrink alike
        (torchvision.models.squeezenet1_1, 0.6),
    ],
)
def test_networks_of_torchvision(build, most_left):
    model, example = randomize(build()), torch.randn(2, 3, 64, 64, dtype=torch.double)
    narrow, _ = prune_at_random(model, example)
    assert size(narrow) < most_left * size(model)


def test_lenet_becomes_the_same_class_with_smaller_widths():
    model, example = randomize(MnistCNN()), torch.randn(3, 1, 28, 28, dtype=torch.double)
    narrow, removed = prune_at_random(model, example)
    widths = tuple(int((~removed[layer]).sum()) for layer in ("conv1", "conv2", "fc1"))
    again = MnistCNN(widths).double()
    again.load_state_dict(narrow.state_dict())
    assert torch.equal(again(example), narrow(example))
    assert not removed["fc2"].any(), "the output stays"


def test_our_network_becomes_the_same_class_with_smaller_widths():
    model, example = randomize(CifarCNN()), torch.randn(3, 3, 28, 28, dtype=torch.double)
    narrow, removed = prune_at_random(model, example, spared=["whitening"])
    again = CifarCNN([int((~removed[f"conv{layer}"]).sum()) for layer in range(1, 7)]).double()
    again.load_state_dict(narrow.state_dict())
    assert torch.equal(again.eval()(example), narrow.eval()(example))
    assert not removed["head"].any(), "the output stays"


def net(forward, **layers):
    """A small network out of two lines: its forward and its layers."""
    model = type("Net", (nn.Module,), {"forward": forward})()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def shuffle(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


EXAMPLE = torch.randn(2, 3, 6, 10, dtype=torch.double, generator=torch.Generator().manual_seed(0))
PRUNABLE = {
    "flatten of a map that is not square": net(
        lambda self, x: self.c(F.max_pool2d(F.relu(self.b(self.a(x))), 2).flatten(1)),
        a=conv(3, 8), b=nn.BatchNorm2d(8), c=nn.Linear(8 * 3 * 5, 4),
    ),
    "reshape to (N, -1)": net(
        lambda self, x: self.b(self.a(x).view(x.size(0), -1)), a=conv(3, 8), b=nn.Linear(8 * 60, 4)
    ),
    "concatenation": net(
        lambda self, x: self.c(self.n(torch.cat([self.a(x), x, F.relu(self.b(x))], 1))),
        a=conv(3, 5), b=conv(3, 6), n=nn.BatchNorm2d(14), c=conv(14, 4),
    ),
    "residual addition": net(
        lambda self, x: self.c(F.relu(self.a(x) + self.b(self.a(x)))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)
    ),
    "depthwise, two filters a channel": net(
        lambda self, x: self.c(self.n(self.b(self.a(x)))),
        a=conv(3, 6), b=conv(6, 12, groups=6), n=nn.BatchNorm2d(12), c=conv(12, 4),
    ),
    "two heads": net(
        lambda self, x: (self.b(self.a(x).mean((2, 3))), self.c(self.a(x).mean((2, 3)))),
        a=conv(3, 8), b=nn.Linear(8, 4), c=nn.Linear(8, 2),
    ),
    "a layer used twice": net(
        lambda self, x: self.c(self.b(F.relu(self.b(self.a(x))))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)
    ),
    "transposed convolution": net(
        lambda self, x: self.c(F.relu(self.b(self.a(x)))), a=conv(3, 8), b=nn.ConvTranspose2d(8, 6, 2), c=conv(6, 4)
    ),
    "chunks that are multiplied": net(
        lambda self, x: self.b(self.a(x).chunk(2, 1)[0] * self.a(x).chunk(2, 1)[1]), a=conv(3, 12), b=conv(6, 4)
    ),
    "channel shuffle": net(
        lambda self, x: self.b(shuffle(torch.cat(self.a(x).chunk(2, 1), 1), 2)), a=conv(3, 12), b=conv(12, 4)
    ),
    "zeros appended to the channels": net(
        lambda self, x: self.b(F.pad(self.a(x), (0, 0, 0, 0, 1, 2))), a=conv(3, 8), b=conv(11, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRUNABLE)
def test_small_networks(name):
    model = randomize(PRUNABLE[name])
    narrow, removed = prune_at_random(model, EXAMPLE)
    assert removed["a"].any()
    assert size(narrow) < size(model)


UNTOUCHABLE = {
    "sigmoid": ("makes something of nothing", lambda self, x: self.b(torch.sigmoid(self.a(x)))),
    "softmax": ("softmax is unknown", lambda self, x: self.b(self.a(x).softmax(1))),
    "layer norm": ("layernorm is unknown", lambda self, x: self.b(F.layer_norm(self.a(x), (8, 6, 10)))),
    "mean over channels": ("mean is taken across", lambda self, x: self.b(self.a(x) * self.a(x).mean(1, keepdim=True))),
    "constant added": ("makes something of nothing", lambda self, x: self.b(self.a(x) + 1)),
    "output": ("network's output", lambda self, x: self.a(x)),
    "added to the input": ("added to what is pinned", lambda self, x: self.b(self.a(x)[:, :3] + x).repeat(1, 1, 1, 1)),
    "weight read directly": ("not a's alone", lambda self, x: self.b(self.a(x)) * self.a.weight.sum()),
}


@pytest.mark.parametrize("name", UNTOUCHABLE)
def test_what_cannot_be_removed_exactly_is_pinned_and_the_reason_told(name):
    reason, forward = UNTOUCHABLE[name]
    model = randomize(net(forward, a=conv(3, 8), b=conv(3 if name == "added to the input" else 8, 4)))
    _, removed = prune_at_random(model, EXAMPLE)
    assert not removed["a"][:3].any()
    assert reason in find_channels(model, EXAMPLE).pinned["a"]


def test_a_grouped_convolution_pins_its_inputs():
    model = randomize(
        net(lambda self, x: self.c(self.b(self.a(x))), a=conv(3, 8), b=conv(8, 8, groups=2), c=conv(8, 4))
    )
    _, removed = prune_at_random(model, EXAMPLE)
    assert not removed["a"].any()
    assert "grouped" in find_channels(model, EXAMPLE).pinned["a"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.b(self.a(x).reshape(2, 8, 60).reshape(2, 8, 6, 10)),
        lambda self, x: self.b(torch.cat([self.a(x)[:, 4:], self.a(x)[:, :4]], 1)),
        lambda self, x: self.b(torch.cat(self.a(x).split([3, 5], 1), 1)),
    ],
    ids=["reshape of fixed size", "slices of fixed size", "split of fixed sizes"],
)
def test_sizes_written_into_the_network_are_respected(forward):
    """Fewer channels would arrive elsewhere, or not at all: what was marked is put back."""
    model = randomize(net(forward, a=conv(3, 8), b=conv(8, 4)))
    narrow, _ = prune_at_random(model, EXAMPLE)
    assert narrow(EXAMPLE).shape == model(EXAMPLE).shape


def test_shared_weights_are_left_alone():
    model = net(lambda self, x: self.c(self.b(self.a(x))), a=conv(3, 3), b=conv(3, 3), c=conv(3, 4))
    model.b.weight = model.a.weight
    _, removed = prune_at_random(randomize(model), EXAMPLE)
    assert not removed["a"].any()
    assert not removed["b"].any()


def test_removing_nothing_is_the_identity():
    model, example = randomize(torchvision.models.resnet18()), torch.randn(2, 3, 32, 32, dtype=torch.double)
    narrow, removed = remove_filters(model, example, {})
    assert not any(filters.any() for filters in removed.values())
    assert narrow.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in narrow.state_dict().items())


def test_one_filter_stays_in_every_layer():
    model = randomize(PRUNABLE["flatten of a map that is not square"])
    narrow, removed = remove_filters(model, EXAMPLE, {"a": torch.ones(8, dtype=torch.bool)})
    assert int(removed["a"].sum()) == 7
    assert narrow(EXAMPLE).shape == (2, 4)


def test_filters_of_a_sum_go_together_or_not_at_all():
    model = randomize(PRUNABLE["residual addition"])
    first, both = torch.arange(8) == 2, torch.arange(8) < 3
    assert not remove_filters(model, EXAMPLE, {"a": both})[1]["a"].any()
    _, removed = remove_filters(model, EXAMPLE, {"a": both, "b": first})
    assert removed["a"].tolist() == removed["b"].tolist() == first.tolist()


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="conv9"):
        remove_filters(MnistCNN(), torch.zeros(1, 1, 28, 28), {"conv9": torch.ones(3, dtype=torch.bool)})
