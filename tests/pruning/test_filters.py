"""Norms and cutoffs against hand-computed filters, sizes against networks that were really cut."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from experiment.profiling import parameters
from models.cifar_cnn import CifarCNN
from pruning.filters import (
    count_weak,
    filter_scores,
    filters_for_target,
    filters_to_keep,
    mark_weakest,
)
from pruning.surgery import remove_filters


class Behind(nn.Module):
    """A convolution of three filters and what stands behind it."""

    def __init__(self, *behind):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, (1, 2), bias=False)
        self.conv.weight.data = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]).view(3, 1, 1, 2)  # 5, 1 and 10
        self.behind = nn.Sequential(*behind)
        for layer in behind:
            if isinstance(layer, nn.BatchNorm2d) and layer.affine:
                layer.weight.data = torch.tensor([0.2**0.5, -(8**0.5), 2.7**0.5])

    def forward(self, images):
        return self.behind(self.conv(images))


@pytest.mark.parametrize(
    ("behind", "norms"),
    [
        ([], [5, 1, 10]),
        ([nn.BatchNorm2d(3)], [1, 2, 3]),
        ([nn.MaxPool2d(2), nn.BatchNorm2d(3), nn.ReLU()], [1, 2, 3]),
        ([nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)], [1, 2, 3]),
        ([nn.ReLU(), nn.BatchNorm2d(3)], [5, 1, 10]),  # what ReLU leaves of a filter, its gamma does not tell
    ],
)
def test_norms_by_hand(behind, norms):
    assert filter_scores(Behind(*behind))["conv"].tolist() == pytest.approx(norms)


@pytest.mark.parametrize(
    ("method", "bare", "scaled"),
    [
        ("l1", [7, 1, 14], [1.4 ** (1 / 3), 2, 37.8 ** (1 / 3)]),
        ("fpgm", [18**0.5 + 5, 18**0.5 + 85**0.5, 5 + 85**0.5], None),
        ("bn_scale", [1, 1, 1], [0.2**0.5, 8**0.5, 2.7**0.5]),
    ],
)
def test_other_scores_by_hand(method, bare, scaled):
    """Filters (3, 4), (0, 1) and (6, 8); gammas of squares 0.2, 8 and 2.7."""
    assert filter_scores(Behind(), method)["conv"].tolist() == pytest.approx(bare)
    scaled = scaled or [(score * square) ** (1 / 3) for score, square in zip(bare, (0.2, 8, 2.7), strict=True)]
    assert filter_scores(Behind(nn.BatchNorm2d(3)), method)["conv"].tolist() == pytest.approx(scaled)


def test_scores_drawn_at_random():
    torch.manual_seed(0)
    model = CifarCNN()
    l2 = filter_scores(model)
    for method in ("shuffled", "random"):
        first, again, other = (filter_scores(model, method, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        for layer in ("conv1", "conv6"):
            assert torch.equal(first[layer], again[layer])
            assert not torch.equal(first[layer], other[layer])
            same_numbers = torch.equal(first[layer].sort().values, l2[layer].sort().values)
            assert same_numbers == (method == "shuffled")
            assert not torch.equal(first[layer], l2[layer])
    with pytest.raises(ValueError, match="allowed: l2, l1"):
        filter_scores(model, "chance")


def test_a_batch_norm_that_is_not_alone_does_not_count():
    class Twice(Behind):
        def forward(self, images):
            maps = self.conv(images)
            return self.behind(maps) + maps

    assert filter_scores(Twice(nn.BatchNorm2d(3)))["conv"].tolist() == pytest.approx([5, 1, 10])
    assert filter_scores(Behind(nn.BatchNorm2d(3, affine=False)))["conv"].tolist() == pytest.approx([5, 1, 10])


def test_only_convolutions_that_make_channels_have_scores():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=6), nn.Conv2d(6, 4, 1, groups=2), nn.Linear(4, 4)
    )
    assert filter_scores(model).keys() == {"0"}
    layers = ["whitening", *(f"conv{layer}" for layer in range(1, 7))]
    assert list(filter_scores(CifarCNN())) == layers


NORMS = {"a": torch.tensor([1.0, 4.0, 2.0, 3.0]), "b": torch.tensor([10.0, 10.0, 4.9, 5.0, 0.0])}


@pytest.mark.parametrize(
    ("mode", "threshold", "keep"),
    [
        ("relative", 0, {"a": 4, "b": 5}),
        ("relative", 0.5, {"a": 3, "b": 3}),  # 2.0 and 5.0 are not below the cutoff
        ("relative", 1, {"a": 1, "b": 2}),
        ("absolute", 0, {"a": 4, "b": 5}),
        ("absolute", 2.5, {"a": 2, "b": 4}),
        ("absolute", 5, {"a": 1, "b": 3}),  # all of a is below: its strongest stays
        ("quantile", 0, {"a": 4, "b": 5}),
        ("quantile", 0.5, {"a": 2, "b": 3}),
        ("quantile", 1, {"a": 1, "b": 1}),
    ],
)
def test_cutoffs_by_hand(mode, threshold, keep):
    assert filters_to_keep(NORMS, threshold, mode) == keep


def test_all_filters_may_be_weak():
    assert count_weak(NORMS["a"], 5, "absolute") == 4
    assert count_weak(NORMS["a"], 1, "quantile") == 4
    assert count_weak(torch.zeros(3), 0.5, "relative") == 0


@pytest.mark.parametrize(("round_to", "keep"), [(1, 3), (2, 4), (3, 3), (4, 4), (8, 5)])
def test_rounding_goes_up_as_far_as_there_are_filters(round_to, keep):
    assert filters_to_keep(NORMS, 0.5, round_to=round_to)["b"] == keep
    assert filters_to_keep(NORMS, 99, "absolute", round_to)["b"] == min(round_to, 5)


scores = st.lists(st.floats(0, 100, width=32), min_size=1, max_size=30).map(torch.tensor)


@given(
    score=scores, low=st.floats(0, 1), high=st.floats(0, 1), mode=st.sampled_from(["relative", "absolute", "quantile"])
)
def test_a_higher_threshold_never_keeps_more(score, low, high, mode):
    low, high = sorted([low, high])
    assert filters_to_keep({"": score}, low, mode)[""] >= filters_to_keep({"": score}, high, mode)[""] >= 1


@given(score=scores, threshold=st.floats(0, 1), power=st.integers(-8, 8))
def test_a_layer_times_a_constant_is_cut_alike(score, threshold, power):
    assume(torch.equal(score * 2.0**power / 2.0**power, score))  # no score so near 0 that its last bits are lost
    assert filters_to_keep({"": score}, threshold) == filters_to_keep({"": score * 2.0**power}, threshold)


@given(score=scores, data=st.data())
def test_the_weakest_are_marked_and_ties_fall_to_the_last(score, data):
    keep = data.draw(st.integers(1, len(score)))
    marked = mark_weakest({"": score}, {"": keep})[""]
    order = sorted(range(len(score)), key=lambda index: (-score[index].item(), index))
    assert marked.nonzero().flatten().tolist() == sorted(order[keep:])


def spread_out(seed):
    """A network whose filters differ, as after training."""
    torch.manual_seed(seed)
    model = CifarCNN()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.05, 2)
    scores = filter_scores(model)
    del scores["whitening"]
    return model, scores


def size(keep):
    return parameters(CifarCNN(list(keep.values())))


@pytest.mark.parametrize("target", [767_936, 600_000, 380_528, 230_000, 100_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_largest_network_within_the_target(seed, target):
    model, scores = spread_out(seed)
    threshold, keep = filters_for_target(scores, target, size)
    assert 0.995 * target <= size(keep) <= target
    for layer, score in scores.items():  # none fits any more
        assert keep[layer] == len(score) or size({**keep, layer: keep[layer] + 1}) > target
    at_cutoff = filters_to_keep(scores, threshold)
    assert all(keep[layer] >= at_cutoff[layer] for layer in keep), "what passes the cutoff stays"
    lower = filters_to_keep(scores, threshold * 0.98)
    assert target == 767_936 or size(lower) > target, "a lower threshold would leave too many"
    narrow, _ = remove_filters(model, torch.randn(1, 3, 28, 28), mark_weakest(scores, keep))
    assert (parameters(narrow), narrow.widths) == (size(keep), tuple(keep.values()))


def test_targets_and_rounding():
    _, scores = spread_out(0)
    _, keep = filters_for_target(scores, 380_528, size, round_to=16)
    assert all(kept % 16 == 0 for kept in keep.values())
    assert 0.95 * 380_528 < size(keep) <= 380_528


def test_the_smallest_network_can_be_had_and_nothing_below_it():
    scores = {"a": torch.ones(4), "b": torch.ones(3)}  # all alike: the first of each layer stays
    assert filters_for_target(scores, 2, lambda keep: sum(keep.values())) == (1.0, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="already makes 2 parameters"):
        filters_for_target(scores, 1, lambda keep: sum(keep.values()))
