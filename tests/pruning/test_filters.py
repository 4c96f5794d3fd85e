"""Norms and cutoffs against hand-computed filters, sizes against networks that were really cut."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from models.cifar_cnn import CifarCNN
from pruning.filters import (
    METHODS,
    THRESHOLD_MODES,
    at_same_rank,
    count_weak,
    filter_scores,
    filters_for_target,
    filters_of,
    filters_to_keep,
    in_float32,
    mark_weakest,
)
from pruning.surgery import find_channels, remove_filters


class Behind(nn.Module):
    """A convolution of three filters and what stands behind it."""

    def __init__(self, *behind):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, (1, 2), bias=False)
        self.conv.weight.data = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]).view(3, 1, 1, 2)  # 5, 1 and 10
        self.behind = nn.Sequential(*behind)
        for layer in behind:
            if isinstance(layer, nn.BatchNorm2d) and layer.affine:
                layer.weight.data = torch.tensor([0.2, -2.0, 0.3])

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
    read = Behind(*behind, nn.Conv2d(3, 1, 1))  # else the filters would be the network's output, and fixed
    assert filter_scores(read, example=torch.randn(2, 1, 4, 5))["conv"].tolist() == pytest.approx(norms)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("pool", ["MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool"])
def test_poolings_of_all_dimensions_are_looked_through(n, pool):
    conv, norm = getattr(nn, f"Conv{n}d"), getattr(nn, f"BatchNorm{n}d")(3)
    norm.weight.data = torch.tensor([1.0, -2.0, 3.0])
    model = nn.Sequential(conv(1, 3, 1), getattr(nn, f"{pool}{n}d")(2), norm, conv(3, 1, 1))
    for example in (None, torch.randn(2, 1, *[4] * n))[: 1 if n == 1 else 2]:  # 1-d ones are several operations
        assert filter_scores(model, "bn_scale", example=example)["0"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("method", "bare", "scaled"),
    [
        ("l1", [7, 1, 14], [1.4, 2, 4.2]),
        ("fpgm", [18**0.5 + 5, 18**0.5 + 85**0.5, 5 + 85**0.5], None),
        ("bn_scale", [1, 1, 1], [0.2, 2, 0.3]),
    ],
)
def test_other_scores_by_hand(method, bare, scaled):
    """Filters (3, 4), (0, 1) and (6, 8); gammas 0.2, -2 and 0.3."""
    assert filter_scores(Behind(), method)["conv"].tolist() == pytest.approx(bare)
    scaled = scaled or [score * gamma for score, gamma in zip(bare, (0.2, 2, 0.3), strict=True)]
    assert filter_scores(Behind(nn.BatchNorm2d(3)), method)["conv"].tolist() == pytest.approx(scaled)


@pytest.mark.parametrize("method", ["l2", "l1", "fpgm", "bn_scale"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, torch.double])
def test_scores_of_other_precisions(method, precision):
    """They are float32 at least, in which groups can be told apart."""
    scores = filter_scores(Behind(nn.BatchNorm2d(3)).to(precision), method)["conv"]
    assert scores.dtype == torch.promote_types(precision, torch.float32)
    torch.testing.assert_close(
        scores.float(), filter_scores(Behind(nn.BatchNorm2d(3)), method)["conv"], rtol=0.02, atol=0
    )


def test_groups_that_float32_cannot_tell_apart_keep_their_order():
    importance = torch.tensor([1 + 2**-24, 3, 1, 1 + 2**-25, 1], dtype=torch.double)
    assert len(importance.float().unique()) == 2
    rounded = in_float32(importance)
    assert rounded[2] == rounded[4] == 1 < rounded[3] < rounded[0] < 1 + 1e-6 < rounded[1] == 3


def test_scores_drawn_at_random():
    torch.manual_seed(0)
    model = CifarCNN()
    l2 = filter_scores(model)
    for method in ("layerwise_random", "random"):
        first, again, other = (filter_scores(model, method, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        for layer in ("conv1", "conv6"):
            assert torch.equal(first[layer], again[layer])
            assert not torch.equal(first[layer], other[layer])
            same_numbers = torch.equal(first[layer].sort().values, l2[layer].sort().values)
            assert same_numbers == (method == "layerwise_random")
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


IMAGES = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A network of pointwise convolutions out of two lines: how it computes, and how many filters of what norms."""

    def __init__(self, forward, classes=2, **norms):
        super().__init__()
        self.compute, c_in = forward, 3
        for name, values in norms.items():
            self.add_module(name, nn.Conv2d(c_in, len(values), 1))
            getattr(self, name).weight.data = torch.zeros(len(values), c_in, 1, 1)
            getattr(self, name).weight.data[:, 0, 0, 0] = torch.tensor(values, dtype=torch.float)
        self.head = nn.Conv2d(len(values), classes, 1)

    def forward(self, x):
        return self.head(self.compute(self, x))


