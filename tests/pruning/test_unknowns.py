import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning.unknowns import Unknowns

NAN = math.nan


def outcome(function, x, constants):
    x = torch.tensor(x, dtype=torch.double)
    with torch.no_grad(), Unknowns(constants):
        return function(x)


def weights(*rows):
    return nn.Parameter(torch.tensor(rows, dtype=torch.double))


def maps(*channels):
    """A batch of one image `(1, C, 3, 3)` of constant channels; an "edge" has another number in a corner."""
    image = torch.ones(1, len(channels), 3, 3).double()
    for index, value in enumerate(channels):
        image[0, index] = 2.0 if value == "edge" else value
        if value == "edge":
            image[0, index, 0, 0] = 1.0
    return image.tolist()


def in_place(x):
    y = x.clone()
    y[:, :1].relu_()
    return y


def copied_into(x):
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    return y


def written_through_a_view(x):
    y = torch.zeros(1, 2, dtype=torch.int64)
    y[:, 0] = x.argmax(1)
    return y.double()


def norm(x, gamma):
    zeros, ones = torch.zeros(2).double(), torch.ones(2).double()
    return F.batch_norm(x, zeros, ones, gamma, ones, eps=0.0)


BOTH = (False, True)


@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        (lambda x: x + 1, [[NAN, 2]], [[NAN, 3]]),
        (lambda x: x.sign(), [[NAN, 2]], [[NAN, 1]]),  # which is 0 of NaN
        (lambda x: (x > 1).double(), [[NAN, 2]], [[NAN, NAN]]),
        (lambda x: torch.where(x > 1, 1.0, 2.0), [[NAN, 2]], [[NAN, NAN]]),
        (lambda x: torch.where(x > 1, 1.0, 2.0), [[0, 2]], [[2, 1]]),
        (lambda x: x.to(torch.int64).to(torch.double), [[NAN, 2]], [[NAN, NAN]]),
        (lambda x: (x.to(torch.int64) + 1).double(), [[NAN, 2]], [[NAN, NAN]]),
        (lambda x: torch.zeros(2).index_fill(0, x.argmax(1), 1.0), [[NAN, 2]], [NAN, NAN]),
        (lambda x: x.softmax(1), [[NAN, 2]], [[NAN, NAN]]),
        (lambda x: x.nansum(1), [[NAN, 2]], [NAN]),
        (lambda x: x.clone().zero_(), [[NAN, 2]], [[NAN, NAN]]),
        (lambda x: torch.rand_like(x), [[1, 2]], [[NAN, NAN]]),
        (lambda x: torch.ones(2), [[NAN, 2]], [1, 1]),
        (lambda x: x.t().reshape(-1)[1:], [[NAN, 2]], [2]),
        (lambda x: torch.cat([x, torch.ones(1, 1)], 1), [[NAN, 2]], [[NAN, 2, 1]]),
        (in_place, [[NAN, -2]], [[NAN, -2]]),
        (in_place, [[-1, NAN]], [[0, NAN]]),
        (copied_into, [[NAN, 2]], [[0, NAN]]),
        (lambda x: F.linear(x, weights([1, 0], [0, 2])), [[NAN, 3]], [[NAN, 6]]),
        (lambda x: F.linear(x, weights([1, 0], [0, 2]), torch.ones(2).double()), [[NAN, 3]], [[NAN, 7]]),
        (lambda x: F.linear(x, weights([NAN, 0], [0, 2])), [[0, 3]], [[NAN, 6]]),
        (lambda x: x @ torch.tensor([[1.0, 0], [0, 2]]).double(), [[NAN, 3]], [[NAN, NAN]]),  # no weights of a layer
        (lambda x: F.conv2d(x, weights([[[1]], [[0]]], [[[0]], [[2]]])), maps(NAN, 3), maps(NAN, 6)),
        (lambda x: F.conv2d(x, weights([[[1]]], [[[2]]]), groups=2), maps(NAN, 3), maps(NAN, 6)),
        (lambda x: F.conv2d(x, weights([[[2]]], [[[0]]]), groups=2), maps(3, NAN), maps(6, 0)),
        (lambda x: F.conv2d(x, torch.zeros(1, 2, 1, 1).double()), maps(NAN, 3), maps(NAN)),
        (lambda x: F.conv_transpose2d(x, weights([[[0]], [[0]]], [[[0]], [[2]]])), maps(NAN, 0), maps(0, 0)),
        (lambda x: F.conv_transpose2d(x, weights([[[1]], [[0]]], [[[0]], [[2]]])), maps(0, NAN), maps(0, NAN)),
        (lambda x: F.conv_transpose2d(x, weights([[[1]]], [[[2]]]), groups=2), maps(0, NAN), maps(0, NAN)),
        (lambda x: F.max_pool2d(x, 3), maps(NAN, 3), [[[[NAN]], [[3]]]]),
        (lambda x: F.max_pool2d(x, 3, return_indices=True)[1].double(), maps(NAN, 3), [[[[NAN]], [[NAN]]]]),
        (lambda x: F.avg_pool2d(x, 3), maps(NAN, 3), [[[[NAN]], [[3]]]]),
        (lambda x: F.adaptive_avg_pool2d(x, 2), maps(NAN, 3), [[[[NAN] * 2] * 2, [[3] * 2] * 2]]),
        (lambda x: F.interpolate(x, 1), maps(NAN, 3), [[[[NAN]], [[3]]]]),
        (lambda x: x.mean((2, 3)), maps(NAN, 3), [[NAN, 3]]),
        (lambda x: x.amax((2, 3), keepdim=True), maps(NAN, 3), [[[[NAN]], [[3]]]]),
        (lambda x: x.mean(), maps(3, 3), 3),
        (lambda x: F.hardswish(x), [[NAN, 3]], [[NAN, 3]]),
        (lambda x: F.prelu(x, torch.tensor([0.5]).double()), [[NAN, -2]], [[NAN, -1]]),
        (
            lambda x: F.batch_norm(x, torch.zeros(2).double(), torch.ones(2).double(), eps=0.0),
            maps(NAN, 3),
            maps(NAN, 3),
        ),
        (lambda x: norm(x, weights(0, 2)), maps(NAN, 3), maps(1, 7)),
        (lambda x: norm(x, weights(1, 0)), maps(NAN, 3), maps(NAN, 1)),
        (lambda x: norm(x, torch.tensor([0, 2]).double()), maps(NAN, 3), maps(NAN, 7)),  # computed, no weight
        (lambda x: F.batch_norm(x, None, None, training=True), maps(NAN, 3), maps(NAN, NAN)),
        (lambda x: (x > 0).mean(1, dtype=torch.double), [[NAN, 2]], [NAN]),
        (lambda x: x * (x > 1), [[NAN, 2]], [[NAN, NAN]]),
        (written_through_a_view, [[NAN, 2]], [[NAN, NAN]]),
    ],
)
@pytest.mark.parametrize("constants", BOTH)
def test_what_is_unknown_after_an_operation(function, x, expected, constants):
    torch.testing.assert_close(
        outcome(function, x, constants), torch.tensor(expected), equal_nan=True, check_dtype=False
    )


