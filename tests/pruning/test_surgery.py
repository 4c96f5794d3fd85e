"""The oracle: a network without its filters computes what it computes with them zeroed: weights, bias, gamma, beta."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

from models.cifar_cnn import CifarCNN
from models.mnist_cnn import MnistCNN
from pruning.filters import filter_scores
from pruning.magnitude import dense_masks, keep_at_zero, update_masks
from pruning.surgery import explain, find_channels, remove_filters
from tests.pruning.oracle import check_removal, randomize


def prune_at_random(model, example, fraction=0.4, spared=()):
    """Removes that fraction of the groups; checks all that must hold; returns the narrow network and what it lost."""
    channels = find_channels(model, example)
    chosen = torch.rand(channels.count + 1, generator=torch.Generator().manual_seed(1)) < fraction
    marked = {layer: chosen[ids] for layer, ids in channels.filters.items() if layer not in spared}
    narrow, removed = remove_filters(model, example, marked)
    check_removal(model, example, narrow, removed)
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
        (vgg11_bn, 0.45),
        (torchvision.models.resnet18, 0.45),
        (torchvision.models.mobilenet_v3_small, 0.55),  # squeeze and excitation
        (torchvision.models.shufflenet_v2_x0_5, 0.6),  # chunks and shuffles: its halves must shrink alike
        (torchvision.models.regnet_x_400mf, 0.45),  # grouped convolutions
        (torchvision.models.squeezenet1_1, 0.5),
    ],
)
def test_networks_of_torchvision(build, most_left):
    example = torch.randn(2, 3, 64, 64, dtype=torch.double)
    model = randomize(build(), example)
    narrow, _ = prune_at_random(model, example)
    assert size(narrow) < most_left * size(model)


def test_what_was_found_in_a_network_serves_again():
    model, example = (
        randomize(CifarCNN([4, 6, 6, 8, 8, 8]), images := torch.randn(2, 3, 32, 32, dtype=torch.double)),
        images,
    )
    channels = find_channels(model, example)
    for marks in ([1, 0, 0, 0], [0, 1, 1, 0]):
        (narrow, removed), (again, same) = (remove_filters(model, by, {"conv1": marks}) for by in (example, channels))
        assert torch.equal(narrow.eval()(example), again.eval()(example))
        assert removed["conv1"].equal(same["conv1"])
        assert removed["conv1"].tolist() == [mark == 1 for mark in marks]


def test_a_network_that_differs_between_train_and_eval_mode():
    model = torchvision.models.googlenet(weights=None, init_weights=False, num_classes=10)
    example = torch.randn(2, 3, 64, 64, dtype=torch.double)
    narrow, removed = prune_at_random(randomize(model, example), example)
    assert removed["aux1.conv.conv"].any(), "what only train mode uses is narrow too"
    assert isinstance(narrow.train()(example), tuple)


def test_lenet_becomes_the_same_class_with_smaller_widths():
    model, example = randomize(MnistCNN()), torch.randn(3, 1, 28, 28, dtype=torch.double)
    narrow, removed = prune_at_random(model, example)
    widths = tuple(int((~removed[layer]).sum()) for layer in ("conv1", "conv2", "fc1"))
    again = MnistCNN(widths).double()
    again.load_state_dict(narrow.state_dict())
    assert torch.equal(again(example), narrow(example))
    assert not removed["fc2"].any(), "the output stays"


def test_our_network_becomes_the_same_class_with_smaller_widths():
    example = torch.randn(3, 3, 28, 28, dtype=torch.double)
    model = CifarCNN()
    for parameter in model.parameters():  # the Dirac filters at the start are mostly zero, and alike
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model = randomize(model, example)
    narrow, removed = prune_at_random(model, example, spared=["whitening"])
    again = CifarCNN([int((~removed[f"conv{layer}"]).sum()) for layer in range(1, 7)]).double()
    again.load_state_dict(narrow.state_dict())
    assert torch.equal(again.eval()(example), narrow.eval()(example))
    assert not removed["head"].any(), "the output stays"


def net(forward, **members):
    """A small network out of its forward and its layers, parameters (tensors of float), buffers (other tensors), and
    attributes (all else).
    """
    torch.manual_seed(0)
    model = type("Net", (nn.Module,), {"forward": forward})()
    for name, member in members.items():
        if isinstance(member, nn.Module):
            model.add_module(name, member)
        elif not isinstance(member, torch.Tensor):
            setattr(model, name, member)
        elif member.is_floating_point():
            model.register_parameter(name, nn.Parameter(member))
        else:
            model.register_buffer(name, member)
    return model


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 1, **options)


class MyConv(nn.Conv2d):
    pass


class MyNorm(nn.BatchNorm2d):
    pass


@dataclass
class Output:
    logits: torch.Tensor


class FrozenNorm(nn.Module):
    """As torchvision.ops.FrozenBatchNorm2d has it."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels, generator=torch.Generator().manual_seed(len(name))) + 0.5)

    def forward(self, x):
        weight, bias, mean, var = (buffer.view(1, -1, 1, 1) for buffer in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


def shuffle(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def squeeze_and_excite(self, x):
    y = self.a(x)
    scale = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
    return self.b(y * scale)


def halves(self, x):
    y = self.a(x)
    half = y.shape[1] // 2
    return self.b(y[:, :half] * y[:, half:])


def attention(self, x):
    """Two heads of queries, keys and values, whose scale is a number that stays."""
    tokens = self.a(x).flatten(2).transpose(1, 2)  # (N, T, C)
    n, t, _ = tokens.shape
    q, k, v = (layer(tokens).view(n, t, 2, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
    mixed = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v  # (N, heads, T, C / heads)
    return self.b(mixed.transpose(1, 2).reshape(n, t, -1)).mean(1)


def heads_of_three(self, x):
    """As many heads as there are, of three channels each, whose number is in the scale."""
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = (layer(tokens).view(*tokens.shape[:2], -1, 3).transpose(1, 2) for layer in (self.a, self.k, self.v))
    mixed = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, 3)
    return self.b(mixed.transpose(1, 2).flatten(2)).mean(1)


def heads_that_are_held(self, x):
    """Queries, keys and values of one layer, as in timm; the size of a head is in the scale."""
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = self.a(tokens).reshape(*tokens.shape[:2], 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(self.before(q), k, v)  # (N, heads, T, size)
    return self.b(mixed.transpose(1, 2).reshape(*tokens.shape[:2], self.width)).mean(1)


def as_wide_as_tokens(self, x):
    """The width of all heads is that of the tokens, by code; one layer makes queries, keys and values."""
    tokens = self.a(x.flatten(2).mT)
    n, t, c = tokens.shape
    q, k, v = self.qkv(tokens).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v)
    return self.b(tokens + self.proj(self.outwards(mixed).reshape(n, t, c))).mean(1)


def normed(self, x):
    """The same with norms of queries and keys, one for all heads."""
    tokens = self.a(x.flatten(2).mT)
    n, t, c = tokens.shape
    q, k, v = self.qkv(tokens).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(self.n(q), self.m(k), v)
    return self.b(tokens + self.proj(mixed.transpose(1, 2).reshape(n, t, c))).mean(1)


def scores_divided(self, x):
    """The same of three layers, where the root of the width of a head divides what the queries make of the keys."""
    tokens = self.a(x.flatten(2).mT)
    n, t, c = tokens.shape
    q, k, v = (layer(tokens).view(n, t, 2, c // 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
    scores = q @ k.transpose(-2, -1) / k.shape[-1] ** 0.5
    return self.b(tokens + self.proj(self.outwards(scores.softmax(-1) @ v).reshape(n, t, c))).mean(1)


def cosines(self, x):
    """Of normalized queries and keys, each head with a temperature of its own, as in Swin V2."""
    tokens = self.a(x.flatten(2).mT)
    n, t, c = tokens.shape
    q, k, v = self.qkv(tokens).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.g
    return self.b(tokens + self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, c))).mean(1)


def optional(self, x, mask=None):
    assert x.shape[1] == 3
    y = self.a(x)
    return self.b(y if mask is None else y * mask)


def tutorial(self, x):
    y = self.a(x)
    return self.b(y.view(-1, int(y.nelement() / y.shape[0])))


def multihead(self, x):
    tokens = self.a(x.flatten(2).mT)
    return self.b(tokens + self.m(tokens, tokens, tokens)[0]).mean(1)


def across(self, x):
    """Attention to keys and values of other widths."""
    queries, keys, values = (layer(x.flatten(2).mT) for layer in (self.a, self.k, self.v))
    return self.b(queries + self.m(queries, keys, values, need_weights=False)[0]).mean(1)


def of_linear(**more):
    """a of eight outputs, b of eight inputs, and layers of those that make and read as many."""
    layers = {name: nn.Linear(8, width) for name, width in {"qkv": 24, "q": 8, "k": 8, "v": 8, "proj": 8}.items()}
    return {"a": nn.Linear(3, 8), **layers, **more, "b": nn.Linear(8, 4)}


def through(layer, inputs=8, **more):
    """a, the layer, b."""
    return net(lambda self, x: self.b(self.layer(self.a(x))), a=conv(3, 8), layer=layer, b=conv(inputs, 4), **more)


def by(function, made=8, read=8):
    """a, a function, b."""
    return net(lambda self, x: self.b(function(self.a(x))), a=conv(3, made), b=conv(read, 4))


def named_for_a_profiler(self, x):
    with torch.profiler.record_function("all"):
        return self.b(F.relu(self.a(x)))


def mask_once(self, x):
    if self.mask is None:
        self.mask = torch.zeros(6, 10, dtype=x.dtype)
        self.mask[2:] = 1
    return self.b(self.a(x) * self.mask)


def adapted(self, x):
    """The mean is updated in eval mode, too."""
    self.n.running_mean.lerp_(x.mean((0, 2, 3)), 0.1)
    return self.b(self.a(self.n(x)))


EXAMPLE = torch.randn(2, 3, 6, 10, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def recurrent(self, x):
    y = self.a(x)
    state = torch.zeros_like(y)
    for _ in range(3):
        state = torch.tanh(self.u(state) + y)
    return self.b(state)


def convolutional_lstm(self, x):
    x, h = x + torch.zeros(size=(1,)), x.new_zeros(len(x), self.width, *x.shape[2:])
    c = torch.zeros_like(h)
    for _ in range(3):
        i, f, o, new = self.a(torch.cat([x, h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * new.tanh()
        h = o.sigmoid() * c.tanh()
    return self.b(h)


def unpooled(self, x):
    y, places = F.max_pool2d(F.relu(self.a(x)), 2, return_indices=True)
    return self.b(F.max_unpool2d(F.relu(self.c(y)), places, 2))


PRUNABLE = {
    "flatten of a map that is not square": net(
        lambda self, x: self.c(F.max_pool2d(F.relu(self.n(self.a(x))), 2).flatten(1)),
        a=conv(3, 8), n=nn.BatchNorm2d(8), c=nn.Linear(8 * 3 * 5, 4),
    ),
    "reshape to (N, -1)": net(
        lambda self, x: self.b(self.a(x).reshape(x.size(0), -1)), a=conv(3, 8), b=nn.Linear(8 * 60, 4)
    ),
    "view by numbers derived from a shape": net(tutorial, a=conv(3, 8), b=nn.Linear(8 * 60, 4)),
    "concatenation": net(
        lambda self, x: self.c(self.n(torch.cat([self.a(x), x, F.relu(self.b(x))], 1))),
        a=conv(3, 5), b=conv(3, 6), n=nn.BatchNorm2d(14), c=conv(14, 4),
    ),
    "residual addition": net(
        lambda self, x: self.c(F.relu(self.a(x) + self.b(self.a(x)))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)
    ),
    "depthwise, two filters a channel": through(conv(8, 16, groups=8), 16),
    "depthwise transposed": through(nn.ConvTranspose2d(8, 16, 2, 2, groups=8), 16),
    "two heads": net(
        lambda self, x: (self.b(self.a(x).mean((2, 3))), self.c(self.a(x).mean((2, 3)))),
        a=conv(3, 8), b=nn.Linear(8, 4), c=nn.Linear(8, 2),
    ),
    "a layer used twice": net(
        lambda self, x: self.c(self.b(F.relu(self.b(self.a(x))))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)
    ),
    "transposed convolution": through(nn.ConvTranspose2d(8, 6, 2), 6),
    "grouped transposed convolution": through(nn.ConvTranspose2d(8, 12, 2, groups=2), 12),
    "chunks that are multiplied": by(lambda y: y.chunk(2, 1)[0] * y.chunk(2, 1)[1], 16),
    "halves by slices": net(halves, a=conv(3, 16), b=conv(8, 4)),
    "gated linear unit": by(lambda y: F.glu(y, 1), 16),
    "channel shuffle": by(lambda y: shuffle(torch.cat(y.chunk(2, 1), 1), 2), 24, 24),
    "channel shuffle as one operation": by(lambda y: F.channel_shuffle(y, 2)),
    "pixel shuffle": by(lambda y: F.pixel_shuffle(y, 2), 32),
    "pixel unshuffle": by(lambda y: F.pixel_unshuffle(y, 2), 8, 32),
    "zeros appended to the channels": by(lambda y: F.pad(y, (0, 0, 0, 0, 1, 2)), 8, 11),
    "zeros around the map": through(nn.ZeroPad2d(1)),
    "reflection around the map": by(lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect")),
    "interpolate": by(lambda y: F.interpolate(y, scale_factor=2)),
    "upsample": through(nn.Upsample(scale_factor=2, mode="bilinear")),
    "squeeze and excitation": net(
        squeeze_and_excite, a=conv(3, 8), squeeze=conv(8, 4), excite=conv(4, 8), b=conv(8, 4)
    ),
    "a gate written in place": net(
        lambda self, x: self.b((y := self.a(x)) * F.hardsigmoid(self.c(y), inplace=True)),
        a=conv(3, 8), c=conv(8, 8), b=conv(8, 4),
    ),
    "circular padding": through(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")),
    "PReLU": through(nn.PReLU(8)),
    "PReLU of one slope": through(nn.PReLU()),
    "GroupNorm": through(nn.GroupNorm(2, 8)),
    "GroupNorm of a channel each": through(nn.GroupNorm(8, 8)),
    "LayerNorm": net(
        lambda self, x: self.b(self.n(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        a=conv(3, 8), n=nn.LayerNorm(8), b=conv(8, 4),
    ),
    "RMSNorm": net(
        lambda self, x: self.b(self.n(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        a=conv(3, 8), n=nn.RMSNorm(8), b=conv(8, 4),
    ),
    "InstanceNorm": through(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    "InstanceNorm without affine": through(nn.InstanceNorm2d(8)),
    "BatchNorm without affine": through(nn.BatchNorm2d(8, affine=False)),
    "BatchNorm without statistics": through(nn.BatchNorm2d(8, track_running_stats=False)),
    "frozen BatchNorm": through(FrozenNorm(8)),
    "subclasses": net(
        lambda self, x: self.b(F.relu(self.n(self.a(x)))), a=MyConv(3, 8, 1), n=MyNorm(8), b=MyConv(8, 4, 1)
    ),
    "an input by its name": net(lambda self, x: self.b(input=self.a(input=x)), a=conv(3, 8), b=conv(8, 4)),
    "an optional argument and an assertion": net(optional, a=conv(3, 8), b=conv(8, 4)),
    "clone": by(torch.clone),
    "sum over places": by(lambda y: y * y.sum((2, 3), keepdim=True)),
    "sum over channels": by(lambda y: y * y.sum(1, keepdim=True)),
    "divided by the norm": by(F.normalize),
    "divided by a map of the image": net(
        lambda self, x: self.b(self.a(x) / (1 + x.abs().sum(1, keepdim=True))), a=conv(3, 8), b=conv(8, 4)
    ),
    "moved to a device by its name": by(lambda y: y.to("cpu")),
    "reshape by its keyword": by(lambda y: y.reshape(shape=y.shape)),
    "power": by(lambda y: y**2),
    "in place": by(lambda y: y.mul_(2).relu_()),
    "expand_as": by(lambda y: y * y.mean((2, 3), keepdim=True).expand_as(y)),
    "repeat_interleave": by(lambda y: y.repeat_interleave(2, 1), read=16),
    "repeat_interleave and BatchNorm": net(
        lambda self, x: self.b(self.n(self.a(x).repeat_interleave(2, 1))),
        a=conv(3, 8), n=nn.BatchNorm2d(16), b=conv(16, 4),
    ),
    "outer product, flattened": net(
        lambda self, x: self.b((self.a(x)[:, :, None] * self.c(x)[:, None]).flatten(1, 2)),
        a=conv(3, 8), c=conv(3, 2), b=conv(16, 4),
    ),
    "sum over the channels of each head": net(
        lambda self, x: self.b(self.a(x).unflatten(1, (2, -1)).relu().sum(2)), a=conv(3, 8), b=conv(2, 4)
    ),
    "mean over the channels of each head": net(
        lambda self, x: self.b(self.a(x).unflatten(1, (-1, 4)).mean(2)), a=conv(3, 8), b=conv(2, 4)
    ),
    "roll over places": by(lambda y: y.roll((1, 1), (2, 3))),
    "stack": by(lambda y: torch.stack([y, y.relu()]).sum(0)),
    "parameter times tensor": net(
        lambda self, x: self.b(self.a(x) * self.g), a=conv(3, 8), b=conv(8, 4), g=torch.rand(8, 1, 1)
    ),
    "parameter plus tensor": net(
        lambda self, x: self.b(self.a(x) + self.g), a=conv(3, 8), b=conv(8, 4), g=torch.rand(1, 8, 1, 1)
    ),
    "tokens with a class and positions": net(
        lambda self, x: self.b(
            torch.cat([self.g.expand(len(x), -1, -1), self.a(x).flatten(2).mT], 1) + self.h
        ).mean(1),
        a=conv(3, 8), b=nn.Linear(8, 4), g=torch.rand(1, 1, 8), h=torch.rand(1, 61, 8),
    ),
    "attention": net(
        attention, a=conv(3, 8), q=nn.Linear(8, 12), k=nn.Linear(8, 12), v=nn.Linear(8, 12), b=nn.Linear(12, 4)
    ),
    "whole heads of attention": net(
        heads_of_three, a=nn.Linear(3, 12), k=nn.Linear(3, 12), v=nn.Linear(3, 12), b=nn.Linear(12, 4)
    ),
    "attention as wide as its tokens": net(
        as_wide_as_tokens, **of_linear(heads=2, outwards=lambda mixed: mixed.transpose(1, 2))
    ),
    "attention as wide as its tokens, its heads innermost": net(
        as_wide_as_tokens, **of_linear(heads=2, outwards=lambda mixed: mixed.permute(0, 2, 3, 1))
    ),
    "attention whose scores are divided": net(
        scores_divided, **of_linear(outwards=lambda mixed: mixed.transpose(1, 2))
    ),
    "attention of three layers, its heads innermost": net(
        scores_divided, **of_linear(outwards=lambda mixed: mixed.permute(0, 2, 3, 1))
    ),
    "attention of cosines": net(cosines, **of_linear(heads=2, g=torch.rand(2, 1, 1))),
    "MultiheadAttention": net(multihead, **of_linear(m=nn.MultiheadAttention(8, 2, batch_first=True))),
    "MultiheadAttention with more keys": net(
        multihead,
        **of_linear(m=nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)),
    ),
    "MultiheadAttention without biases": net(multihead, **of_linear(m=nn.MultiheadAttention(8, 2, bias=False))),
    "MultiheadAttention to others": net(
        across, a=nn.Linear(3, 8), k=nn.Linear(3, 6), v=nn.Linear(3, 5), b=nn.Linear(8, 4),
        m=nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True),
    ),
    "the root of the width, of what the scores of it are": net(
        lambda self, x: self.b(x.flatten(2).mT) * (
            ((y := self.a(x.flatten(2).mT)) @ self.c(x.flatten(2).mT).mT) * y.shape[2] ** -0.5
        ).sum(2, keepdim=True), a=nn.Linear(3, 8), c=nn.Linear(3, 8), b=nn.Linear(3, 4),
    ),
    "a TransformerEncoderLayer": net(
        lambda self, x: self.b(self.m(self.a(x.flatten(2).mT))).mean(1),
        a=nn.Linear(3, 8), b=nn.Linear(8, 4), m=nn.TransformerEncoderLayer(8, 2, 6, dropout=0, batch_first=True),
    ),
    "the root of the width": by(lambda y: y / y.shape[1] ** 0.5),
    "attention with a norm of queries and keys": net(
        normed, **of_linear(heads=2, n=nn.LayerNorm(4), m=nn.RMSNorm(4))
    ),
    "a weight that is not turned": net(
        lambda self, x: self.b(
            (y := torch.addmm(self.g, x.flatten(2).mT.flatten(0, 1), self.a)) * y.shape[1] ** -0.5
        ), a=torch.rand(3, 8), g=torch.rand(8), b=nn.Linear(8, 4),
    ),
    "whole maps of Unflatten": net(
        lambda self, x: self.b(self.u(self.a(x.mean((2, 3))))),
        a=nn.Linear(3, 32), u=nn.Unflatten(1, (8, 2, 2)), b=nn.Conv2d(8, 4, 2),
    ),
    "whole maps of an open view": net(
        lambda self, x: self.b(self.a(x.mean((2, 3))).view(len(x), -1, 2, 2)), a=nn.Linear(3, 32), b=nn.Conv2d(8, 4, 2)
    ),
    **{
        f"{name} of whole maps": net(
            lambda self, x: self.b(F.relu(self.n(self.u(self.a(x.mean((2, 3))))))),
            a=nn.Linear(3, 32), u=nn.Unflatten(1, (8, 2, 2)), n=layer, b=nn.Conv2d(8, 4, 1),
        )
        for name, layer in {
            "BatchNorm": nn.BatchNorm2d(8), "GroupNorm": nn.GroupNorm(2, 8), "upsampling": nn.Upsample(scale_factor=2),
            "pooling": nn.MaxPool2d(2), "padding": nn.ZeroPad2d(1), "reflection": nn.ReflectionPad2d(1),
        }.items()
    },
    "a part that is named for a profiler": net(named_for_a_profiler, a=conv(3, 8), b=conv(8, 4)),
    "a mask that is made once": net(mask_once, a=conv(3, 8), b=conv(8, 4), mask=None),
    "buffers that are changed in place": net(
        adapted, a=conv(3, 8), b=conv(8, 4), n=nn.BatchNorm2d(3, affine=False)
    ),
    "one dimension": net(
        lambda self, x: self.b(F.max_pool1d(self.a(x.flatten(2)), 2)), a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 4, 1)
    ),
    "three dimensions": net(
        lambda self, x: self.b(F.relu(self.n(self.a(x[:, :, None]))).mean((2, 3, 4))),
        a=nn.Conv3d(3, 8, 1), n=nn.BatchNorm3d(8), b=nn.Linear(8, 4),
    ),
    "pooling to one place of maps whose channels lie last": by(
        lambda y: F.adaptive_avg_pool2d(y.contiguous(memory_format=torch.channels_last), 1)
    ),
    "a convolutional LSTM": net(convolutional_lstm, a=conv(11, 32), b=conv(8, 4), width=8),
    "unpooling": net(unpooled, a=conv(3, 8), c=conv(8, 8), b=conv(8, 4)),
    "a state that starts at zero": net(recurrent, a=conv(3, 8), u=conv(8, 8), b=conv(8, 4)),
    "zeros that are written into": by(lambda y: (z := torch.zeros_like(y), z[:, :, 1:].copy_(y[:, :, :-1]), z)[2]),
    "outputs that are None or a number": by(lambda y: y),
}  # fmt: skip
PRUNABLE["outputs that are None or a number"].register_forward_hook(
    lambda module, args, output: {"logits": output, "loss": None, "count": 3, "strides": np.array([8.0, np.nan])}
)


@pytest.mark.parametrize("name", PRUNABLE)
def test_small_networks(name):
    model = randomize(PRUNABLE[name], EXAMPLE)
    narrow, removed = prune_at_random(model, EXAMPLE)
    assert removed["a"].any()
    assert size(narrow) < size(model)


def test_heads_are_tied_in_the_order_in_which_their_channels_become_those_of_tokens():
    """Of two heads with four channels each, the innermost, neighbours are one group; queries are split otherwise."""
    model = PRUNABLE["attention of three layers, its heads innermost"]
    pairs = find_channels(model, EXAMPLE.float()).filters["a"].view(4, 2)
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    assert len(pairs.unique()) == 4


def split_unevenly(self, x):
    return self.b(torch.cat(self.a(x).split(self.parts, self.axis)[::-1], 1))


def scale_by_a_view(self, x):
    return self.b(self.a(x) * self.g.view(self.shape))


def one_number_for_two(self, x):
    """The sizes of two layers' outputs that are not tied otherwise."""
    y = torch.cat([layer(x).view(len(x), self.width, 60) for layer in (self.a, self.c)], 1)
    return self.b(y.unflatten(2, (6, 10)))


HELD = {
    "Unflatten": ("u.unflattened_size", (8, 2, 2), PRUNABLE["whole maps of Unflatten"]),
    "a list": ("parts", [5, 3], net(split_unevenly, a=conv(3, 8), b=conv(8, 4), parts=[5, 3], axis=1)),
    "a tuple": (
        "shape", (8, 1, 1), net(scale_by_a_view, a=conv(3, 8), b=conv(8, 4), g=torch.rand(8), shape=(8, 1, 1))
    ),
    "a tuple with a place left open": (
        "shape", (-1, 8, 6, 10),
        net(lambda self, x: self.b(self.a(x).flatten(1).view(self.shape)), a=conv(3, 8), b=conv(8, 4),
            shape=(-1, 8, 6, 10)),
    ),
    "a number": ("width", 8, net(one_number_for_two, a=conv(3, 8), c=conv(3, 8), b=conv(16, 4), width=8)),
    "the width of heads": (
        "size", 3, net(heads_that_are_held, a=nn.Linear(3, 36), b=nn.Linear(12, 4), before=nn.Identity(),
                       heads=4, size=3, width=12),
    ),
    "the number of heads": (
        "heads", 4, net(heads_that_are_held, a=nn.Linear(3, 36), b=nn.Linear(12, 4), before=nn.ReLU(),
                        heads=4, size=3, width=12),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_sizes_that_modules_hold_become_those_of_what_is_left(name):
    path, before, model = HELD[name]
    narrow, removed = prune_at_random(randomize(model, EXAMPLE), EXAMPLE)
    owner, _, attribute = path.rpartition(".")
    whole, held = (getattr(each.get_submodule(owner), attribute) for each in (model, narrow))
    assert removed["a"].any()
    assert whole == before, "the network that was given keeps its own"
    assert type(held) is type(before)
    assert all(type(size) is int for size in (held if isinstance(held, tuple | list) else [held]))
    if name == "a list":
        assert sum(before) - sum(held) == removed["a"].sum()
    if isinstance(before, tuple):
        assert [old for old, new in zip(before, held, strict=True) if old != new] == [8], "the channels alone"
    assert name != "a number" or torch.equal(removed["a"], removed["c"]), "one number is the size of both"
    if name == "the width of heads":
        assert (narrow.heads, narrow.width) == (4, 4 * held), "each head becomes narrower"
        assert (removed["a"].view(12, 3) == removed["a"][:3]).all()
    if name == "the number of heads":
        assert (narrow.size, narrow.width) == (3, 3 * held), "whole heads leave"
        assert removed["a"].view(3, 4, 3).sum((0, 2)).unique().tolist() == [0, 9]


def test_a_size_that_is_held_for_what_is_fixed_too_stays():
    """The same number is the size of the input's axis, which loses nothing."""
    model = net(
        lambda self, x: self.b(self.a(x).view(len(x), self.width, 6, 10) + x.view(len(x), self.width, 6, 10).mean()),
        a=conv(3, 3), b=conv(3, 4), width=3,
    )  # fmt: skip
    narrow, removed = prune_at_random(randomize(model, EXAMPLE), EXAMPLE, fraction=0.9)
    assert not removed["a"].any()
    assert narrow.width == 3


def two(self, x, y):
    return self.c(self.a(x) + self.b(y))


@pytest.mark.parametrize(
    ("forward", "example"),
    [
        (two, (EXAMPLE, EXAMPLE + 1)),
        (two, [EXAMPLE, EXAMPLE + 1]),
        (two, {"y": EXAMPLE, "x": EXAMPLE + 1}),
        (lambda self, both: two(self, *both), ([EXAMPLE, EXAMPLE + 1],)),
        (lambda self, both: two(self, both["x"], both["y"]), ({"x": EXAMPLE, "y": EXAMPLE},)),
    ],
    ids=["tuple", "list", "keywords", "a list as the only argument", "a dict as the only argument"],
)
def test_several_inputs(forward, example):
    model = randomize(net(forward, a=conv(3, 8), b=conv(3, 8), c=conv(8, 4)))
    _, removed = prune_at_random(model, example)
    assert removed["a"].any()


def trade_places(self, x):
    """Tied channels stand side by side: of two that are one it matters which is where."""
    p, q = self.a(x), self.c(x)
    return self.d(torch.cat([p, q], 1)[:, 2:6]) + self.b(p + q)


ONE_BY_ONE = torch.full((1, 1, 1, 1), 2.0).double(), torch.ones(1).double()  # a weight and a bias

FIXED = {
    "sigmoid": ("not zero when its filter is (convolution in b)", by(torch.sigmoid)),
    "constant added": ("not zero when its filter is (convolution in b)", by(lambda y: y + 1)),
    "a power with the channels below": ("not zero when its filter is", by(lambda y: (y.abs() + 1) ** -0.5)),
    "a power of channels": ("not zero when its filter is", by(lambda y: 2**y)),
    "a slope of channels": ("not zero when its filter is", by(lambda y: torch.where(y > 0, y, 1.0))),
    "another activation in a narrow network": (
        "the network takes another way then", by(lambda y: y.relu() if y.shape[1] > 7 else y.tanh())
    ),
    "another way for plain numbers": (
        "the network takes another way then",
        net(
            lambda self, x: self.b((y := self.a(x)) + (y.roll(1, 1) if type(self.shift) is int else 0)),
            a=conv(3, 8), b=conv(8, 4), shift=1,
        ),
    ),
    "gates summed over each head": (
        "read where it is not zero when its filter is",
        net(lambda self, x: self.b(self.a(x).unflatten(1, (2, -1)).sigmoid().sum(2)), a=conv(3, 8), b=conv(2, 4)),
    ),
    "softmax over channels": ("compared with other channels (_softmax", by(lambda y: y.softmax(1))),
    "mean over channels": ("averaged or compared", by(lambda y: y * y.mean(1, keepdim=True))),
    "largest of the channels": ("averaged or compared", by(lambda y: y - y.amax(1, keepdim=True))),
    "features that are pooled": (
        "lies along an axis that is pooled",
        net(lambda self, x: self.b(F.max_pool1d(self.a(x[:, :, 0, 0]), 2)), a=nn.Linear(3, 8), b=nn.Linear(4, 4)),
    ),
    "norm of fixed shape": (
        "written into the network (ones",
        by(lambda y: F.layer_norm(y, (8, 6, 10), *torch.ones(2, 8, 6, 10, dtype=y.dtype))),
    ),
    "output": ("network's output", net(lambda self, x: self.a(x), a=conv(3, 8))),
    "added to the input": (
        "meets what is fixed (add", net(lambda self, x: self.b(self.a(x) + x), a=conv(3, 3), b=conv(3, 4))
    ),
    "weight read directly": (
        "weight that is summed over (sum",
        net(lambda self, x: self.b(self.a(x)) * self.a.weight.sum(), a=conv(3, 8), b=conv(8, 4)),
    ),
    "overwritten through a view": (
        "shares its memory (add", net(lambda self, x: (y := self.a(x), y[:, :, 0].add_(1), self.b(y))[2],
                                      a=conv(3, 8), b=conv(8, 4)),
    ),
    "tied channels that trade places": (
        "another place then (slice",
        net(trade_places, a=conv(3, 4), c=conv(3, 4), d=conv(4, 4), b=conv(4, 4)),
    ),
    "an index": (
        "written into the network (index ",
        net(lambda self, x: self.b(self.a(x)[:, self.i]), a=conv(3, 4), b=conv(4, 4), i=torch.arange(4)),
    ),
    "an index of a few": (
        "written into the network (index ",
        net(lambda self, x: self.b(self.a(x)[:, self.i]), a=conv(3, 8), b=conv(2, 4), i=torch.tensor([6, 1])),
    ),
    "a boolean mask": (
        "another place then (index ",
        net(lambda self, x: self.b(self.a(x)[:, self.i]), a=conv(3, 4), b=conv(2, 4), i=torch.arange(4) % 2 == 0),
    ),
    "index_select": (
        "written into the network (index_select",
        net(lambda self, x: self.b(self.a(x).index_select(1, self.i)), a=conv(3, 4), b=conv(4, 4), i=torch.arange(4)),
    ),
    "gather": (
        "not known beforehand (gather",
        net(lambda self, x: self.b(self.a(x).gather(1, self.i.expand(2, -1, 6, 10))), a=conv(3, 4), b=conv(4, 4),
            i=torch.arange(4).view(1, 4, 1, 1)),
    ),
    "a number derived from a shape": ("derived from a shape", by(lambda y: y.relu() * y.shape[1] ** -0.5)),
    "a number derived from two lengths": (
        "derived from a shape", by(lambda y: y * (y.shape[1] + y.shape[2]) ** -0.5)
    ),
    "a root of the width of what is read twice": ("derived from a shape", by(lambda y: y * y.shape[1] ** -0.5 + y)),
    "a root of the width, by a layer used twice": (
        "derived from a shape",
        net(lambda self, x: self.b((y := self.a(x)) * y.shape[1] ** -0.5 + self.a(x)), a=conv(3, 8), b=conv(8, 4)),
    ),
    "a root of the width of what is an output, too": (
        "network's output",
        net(lambda self, x: ((y := self.a(x)), self.b(y * y.shape[1] ** -0.5)), a=conv(3, 8), b=conv(8, 4)),
    ),
    "a root of the width, of channels and numbers along a row": (
        "derived from a shape",
        net(lambda self, x: self.b(self.n((((y := self.a(x)) + self.g) * y.shape[1] ** -0.5).permute(0, 2, 3, 1))),
            a=conv(3, 8), n=nn.LayerNorm(8), b=nn.Linear(8, 4), g=torch.rand(10)),
    ),
    "a root of the width, of channels and numbers of as many places": (
        "derived from a shape",
        net(lambda self, x: self.b(self.n(((y := self.a(x.flatten(2).mT[:, :8])).mT + self.g).mT * y.shape[2] ** -0.5)),
            a=nn.Linear(3, 8), n=nn.LayerNorm(8), b=nn.Linear(8, 4), g=torch.rand(8)),
    ),
    "a root of the width, by a weight turned once for two": (
        "derived from a shape",
        net(lambda self, x: self.b((((y := x.flatten(2).mT) @ (w := self.a.t())) * w.shape[1] ** -0.5) + y.relu() @ w),
            a=torch.rand(8, 3), b=nn.Linear(8, 4)),
    ),
    "a root of the width, where several channels became one": (
        "derived from a shape", by(lambda y: (z := F.pixel_shuffle(y, 2)) * z.shape[1] ** -0.5, 32)
    ),
    "a root of the width, of overlapping parts": (
        "derived from a shape",
        net(lambda self, x: self.b(
            (y := self.a(x.flatten(2).mT))[:, 1:] * y.shape[-1] ** -0.5 + y[:, :-1].relu()
        ), a=nn.Linear(3, 8), b=nn.Linear(8, 4)),
    ),
    "a root of the width, of parts along two axes": (
        "derived from a shape",
        net(lambda self, x: self.b(
            (y := self.a(x.flatten(2).mT))[:, 1:] * y.shape[-1] ** -0.5 + y[1:].relu()[:, 1:]
        ), a=nn.Linear(3, 8), b=nn.Linear(8, 4)),
    ),
    "a root of the width, of a square": (
        "derived from a shape",
        net(lambda self, x: self.b(self.c(x.flatten(2).mT[:, :8]) @ (
            torch.bmm(p := torch.bmm(self.a(x.flatten(2).mT).mT, self.d(x.flatten(2).mT)), p) * p.shape[-1] ** -0.5
        )), a=nn.Linear(3, 8), c=nn.Linear(3, 8), d=nn.Linear(3, 8), b=nn.Linear(8, 4)),
    ),
    "a root of the width, of whole numbers": (
        "derived from a shape", by(lambda y: (z := y.int().double()) * z.shape[1] ** -0.5)
    ),
    "a root of the width, of scores and numbers of each": (
        "derived from a shape",
        net(lambda self, x: self.b(x.flatten(2).mT) * (
            ((y := self.a(x.flatten(2).mT)) @ self.c(x.flatten(2).mT).mT + self.g) * y.shape[2] ** -0.5
        ).sum(2, keepdim=True), a=nn.Linear(3, 8), c=nn.Linear(3, 8), b=nn.Linear(3, 4), g=torch.rand(60)),
    ),
    "a root of the width, of scores that are an output, too": (
        "derived from a shape",
        net(lambda self, x: (p := (y := self.a(x.flatten(2).mT)) @ self.c(x.flatten(2).mT).mT,
                             self.b(x.flatten(2).mT) * (p * y.shape[2] ** -0.5).sum(2, keepdim=True)),
            a=nn.Linear(3, 8), c=nn.Linear(3, 8), b=nn.Linear(3, 4)),
    ),
    "a mean over channels by hand": ("derived from a shape", by(lambda y: y * (y.sum(1, keepdim=True) / y.shape[1]))),
    "a tensor of a number derived from a shape": (
        "derived from a shape", by(lambda y: y * torch.tensor(y.shape[1] ** -0.5, dtype=y.dtype))
    ),
    "a fill of a number derived from a shape": ("derived from a shape", by(lambda y: y * y.new_full((1,), y.shape[1]))),
    "roll of the channels": ("another place then (roll", by(lambda y: y.roll(1, 1))),
    "reshape of fixed size": ("written into the network (view", by(lambda y: y.reshape(2, 8, 60).reshape(2, 8, 6, 10))),
    "slices of fixed size": ("written into the network (slice", by(lambda y: torch.cat([y[:, 4:], y[:, :4]], 1))),
    "split of fixed sizes": ("written into the network (split", by(lambda y: torch.cat(y.split([3, 5], 1), 1))),
    "an operation that is unknown": ("unknown here (cumprod", by(lambda y: y.cumprod(1))),
    "channels as examples of a convolution with a bias": (
        "not zero when its filter is (convolution in b)",
        by(lambda y: F.conv2d(y.reshape(-1, 1, 6, 10), *ONE_BY_ONE).view(y.shape)),
    ),
    "a weight that is computed": (
        "is of a weight that is computed",
        net(lambda self, x: self.b(self.a(x)), a=parametrizations.weight_norm(conv(3, 8)), b=conv(8, 4)),
    ),
    "the places of maxima": (
        "not zero when its filter is", by(lambda y: F.max_pool2d(y, 2, return_indices=True)[1].double())
    ),
    "an output that tells their number": (
        "behind an output that is another", net(
            lambda self, x: (self.b(y := self.a(x)), torch.tensor(y.shape[1])), a=conv(3, 8), b=conv(8, 4)
        ),
    ),
    "a weight that makes channels along both axes": (
        "makes others along another axis", net(
            lambda self, x: self.b(F.linear(F.relu(self.e(F.relu(self.a(x.mean((2, 3)))))), self.e.weight.t())),
            a=nn.Linear(3, 8), e=nn.Linear(8, 6), b=nn.Linear(8, 4),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_what_cannot_be_removed_exactly_is_fixed_and_the_reason_told(name):
    reason, model = FIXED[name]
    model = randomize(model)
    _, removed = prune_at_random(model, EXAMPLE)
    assert not removed["a"].any()
    assert reason in "; ".join(find_channels(model, EXAMPLE).reasons["a"])


@pytest.mark.parametrize("together", [torch.mean, torch.amax])
def test_channels_that_are_averaged_or_compared_within_heads_leave_with_their_head(together):
    """Of two heads in a view that says so none can leave."""
    model = net(lambda self, x: self.b(together(self.a(x).unflatten(1, (2, -1)), 2)), a=conv(3, 8), b=conv(2, 4))
    _, removed = prune_at_random(randomize(model), EXAMPLE)
    assert not removed["a"].any()


def test_a_part_that_has_two_numbers_is_read_twice():
    """The second of two heads is the last; only once is it divided by the root of its width."""

    def forward(self, x):
        heads = self.a(x.flatten(2).mT).view(2, 60, 2, -1)
        return self.b(heads[:, :, -1] * heads.shape[-1] ** -0.5 + heads[:, :, 1].relu())

    model = randomize(net(forward, a=nn.Linear(3, 16), b=nn.Linear(8, 4)))
    narrow, removed = remove_filters(model, EXAMPLE, {"a": [1, 0] * 8})
    check_removal(model, EXAMPLE, narrow, removed)


def test_only_that_is_fixed_where_an_unexpected_size_comes_from():
    """The scale is that of the stream's width: the stream is fixed, the MLP before it is not."""

    def forward(self, x):
        stream = self.a(x).flatten(2).mT  # (N, H * W, 8)
        stream = stream + self.out(F.relu(self.hidden(stream)))
        return self.b(F.relu(F.relu(F.relu(self.q(stream)))) * stream.shape[2] ** -0.5)

    linear = {"hidden": (8, 16), "out": (16, 8), "q": (8, 8), "b": (8, 4)}
    model = net(forward, a=conv(3, 8), **{name: nn.Linear(*sizes) for name, sizes in linear.items()})
    found = find_channels(model, EXAMPLE.float()).filters
    assert found["hidden"].all(), "free"
    assert not any(found[name].any() for name in ("a", "out", "q"))


def test_a_number_of_another_layer_is_found():
    """The shape of c scales what a makes: it is c that has to stay."""
    model = net(
        lambda self, x: self.b(self.a(x) * self.c(x).shape[1] ** -0.5) + self.d(self.c(x)),
        a=conv(3, 8), c=conv(3, 8), b=conv(8, 4), d=conv(8, 4),
    )  # fmt: skip
    _, removed = prune_at_random(randomize(model), EXAMPLE)
    assert not removed["c"].any()


def test_a_table_tells_what_is_fixed_and_why():
    model = net(
        lambda self, x: self.b(self.a(x) + self.c(x)) * torch.sigmoid(self.d(x)),
        a=conv(3, 8), c=conv(3, 8), b=conv(8, 4), d=conv(3, 4),
    )  # fmt: skip
    table = [line.split() for line in explain(model, EXAMPLE.float()).splitlines()]
    assert table[0][:4] == ["layer", "filters", "groups", "fixed"]
    assert table[1] == ["a", "8", "8", "0", "c"]
    assert table[3][:8] == ["b", "4", "0", "4", "is", "the", "network's", "output"]


def test_the_groups_of_a_grouped_convolution_shrink_together():
    model = randomize(through(conv(8, 24, groups=2), 24))
    narrow, removed = prune_at_random(model, EXAMPLE)
    assert torch.equal(removed["a"][:4], removed["a"][4:])
    assert removed["a"].any()
    assert removed["layer"].any()
    assert narrow.layer.groups == 2


def test_shared_weights_shrink_together_or_not_at_all():
    model = net(lambda self, x: self.c(self.b(self.a(x))), a=conv(3, 3), b=conv(3, 3), c=conv(3, 4))
    model.b.weight = model.a.weight
    _, removed = prune_at_random(randomize(model), EXAMPLE)
    assert not removed["a"].any()
    assert not removed["b"].any()
    model = net(lambda self, x: self.c(self.b(F.relu(self.a(x)))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4))
    model.b.bias = model.a.bias
    narrow, removed = prune_at_random(randomize(model), EXAMPLE)
    assert removed["a"].any()
    assert narrow.b.bias is narrow.a.bias


def test_removing_nothing_is_the_identity():
    model, example = torchvision.models.resnet18(), torch.randn(2, 3, 32, 32)
    narrow, removed = remove_filters(model, example, {})
    assert not any(filters.any() for filters in removed.values())
    assert narrow.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in narrow.state_dict().items())


def test_the_model_itself_and_its_mode_are_left_as_they_were():
    model = randomize(PRUNABLE["flatten of a map that is not square"]).eval()
    model.n.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    narrow, removed = remove_filters(model, EXAMPLE, {"a": torch.arange(8) < 4})
    assert removed["a"].any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for one in (model, narrow):
        assert [module.training for module in (one, one.a, one.n)] == [False, False, True]


def test_one_filter_stays_in_every_layer():
    model = randomize(PRUNABLE["flatten of a map that is not square"])
    narrow, removed = remove_filters(model, EXAMPLE, {"a": torch.ones(8, dtype=torch.bool)})
    assert int(removed["a"].sum()) == 7
    assert narrow(EXAMPLE).shape == (2, 4)


def test_a_single_filter_may_be_named_and_stays():
    model = randomize(
        net(lambda self, x: self.b(self.a(x) * torch.sigmoid(self.c(x))), a=conv(3, 8), c=conv(3, 1), b=conv(8, 4))
    )
    _, removed = remove_filters(model, EXAMPLE, {"a": [1] + 7 * [0], "c": [1]})
    assert removed["a"].tolist() == [True] + 7 * [False]
    assert removed["c"].tolist() == [False]
    assert "is its layer's only one" in explain(model, EXAMPLE)


def test_a_weight_used_both_ways_loses_filters_of_its_own_layer():
    model = randomize(FIXED["a weight that makes channels along both axes"][1])
    narrow, removed = remove_filters(model, EXAMPLE, {"e": [1, 1, 0, 0, 0, 0]})
    assert removed["e"].tolist() == [True, True, False, False, False, False]
    check_removal(model, EXAMPLE, narrow, removed)


def test_an_attribute_that_is_a_buffer_too_stays_that():
    model = net(lambda self, x: self.b(self.a(x) * self.alias), a=conv(3, 8), b=conv(8, 4)).double()
    model.register_buffer("scale", torch.rand(8, 1, 1, dtype=torch.double))
    model.alias = model.scale
    narrow, _ = remove_filters(model, EXAMPLE, {"a": [1] + 7 * [0]})
    assert narrow.alias is narrow.scale
    assert narrow(EXAMPLE).shape == (2, 4, 6, 10)


def test_a_network_under_torchs_own_pruning_is_named_and_cut_like_any_other():
    model = through(conv(8, 8, groups=8), 8).double()
    masked = copy.deepcopy(model)
    for layer in (model.a, model.layer, masked.a, masked.layer):
        prune.l1_unstructured(layer, "weight", 0.5)
        prune.l1_unstructured(layer, "bias", 0.5)
    for layer in (masked.a, masked.layer):
        layer.weight_orig.data[:2] = layer.bias_orig.data[:2] = 0
    narrow, removed = remove_filters(model, EXAMPLE, {"a": [1, 1] + 6 * [0]})
    assert removed["a"].tolist() == [True, True] + 6 * [False]
    assert (narrow.a.out_channels, narrow.layer.groups, narrow.layer.weight.shape[0]) == (6, 6, 6)
    torch.testing.assert_close(narrow(EXAMPLE), masked(EXAMPLE), rtol=1e-9, atol=1e-9)
    scores = filter_scores(model, "l1", example=EXAMPLE)
    torch.testing.assert_close(scores["a"], model.a.weight.abs().flatten(1).sum(1))


def test_outputs_that_hold_others():
    model = by(lambda y: y).double()
    dense, narrow = (
        net(lambda self, x: SimpleNamespace(logits=(y := self.body(x)), extra=Output(y + 1)), body=body)
        for body in (model, remove_filters(model, EXAMPLE, {"a": [1] + 7 * [0]})[0])
    )
    again, removed = remove_filters(dense, EXAMPLE, {"body.a": [1] + 7 * [0]})
    assert removed["body.a"].tolist() == [True] + 7 * [False]
    assert torch.equal(again(EXAMPLE).extra.logits, narrow(EXAMPLE).extra.logits)


def test_a_train_mode_that_cannot_be_followed_is_named():
    model = by(lambda y: y)
    model.register_forward_hook(lambda module, args, output: float(output.sum()) if module.training else output)
    with pytest.warns(UserWarning, match="in train mode, which is left out, the network cannot be followed"):
        remove_filters(model, EXAMPLE.float(), {"a": [1] + 7 * [0]})


def test_masks_that_are_held_get_narrow_with_their_weights():
    model = by(F.relu).double()
    masks, optimizer = dense_masks(model), torch.optim.SGD(model.parameters(), 0.1)
    keep_at_zero(model, masks, optimizer)
    update_masks(model, masks, 0.5)
    narrow, _ = remove_filters(model, EXAMPLE, {"a": [1, 0, 1, 0, 0, 0, 0, 0]})
    zeros = [weight == 0 for weight in (narrow.a.weight, narrow.b.weight)]
    optimizer = torch.optim.SGD(narrow.parameters(), 0.1)
    narrow(EXAMPLE).square().sum().backward()
    optimizer.step()
    assert all(
        torch.equal(weight == 0, zero) for weight, zero in zip((narrow.a.weight, narrow.b.weight), zeros, strict=True)
    )
    assert [int(zero.any()) for zero in zeros] == [1, 1]


def test_masks_that_a_part_of_the_network_is_held_by_get_narrow_too():
    model = net(lambda self, x: self.head(self.body(x)), body=by(F.relu), head=conv(4, 2)).double()
    keep_at_zero(model.body, dense_masks(model.body), torch.optim.SGD(model.parameters(), 0.1))
    narrow, _ = remove_filters(model, EXAMPLE, {"body.a": [1, 0, 1, 0, 0, 0, 0, 0]})
    optimizer = torch.optim.SGD(narrow.parameters(), 0.1)
    narrow.head(narrow.body(EXAMPLE)).sum().backward()
    optimizer.step()
    assert len(narrow.body.a.weight) == 6


class Detections:
    def __init__(self, maps):
        self.maps = maps

    def __repr__(self):
        return f"{len(self.maps)} detections"


def test_outputs_that_an_object_has_as_attributes_stay():
    model = by(lambda y: y)
    model.register_forward_hook(lambda module, args, output: Detections([output]))
    _, removed = remove_filters(model, EXAMPLE.float(), {"a": [1] + 7 * [0], "b": [1, 0, 0, 0]})
    assert removed["a"].sum() == 1
    assert not removed["b"].any()


def test_an_output_in_which_no_tensor_is_found_is_refused():
    model = by(lambda y: y)
    model.register_forward_hook(lambda module, args, output: (each for each in [output]))
    with pytest.raises(ValueError, match="the network returns a generator, in which no tensor is found"):
        remove_filters(model, EXAMPLE.float(), {"b": [1, 0, 0, 0]})


def state_in_a_buffer(self, x):
    self.h = torch.tanh(self.a(x.mean((2, 3))) + self.u(self.h))
    return self.b(self.h)


def state_in_an_attribute(self, x):
    y = self.a(x.mean((2, 3)))
    self.h = torch.tanh(y if self.h is None else y + self.u(self.h))
    return self.b(self.h)


def states_in_a_list(self, x):
    states = self.h["all"]
    states.append(torch.relu(self.a(x.mean((2, 3)))))
    return self.b(torch.stack(states[-2:]).mean(0))


STATES = {
    "buffer": lambda: net(state_in_a_buffer, **of_state()),
    "attribute": lambda: net(state_in_an_attribute, **of_state(), h=None),
    "list": lambda: net(states_in_a_list, **of_state(), h={"all": []}),
}


def of_state():
    return {"a": nn.Linear(3, 8), "u": nn.Linear(8, 8), "b": nn.Linear(8, 4)}


@pytest.mark.parametrize("kind", STATES)
def test_what_is_kept_for_the_next_call_stays(kind):
    model = STATES[kind]()
    if kind == "buffer":
        model.register_buffer("h", torch.zeros(1, 8))
    narrow, removed = remove_filters(model, EXAMPLE.float(), {"a": [1, 0] * 4})
    assert not removed["a"].any()
    for _ in range(3):
        assert torch.equal(narrow(EXAMPLE.float()), model(EXAMPLE.float()))


def test_a_network_that_keeps_what_it_computed_can_be_copied():
    model = net(states_in_a_list, **of_state(), h={"all": []})
    model(EXAMPLE.float()).sum().backward()
    remove_filters(model, EXAMPLE.float(), {"a": [1, 0] * 4})
    assert len(model.h["all"]) == 1


def test_channels_of_another_network_are_refused():
    model = by(F.relu)
    channels = find_channels(model, EXAMPLE.float())
    narrow, _ = remove_filters(model, channels, {"a": [1, 0] * 4})
    other = nn.Sequential(conv(3, 8), nn.ReLU())
    for call, tensor in (
        (lambda: remove_filters(narrow, channels, {"a": [1, 0] * 4}), "a.weight"),
        (lambda: filter_scores(narrow, example=channels), "a.weight"),
        (lambda: filter_scores(other, example=channels), "0.weight"),
    ):
        with pytest.raises(ValueError, match=f"found in another network, in which {tensor} has another shape"):
            call()


def test_a_weight_that_the_networks_own_code_makes_is_fixed():
    def forward(self, x):
        self.a.weight = F.dropout(self.w, 0.5, self.training)
        return self.b(self.a(x))

    model = net(forward, a=conv(3, 8), b=conv(8, 4), w=torch.rand(8, 3, 1, 1))
    del model.a.weight
    _, removed = remove_filters(model, EXAMPLE.float(), {"a": [1, 0] * 4})
    assert not removed["a"].any()


def test_filters_of_a_sum_go_together_or_not_at_all():
    model = randomize(PRUNABLE["residual addition"])
    first, both = torch.arange(8) == 2, torch.arange(8) < 3
    assert not remove_filters(model, EXAMPLE, {"a": both})[1]["a"].any()
    _, removed = remove_filters(model, EXAMPLE, {"a": both, "b": first})
    assert removed["a"].tolist() == removed["b"].tolist() == first.tolist()


@pytest.mark.parametrize("marks", [[0, 1, 0, 0, 0, 0, 0, 1], torch.tensor([0, 1, 0, 0, 0, 0, 0, 1])])
def test_marks_may_be_numbers(marks):
    _, removed = remove_filters(randomize(by(F.relu)), EXAMPLE, {"a": marks})
    assert removed["a"].nonzero().flatten().tolist() == [1, 7]


def test_half_precision_and_gradients_that_are_not_wanted():
    model = by(F.relu).half()
    model.a.weight.requires_grad_(False)
    narrow, removed = remove_filters(model, EXAMPLE.half(), {"a": [1] * 3 + [0] * 5})
    assert int(removed["a"].sum()) == 3
    assert narrow.a.weight.dtype == torch.float16
    assert not narrow.a.weight.requires_grad
    assert narrow.b.weight.requires_grad


def test_batch_norms_that_alone_read_a_layer():
    model = net(
        lambda self, x: self.e(self.n(self.a(x)) + self.m(F.max_pool2d(self.b(x), 1)) + self.o(F.relu(self.c(x)))),
        a=conv(3, 8), n=nn.BatchNorm2d(8), b=conv(3, 8), m=nn.BatchNorm2d(8), c=conv(3, 8), o=nn.BatchNorm2d(8),
        e=conv(8, 4),
    )  # fmt: skip
    assert find_channels(model, EXAMPLE.float()).batch_norms == {"a": "n", "b": "m"}
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4))
    assert find_channels(model, torch.randn(2, 3)).batch_norms == {"0": "1", "3": "4"}


@pytest.mark.parametrize(
    ("marked", "message"),
    [({"conv9": torch.ones(3)}, "conv9"), ({"conv1": torch.ones(3)}, r"conv1 has 20 filters.*\(3,\)")],
)
def test_marks_that_do_not_fit_are_named(marked, message):
    with pytest.raises(ValueError, match=message):
        remove_filters(MnistCNN((20, 50, 500)), torch.zeros(1, 1, 28, 28), marked)


def test_a_network_that_cannot_run_is_refused_in_one_line():
    model = by(lambda y: y * 2 if y.sum() > 0 else y)
    with pytest.raises(ValueError, match=r"test_surgery.py:\d+.*meta") as caught:
        find_channels(model, EXAMPLE.float())
    assert "\n" not in str(caught.value)
