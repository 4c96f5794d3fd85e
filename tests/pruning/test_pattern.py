"""N:M patterns against hand arithmetic, torch.ao.pruning and the format that the hardware reads."""

import doctest

import pytest
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from models.mnist_cnn import MnistCNN
from pruning import pattern
from pruning.magnitude import dense_masks, sparsity, update_masks


def linear(*rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer


def left(mask, size, axis=1):
    """How many of each group of neighbouring inputs are left."""
    return mask.movedim(axis, -1).unflatten(-1, (-1, size)).sum(-1)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(pattern) == (0, 5)


@pytest.mark.parametrize("scope", ["0:4", "4:4", "5:4", "2:", "2:4:8", "-1:4", "2:4 ", "2.0:4", "lamp", ""])
def test_what_is_no_pattern(scope):
    assert pattern.parse(scope) is None


def test_by_hand():
    layer = linear([1.0, -4.0, 3.0, 2.0, 5.0, -5.0, 5.0, 0.0])
    masks = dense_masks(layer)
    update_masks(layer, masks, 2 / 8, "2:4")  # 0 and 1 are the weakest, and 2 of the strongest of no four
    assert masks["weight"].int().tolist() == [[0, 1, 1, 1, 1, 1, 1, 0]]
    update_masks(layer, masks, 4 / 8, "2:4")  # of equals the earlier falls
    assert masks["weight"].int().tolist() == [[0, 1, 1, 0, 0, 1, 1, 0]]
    update_masks(layer, masks, 5 / 8, "2:4")  # sparser than the pattern: the weakest of those that it has left
    assert masks["weight"].int().tolist() == [[0, 1, 0, 0, 0, 1, 1, 0]]
    assert layer.weight.tolist() == [[0, -4, 0, 0, 0, -5, 5, 0]]


def test_neighbours_are_channels_at_the_same_place_of_a_kernel():
    conv = nn.Conv2d(4, 1, (1, 2), bias=False)
    conv.weight.data = torch.tensor([[8.0, 1.0], [7.0, 2.0], [6.0, 3.0], [5.0, 4.0]]).view(1, 4, 1, 2)
    masks = dense_masks(conv.to(memory_format=torch.channels_last))
    update_masks(conv, masks, 0.5, "2:4")
    assert masks["weight"].view(4, 2).int().tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("layer", "axis"),
    [
        (nn.Conv1d(8, 6, 3), 1),
        (nn.Conv2d(16, 4, 3, groups=2), 1),
        (nn.Conv3d(4, 2, 2), 1),
        (nn.ConvTranspose2d(8, 6, 3), 0),
        (nn.ConvTranspose1d(16, 4, 3, groups=4), 0),
        (nn.Linear(20, 3).half(), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize(("scope", "fraction"), [("1:4", 0.75), ("2:4", 0.5), ("3:4", 0.25), ("1:2", 0.5)])
@pytest.mark.parametrize("method", ["magnitude", "obd", "random"])
def test_every_group_keeps_as_many_in_any_layer(layer, axis, scope, fraction, method):
    torch.manual_seed(0)
    layer.reset_parameters()
    masks, kept, size = dense_masks(layer), *pattern.parse(scope)
    squares = {"weight": torch.rand_like(layer.weight, dtype=torch.float32)}
    for part in (fraction / 3, fraction):
        update_masks(layer, masks, part, scope, method, torch.Generator().manual_seed(0), squares)
        assert sparsity(layer) == round(part * layer.weight.numel()) / layer.weight.numel()
    assert (left(masks["weight"], size, axis) == kept).all()


@pytest.mark.parametrize("layer", [nn.Linear(6, 3), nn.Conv2d(1, 5, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(3, 4)])
def test_layers_without_whole_groups_are_left_as_they_are(layer):
    model = nn.Sequential(layer, nn.Linear(8, 2))
    masks = dense_masks(model)
    update_masks(model, masks, 0.5, "2:4")
    assert masks["0.weight"].all()
    assert masks["1.weight"].sum() == 8


def test_a_pattern_that_fits_no_layer_is_refused():
    model = MnistCNN()
    with pytest.raises(ValueError, match="1:3 fits no layer; allowed: an M that divides one of 1, 20, 800, 500"):
        update_masks(model, dense_masks(model), 0.7, "1:3")


def test_infinity_is_the_strongest():
    layer = linear([1.0, float("inf"), 2.0, float("-inf")], [3.0, 1.0, float("inf"), 2.0])
    masks = dense_masks(layer)
    for fraction, expected in ((0.25, [[0, 1, 1, 1], [1, 0, 1, 1]]), (0.5, [[0, 1, 0, 1], [1, 0, 1, 0]])):
        update_masks(layer, masks, fraction, "2:4")
        assert masks["weight"].int().tolist() == expected


def test_lenet_keeps_its_first_layer_and_half_of_the_others():
    torch.manual_seed(0)
    model = MnistCNN()
    masks = dense_masks(model)
    for fraction in (0.1, 0.3, 0.5):
        update_masks(model, masks, fraction, "2:4")
        assert sparsity(model) == pytest.approx(fraction * 430_000 / 430_500, abs=3 / 430_500)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "conv1.weight": 500,
        "conv2.weight": 12_500,
        "fc1.weight": 200_000,
        "fc2.weight": 2_500,
    }
    assert all((left(mask, 4) == 2).all() for name, mask in masks.items() if name != "conv1.weight")


def test_masks_of_another_scope_may_come_before():
    torch.manual_seed(0)
    layer = nn.Linear(32, 8)
    masks = dense_masks(layer)
    update_masks(layer, masks, 0.3)
    before = masks["weight"].clone()
    update_masks(layer, masks, 0.5, "2:4")
    assert (left(masks["weight"], 4) <= 2).all()
    assert not (masks["weight"] & ~before).any(), "a pruned weight stays pruned"
    assert sparsity(layer) >= 0.5


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_nan_is_refused_and_nothing_is_pruned(fraction):
    layer = linear([1.0, float("nan"), 3.0, 2.0, 5.0, -5.0, 5.0, 0.0])
    masks = dense_masks(layer)
    with pytest.raises(ValueError, match="weight: a weight or its squared gradient is NaN"):
        update_masks(layer, masks, fraction, "2:4")
    assert masks["weight"].all()
    masks["weight"][0, 1] = False  # masked, it is not ranked, and becomes 0
    update_masks(layer, masks, fraction, "2:4")
    assert masks["weight"].int().tolist() in ([[1, 0, 1, 1, 1, 1, 1, 0]], [[0, 0, 1, 1, 0, 1, 1, 0]])


def test_equal_weights_are_cut_to_the_exact_number_too():
    layer = nn.Linear(16, 3)
    nn.init.constant_(layer.weight, 0.0)
    masks = dense_masks(layer)
    for fraction in (0.2, 0.5, 0.7):
        update_masks(layer, masks, fraction, "2:4")
        assert masks["weight"].sum() == 48 - round(fraction * 48)
    assert (left(masks["weight"], 4) <= 2).all()


def test_as_torch_ao_pruning():
    torch.manual_seed(0)
    ours, theirs = nn.Sequential(nn.Linear(40, 30)), nn.Sequential(nn.Linear(40, 30))
    theirs.load_state_dict(ours.state_dict())
    update_masks(ours, dense_masks(ours), 0.5, "2:4")
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(theirs, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(ours[0].weight, theirs[0].weight)


def test_the_format_of_the_hardware_holds_all_that_is_left():
    """Two values and two places for each four; of another pattern it would lose some."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)
    update_masks(layer, dense_masks(layer), 0.5, "2:4")
    weight = layer.weight.detach().half()
    values, places = sparse_semi_structured_from_dense_cutlass(weight)
    assert values.shape == (64, 64)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, places), weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_semi_structured_tensors_where_there_is_a_cuda_device():
    torch.manual_seed(0)
    layer = nn.Linear(128, 64, bias=False).cuda().half()
    update_masks(layer, dense_masks(layer), 0.5, "2:4")
    images = torch.randn(128, 128, device="cuda", dtype=torch.float16)
    expected = layer(images)
    layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()))
    torch.testing.assert_close(layer(images), expected, rtol=1e-2, atol=1e-2)