@pytest.mark.parametrize(
    ("function", "x", "constant", "other"),
    [
        (lambda x: x[:, :1] * x[:, 1:], [[NAN, 0]], [[0]], [[NAN]]),
        (lambda x: x.clone().mul_(0), [[NAN, 1]], [[0, 0]], [[NAN, 0]]),
        (lambda x: F.conv2d(x, weights([[[1]], [[1]]]), padding=1).amax((2, 3)), maps(1, 0), [[NAN]], [[1]]),
        (lambda x: F.conv2d(x, weights([[[1]], [[0]]]), padding=1).amax((2, 3)), maps(0, 1), [[0]], [[0]]),
        (lambda x: F.conv_transpose2d(x, weights([[[1]]], [[[1]]])).amax((2, 3)), maps(1, 0), [[NAN]], [[1]]),
        (
            lambda x: F.conv2d(x, weights([[[1]]], [[[1]]]), groups=2).amax((2, 3)),
            maps("edge", 1),
            [[NAN, 1]],
            [[2, 1]],
        ),
        (lambda x: F.max_pool2d(x, 3), maps("edge", 1), [[[[NAN]], [[1]]]], [[[[2]], [[1]]]]),
        (lambda x: F.avg_pool2d(x, 3, 3, 1).amax((2, 3)), maps(1, 0), [[NAN, 0]], [[4 / 9, 0]]),
        (lambda x: F.avg_pool2d(x, 3, divisor_override=3), maps(1, 0), [[[[NAN]], [[0]]]], [[[[3]], [[0]]]]),
        (lambda x: F.interpolate(x, 1), maps("edge", 1), [[[[NAN]], [[1]]]], [[[[1]], [[1]]]]),
        (lambda x: x.amax((2, 3)), maps("edge", 1), [[NAN, 1]], [[2, 1]]),
        (lambda x: x.mean((2, 3), True), maps("edge", 1), [[[[NAN]], [[1]]]], [[[[17 / 9]], [[1]]]]),
        (lambda x: x.mean(), maps(1, 2), NAN, 1.5),
    ],
)
def test_what_is_the_same_at_any_size(function, x, constant, other):
    for constants, expected in ((True, constant), (False, other)):
        torch.testing.assert_close(
            outcome(function, x, constants), torch.tensor(expected), equal_nan=True, check_dtype=False
        )


@pytest.mark.parametrize(
    "function", [lambda x: x if x.sum() > 0 else -x, lambda x: x.nonzero(), lambda x: float(x[0, 0])]
)
def test_code_that_depends_on_unknown_numbers_is_refused(function):
    with pytest.raises(ValueError, match="the network's code depends on"):
        outcome(function, [[NAN, 1]], True)
    outcome(function, [[2, 1]], True)


def test_uses_are_counted():
    layer, mode = nn.Linear(2, 2), Unknowns(constants=True)
    with torch.no_grad(), mode:
        layer(F.linear(torch.ones(1, 2), layer.weight))
    assert mode.uses[id(layer.weight)] == 2
    assert mode.uses[id(layer.bias)] == 1