def half(model, method="l2", threshold=0.5, mode="quantile"):
    """How many filters of each layer are marked and removed, when every layer is asked for that part of its filters."""
    scores = filter_scores(model, method, torch.Generator().manual_seed(0), IMAGES, lambda model: [model(IMAGES).sum()])
    _, removed = remove_filters(model, IMAGES, mark_weakest(scores, filters_to_keep(scores, threshold, mode)))
    return {layer: int(filters.sum()) for layer, filters in removed.items()}


def test_tied_filters_share_the_mean_of_their_scores():
    model = Net(lambda self, x: self.a(x) + self.b(x), a=[1, 2, 3, 4], b=[4, 3, 1, 2])
    scores = filter_scores(model, example=IMAGES)
    assert scores.keys() == {"a", "b"}, "the head is the network's output"
    again = filter_scores(model, example=find_channels(model, IMAGES))
    assert all(torch.equal(again[layer], score) for layer, score in scores.items())
    assert scores["a"].tolist() == scores["b"].tolist() == [2.5, 2.5, 2, 3]
    assert filter_scores(model)["a"].tolist() == [1, 2, 3, 4], "without an example each layer stands for itself"


@pytest.mark.parametrize("method", METHODS)
def test_half_of_every_group_is_removed(method):
    """Residual blocks of torchvision's ResNet: layer by layer hardly a group was marked as a whole."""
    model = torchvision.models.resnet18(num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    removed = half(model, method)
    assert all(removed[path] == len(model.get_submodule(path).weight) // 2 for path in removed if path != "fc")
    assert len(removed) == 21


def cat_and_add(self, x):
    """c is tied in part to a, in part to b: groups of two kinds."""
    return torch.cat([self.a(x), self.b(x)], 1) + self.c(x)


def test_a_cutoff_takes_the_same_part_of_every_kind_of_groups():
    """All filters of a are weaker than those of b; still half of each is removed, and of c as many."""
    norms = {"a": [4, 1, 3, 2], "b": [20, 30, 40, 10], "c": [1] * 8}
    model = Net(cat_and_add, **norms)
    assert half(model) == {"a": 2, "b": 2, "c": 4, "head": 0}
    assert half(model, threshold=0.75) == {"a": 3, "b": 3, "c": 6, "head": 0}
    scores = filter_scores(model, example=IMAGES)
    assert scores["a"].argsort().tolist() == [1, 3, 2, 0], "in the order of their norms"
    assert scores["b"].argsort().tolist() == [3, 0, 1, 2]
    assert torch.equal(scores["c"], torch.cat([scores["a"], scores["b"]]))


def test_fixed_filters_leave_a_quantile_its_part_of_the_others():
    """The strongest filters of a are added to the network's input."""
    model = Net(lambda self, x: torch.cat([self.a(x)[:, :3] + x, self.a(x)[:, 3:]], 1), a=[7, 8, 9, 3, 1, 2])
    channels = find_channels(model, IMAGES).filters["a"]
    assert channels[:3].tolist() == [0, 0, 0]
    scores = filter_scores(model, example=IMAGES)["a"]
    assert scores.tolist() == [1, 2, 3, 3, 1, 2]
    marked = mark_weakest({"a": scores}, {"a": 2})["a"]
    assert marked.tolist() == [True, True, False, False, True, True]


def test_all_layers_with_groups_have_scores():
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4 * 30, 5), nn.Linear(5, 2)
    )
    scores = filter_scores(model, example=IMAGES)
    assert list(scores) == ["0", "1", "3"]
    assert scores["0"].tolist() == pytest.approx(model[0].weight[:, :, 0, 0].norm(dim=0).tolist())
    assert scores["3"].tolist() == pytest.approx(model[3].weight.norm(dim=1).tolist())


