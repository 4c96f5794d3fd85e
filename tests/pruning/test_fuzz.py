"""A hundred random networks; `python -m benchmarks.fuzz` takes thousands. And the oracle notices what it should."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.pruning import fuzz
from tests.pruning.oracle import difference_from_masked, randomize

few = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@few
@given(st.randoms(use_true_random=False))
def test_random_networks_without_filters_are_the_masked_networks(random):
    fuzz.removal(random, steps=8)


@few
@given(st.randoms(use_true_random=False))
def test_compacted_random_networks_compute_the_same_at_another_image_size(random):
    fuzz.compaction(random, steps=8)


EXAMPLE = torch.randn(3, 2, 5, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
KEPT = torch.tensor([0, 2, 3])


def by_hand(norm, *numbers):
    """A network of four filters, a norm and a reader, and the same without filter 1, its norm with other numbers."""

    def build(filters, norm):
        return nn.Sequential(nn.Conv2d(2, filters, 3), norm, nn.ReLU(), nn.Conv2d(filters, 2, 1))

    dense = randomize(build(4, norm), EXAMPLE)
    narrow = copy.deepcopy(dense)
    narrow[0].weight.data, narrow[0].bias.data = dense[0].weight[KEPT], dense[0].bias[KEPT]
    for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
        if tensor.dim():
            getattr(narrow[1], name).data = tensor.data[KEPT]
    for name, number in numbers:
        setattr(narrow[1], name, number)
    narrow[3].weight.data = dense[3].weight[:, KEPT]
    return dense, narrow


NORMS = {
    "batch": (nn.BatchNorm2d(4),),
    "batch, without gamma": (nn.BatchNorm2d(4, affine=False),),
    "instance": (nn.InstanceNorm2d(4, affine=True), ("num_features", 3)),
    "group": (nn.GroupNorm(1, 4), ("num_channels", 3)),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_oracle_agrees_with_a_filter_taken_out_by_hand(norm, train):
    assert difference_from_masked(*by_hand(*NORMS[norm]), EXAMPLE, train) < 1e-12


def roll(tensor):
    tensor.data = tensor.data.roll(1, 0)


def double(tensor):
    tensor.data *= 2


NAMES = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "3.weight"]


@pytest.mark.parametrize("wrong", [double, roll])
@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_notices_a_wrong_number(name, wrong):
    dense, narrow = by_hand(*NORMS["batch"])
    wrong(narrow.state_dict(keep_vars=True)[name])
    if wrong is double and name in ("0.weight", "3.weight"):
        with pytest.raises(AssertionError, match="was not there before"):
            difference_from_masked(dense, narrow, EXAMPLE)
    else:
        assert difference_from_masked(dense, narrow, EXAMPLE) > 1e-3


def test_the_oracle_notices_what_a_removed_filter_leaves_behind():
    """Zero goes into a sigmoid and a half comes out: without the filter its reader misses that."""
    dense, narrow = by_hand(*NORMS["batch"])
    dense[2], narrow[2] = nn.Sigmoid(), nn.Sigmoid()
    assert difference_from_masked(dense, narrow, EXAMPLE) > 1e-3