def test_filters_of_layers_and_of_weights():
    model = nn.Module()
    model.layer, model.attention = nn.ConvTranspose2d(4, 6, (1, 2), groups=2), nn.MultiheadAttention(2, 1)
    model.layer.weight.data = torch.arange(24.0).view(4, 3, 1, 2)
    rows = filters_of(model, "layer")  # filter 3 is the first of the second group, which reads inputs 2 and 3
    assert rows.shape == (6, 4)
    assert rows[0].tolist() == [0, 1, 6, 7]
    assert rows[3].tolist() == [12, 13, 18, 19]
    assert torch.equal(filters_of(model, "attention.in_proj_weight"), model.attention.in_proj_weight)
    assert torch.equal(filters_of(model, "attention.in_proj_weight", 1), model.attention.in_proj_weight.T)


@pytest.mark.parametrize(("product", "norms"), [(lambda x, w: x @ w, [10**0.5, 20**0.5]), (F.linear, [5**0.5, 5])])
def test_filters_of_a_weight_lie_along_the_axis_that_makes_channels(product, norms):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.head = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), nn.Linear(2, 1)

        def forward(self, x):
            return self.head(product(x, self.matrix))

    assert filter_scores(Product(), example=torch.randn(3, 2))["matrix"].tolist() == pytest.approx(norms)


@pytest.mark.parametrize(("scores", "same"), [([7, 9], [2, 4]), ([5, 3, 4], [3, 1, 2]), ([1], [3])])
def test_ranks_are_taken_to_another_number_of_scores_by_hand(scores, same):
    pool = [4.0, 2, 1, 3] if len(scores) != 3 else [3.0, 1, 2]
    assert at_same_rank(torch.tensor(scores), torch.tensor(pool)).tolist() == same


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
        # a has mean 2.5 and standard deviation 1.118, b mean 5.98 and standard deviation 3.747
        ("standardized", 0, {"a": 3, "b": 4}),
        ("standardized", 0.5, {"a": 3, "b": 4}),
        ("standardized", 1, {"a": 2, "b": 2}),
        ("standardized", 9, {"a": 1, "b": 1}),
        ("quantile", 0, {"a": 4, "b": 5}),
        ("quantile", 0.5, {"a": 2, "b": 3}),
        ("quantile", 1, {"a": 1, "b": 1}),
    ],
)
def test_cutoffs_by_hand(mode, threshold, keep):
    assert filters_to_keep(NORMS, threshold, mode) == keep


@pytest.mark.parametrize("filters", [7, 100, 1000])
def test_a_quantile_is_the_decimal_number_that_was_written(filters):
    for hundredths in range(101):
        assert count_weak(torch.ones(filters), hundredths / 100, "quantile") == hundredths * filters // 100


def test_no_filter_is_weaker_than_the_strongest_where_all_are_zero():
    """As at first in residual branches, whose last gamma is initialised to 0."""
    zeros = {"a": torch.zeros(3), "b": torch.tensor([1.0, 3.0])}
    assert filters_to_keep(zeros, 0.5) == {"a": 3, "b": 1}
    assert filters_to_keep(zeros, 0.5, "relative") == {"a": 3, "b": 1}
    assert filters_for_target(zeros, 4, lambda keep: sum(keep.values()), "relative") == (1.0, {"a": 3, "b": 1})


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(ValueError, match="'quantiles'; allowed: standardized, relative, absolute, quantile"):
        filters_to_keep(NORMS, 0.5, "quantiles")
    broken = {"a": torch.tensor([1.0, float("nan")])}
    for mode in THRESHOLD_MODES:
        with pytest.raises(ValueError, match="NaN"):
            filters_to_keep(broken, 0.5, mode)
    with pytest.raises(ValueError, match="NaN"):
        mark_weakest(broken, {"a": 1})
    with pytest.raises(ValueError, match="NaN"):
        filters_for_target(broken, 1, lambda keep: sum(keep.values()))
    with pytest.raises(ValueError, match="round_to 0; allowed: 1 or more"):
        filters_to_keep(NORMS, 0.5, round_to=0)
    with pytest.raises(ValueError, match="not told for a"):
        mark_weakest({"a": torch.ones(3)}, {})


def test_all_filters_may_be_weak():
    assert count_weak(NORMS["a"], 5, "absolute") == 4
    assert count_weak(NORMS["a"], 1, "quantile") == 4
    assert count_weak(torch.zeros(3), 0.5, "relative") == 0


@pytest.mark.parametrize(("round_to", "keep"), [(1, 3), (2, 4), (3, 3), (4, 4), (8, 5)])
def test_rounding_goes_up_as_far_as_there_are_filters(round_to, keep):
    assert filters_to_keep(NORMS, 0.5, "relative", round_to)["b"] == keep
    assert filters_to_keep(NORMS, 99, "absolute", round_to)["b"] == min(round_to, 5)


scores = st.lists(st.floats(0, 100, width=32), min_size=1, max_size=30).map(torch.tensor)


@given(score=scores, low=st.floats(0, 1), high=st.floats(0, 1), mode=st.sampled_from(THRESHOLD_MODES))
def test_a_higher_threshold_never_keeps_more(score, low, high, mode):
    low, high = sorted([low, high])
    assert filters_to_keep({"": score}, low, mode)[""] >= filters_to_keep({"": score}, high, mode)[""] >= 1


@pytest.mark.parametrize("mode", ["standardized", "relative"])
@given(score=scores, threshold=st.floats(0, 1), power=st.integers(-8, 8))
def test_a_layer_times_a_constant_is_cut_alike(score, threshold, power, mode):
    assume(torch.equal(score * 2.0**power / 2.0**power, score))  # no score so near 0 that its last bits are lost
    scaled = {"": score * 2.0**power}
    assert filters_to_keep({"": score}, threshold, mode) == filters_to_keep(scaled, threshold, mode)


def test_scores_may_be_negative():
    """Standardized, they are cut like the same ones moved above 0: -10 alone is far below the mean."""
    score = torch.tensor([-1.0, -1.1, -1.2, -10.0])
    assert filters_to_keep({"": score}, 0.5) == filters_to_keep({"": score + 20}, 0.5) == {"": 3}


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
    """By hand: 3x3 convolutions behind 24 whitening filters, two numbers a filter for BatchNorm, the head."""
    widths = [24, *keep.values()]
    return sum(9 * c_in * c_out + 2 * c_out for c_in, c_out in pairwise(widths)) + 10 * widths[-1]


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("target", [767_936, 600_000, 380_528, 230_000, 100_000])
@pytest.mark.parametrize("mode", THRESHOLD_MODES)
def test_the_largest_network_within_the_target(mode, target):
    model, scores = spread_out(0)
    threshold, keep = filters_for_target(scores, target, size, mode)
    assert 0.995 * target <= size(keep) <= target
    for layer, score in scores.items():  # none fits any more
        assert keep[layer] == len(score) or size({**keep, layer: keep[layer] + 1}) > target
    at_cutoff = filters_to_keep(scores, threshold, mode)
    assert all(keep[layer] >= at_cutoff[layer] for layer in keep), "what passes the cutoff stays"
    lower = filters_to_keep(scores, 0.95 * threshold - 0.05 * (mode == "standardized"), mode)
    assert target == 767_936 or size(lower) > target, "a lower threshold would leave too many"
    narrow, _ = remove_filters(model, torch.randn(1, 3, 28, 28), mark_weakest(scores, keep))
    assert (trainable(narrow), narrow.widths) == (size(keep), tuple(keep.values()))


def test_targets_and_rounding():
    _, scores = spread_out(0)
    _, keep = filters_for_target(scores, 380_528, size, round_to=16)
    assert all(kept % 16 == 0 for kept in keep.values())
    assert 0.95 * 380_528 < size(keep) <= 380_528


def test_what_still_fits_is_kept():
    """A filter of a counts for ten: without it and two of b 11 are left, and with one of the two again just 12."""
    scores = {"a": torch.tensor([0.3, 1.0]), "b": torch.tensor([1.0, 0.1, 0.2])}
    assert filters_for_target(scores, 12, lambda keep: 10 * keep["a"] + keep["b"], "relative") == (
        1.0,
        {"a": 1, "b": 2},
    )
    without = filters_for_target(scores, 12, lambda keep: 10 * keep["a"] + keep["b"], "relative", fill=False)
    assert without == (1.0, {"a": 1, "b": 1})


def test_the_smallest_network_can_be_had_and_nothing_below_it():
    scores = {"a": torch.ones(4), "b": torch.ones(3)}  # all alike: the first of each layer stays
    assert filters_for_target(scores, 2, lambda keep: sum(keep.values())) == (1.0, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="already costs 2"):
        filters_for_target(scores, 1, lambda keep: sum(keep.values()))


class Gated(nn.Module):
    """A convolution with a BatchNorm, one without and a linear layer, whose maps can be scaled one by one."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.b, self.c, self.head = nn.Conv2d(4, 5, 3), nn.Linear(5, 6), nn.Linear(6, 2)
        self.gates = nn.ParameterDict({"a": torch.ones(4, 1, 1), "b": torch.ones(5, 1, 1), "c": torch.ones(6)})

    def forward(self, x):
        x = F.relu(self.norm(self.a(x)) * self.gates["a"], inplace=True)
        x = F.relu_(self.b(x) * self.gates["b"]).mean((2, 3))
        return self.head(torch.tanh(self.c(x) * self.gates["c"]))


def test_taylor_is_the_squared_derivative_by_a_gate():
    """Against finite differences of the loss of each example, and by the formula for BatchNorm."""
    torch.manual_seed(0)
    model = Gated().double()
    nn.init.uniform_(model.norm.weight, -1, 1), nn.init.uniform_(model.norm.bias, -1, 1)
    model.norm.running_mean.uniform_(-1, 1)
    images, labels = torch.randn(7, 3, 8, 8).double(), torch.randint(2, (7,))

    def losses(model, reduction="sum"):
        for some, theirs in zip(images.split(4), labels.split(4), strict=True):
            yield F.cross_entropy(model(some), theirs, reduction=reduction)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = filter_scores(model, "taylor", example=images[:1], losses=losses)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    for layer, gate in model.gates.items():
        for number in range(len(gate)):
            ends = []
            for scale in (1 + 1e-6, 1 - 1e-6):
                gate.data[number] = scale
                ends.append(torch.cat([*losses(model, "none")]).detach())
                gate.data[number] = 1
            by_differences = ((ends[0] - ends[1]) / 2e-6).square().mean()
            assert scores[layer][number].item() == pytest.approx(by_differences.item(), rel=1e-3, abs=1e-9)
    with pytest.raises(ValueError, match="needs losses"):
        filter_scores(model, "taylor", example=images[:1])
    with pytest.raises(ValueError, match="losses yields no batch"):
        filter_scores(model, "taylor", example=images[:1], losses=lambda _: [])


class Functional(nn.Module):
    """A layer whose weight alone is used, perhaps behind a matrix that belongs to no layer."""

    def __init__(self, matrix=None):
        super().__init__()
        self.matrix, self.layer, self.head = matrix, nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = x if self.matrix is None else x @ self.matrix
        return self.head(F.linear(x, self.layer.weight).relu())


def test_taylor_tells_which_layers_it_cannot_see():
    batch = torch.randn(6, 3)

    def losses(model):
        yield model(batch).sum()

    with pytest.raises(ValueError, match="a module's output to look at, which matrix has not"):
        filter_scores(Functional(nn.Parameter(torch.rand(3, 3))), "taylor", example=batch, losses=losses)
    with pytest.raises(ValueError, match="layer does not run in eval mode as a module"):
        filter_scores(Functional(), "taylor", example=batch, losses=losses)
    assert filter_scores(nn.Linear(3, 2), "taylor", example=batch, losses=losses) == {}


def test_scores_of_a_weight_that_is_not_a_layers_lie_along_its_own_axis():
    """Filters are the columns of `x @ matrix`; the layer's are its rows."""
    model = Functional(nn.Parameter(torch.rand(3, 3)))
    scores = filter_scores(model, "l1", example=torch.randn(6, 3))
    assert torch.equal(scores["matrix"], model.matrix.abs().sum(0))
    assert torch.equal(scores["layer"], model.layer.weight.abs().sum(1))
