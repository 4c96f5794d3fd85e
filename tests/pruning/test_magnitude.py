import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from models.mnist_cnn import MnistCNN
from pruning.magnitude import (
    SCOPES,
    average_squared_gradients,
    dense_masks,
    keep_at_zero,
    keep_strongest,
    lamp_scores,
    make_permanent,
    prunable_weights,
    sparsity,
    update_masks,
)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 6, 3))


def linear(*rows):
    layer = nn.Linear(len(rows[0]), len(rows))
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer


def pruned(model, *sparsities, scope="global"):
    masks = dense_masks(model)
    for fraction in sparsities:
        update_masks(model, masks, fraction, scope)
    return masks


def test_biases_and_normalisation_are_never_pruned_and_shared_weights_count_once():
    model = small_net()
    assert list(prunable_weights(model)) == ["0.weight", "4.weight"]
    others = {name: value.clone() for name, value in model.named_parameters() if name not in ("0.weight", "4.weight")}
    pruned(model, 0.99)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in others.items())

    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert list(prunable_weights(tied)) == ["0.weight"]


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.9, 0.98, 0.99, 0.995])
def test_lenet_loses_exactly_the_rounded_number_of_weights(fraction):
    torch.manual_seed(0)
    model = MnistCNN()
    masks = pruned(model, fraction)
    weights = prunable_weights(model).values()
    assert sum(int((weight == 0).sum()) for weight in weights) == round(fraction * 430_500)
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(fraction * 430_500)
    assert sparsity(model) == round(fraction * 430_500) / 430_500


def test_ties_fall_by_position():
    model = nn.Sequential(linear([1.0, -1.0, 2.0, 1.0]), linear([1.0], [1.0]))
    masks = pruned(model, 0.5)
    assert masks["0.weight"].tolist() == [[False, False, True, False]]
    assert masks["1.weight"].tolist() == [[True], [True]]


@pytest.mark.parametrize("scope", SCOPES)
def test_equal_weights_are_cut_to_the_exact_number_too(scope):
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    for weight in prunable_weights(model).values():
        nn.init.constant_(weight, 0.1)
    pruned(model, 0.37, scope=scope)
    assert sparsity(model) == 0.37


@pytest.mark.parametrize("scope", SCOPES)
def test_every_layer_keeps_its_strongest_weight(scope):
    model = nn.Sequential(nn.Linear(100, 100), linear([1e-9, 2e-9, 1e-9]), linear([0.0, 0.0]))
    masks = pruned(model, 0.99999, scope=scope)
    assert [int(mask.sum()) for mask in masks.values()] == [1, 1, 1]
    assert masks["1.weight"].tolist() == [[False, True, False]]
    assert masks["2.weight"].sum() == 1  # alive, though its value happens to be 0


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_gone_stays_gone(scope):
    model = small_net()
    masks, before = dense_masks(model), None
    for fraction in (0.1, 0.1, 0.4, 0.8, 0.95):
        update_masks(model, masks, fraction, scope)
        if before is not None:
            assert not any((masks[name] & ~before[name]).any() for name in masks)
        before = copy.deepcopy(masks)
        for name, weight in prunable_weights(model).items():  # even if somebody revives it, stronger than all others
            weight.data[~masks[name]] = 100.0
        gone, size = sum(int((~mask).sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
        assert gone == pytest.approx(fraction * size, abs=1)  # each of the two layers is rounded on its own
    update_masks(model, masks, 0.5, scope)
    assert all(torch.equal(masks[name], before[name]) for name in masks)


def test_global_scope_agrees_with_torch():
    ours, theirs = small_net(), small_net()
    masks = pruned(ours, 0.6)
    prune.global_unstructured([(theirs[0], "weight"), (theirs[4], "weight")], prune.L1Unstructured, amount=0.6)
    assert torch.equal(masks["0.weight"], theirs[0].weight_mask.bool())
    assert torch.equal(masks["4.weight"], theirs[4].weight_mask.bool())
    assert torch.equal(ours[0].weight, theirs[0].weight)


def test_layer_scope_agrees_with_torch():
    ours, theirs = small_net(), small_net()
    masks = pruned(ours, 0.25, scope="layer")
    for name, layer in (("0.weight", theirs[0]), ("4.weight", theirs[4])):
        prune.l1_unstructured(layer, "weight", amount=0.25)
        assert torch.equal(masks[name], layer.weight_mask.bool())


def test_lamp_scores_by_hand():
    scores = lamp_scores(torch.tensor([[1.0, -2.0], [2.0, 0.0]]))
    assert scores.tolist() == pytest.approx([1 / 9, 4 / 8, 4 / 4, 0])
    assert lamp_scores(torch.zeros(3)).tolist() == [0, 0, 0]


def test_lamp_prunes_by_the_share_of_the_layer_not_by_size():
    """0.1 and 0.2 among small weights matter more to their layer than 1 among large ones: 1/2 and 4/5 against 1/26."""
    model = nn.Sequential(linear([1.0], [5.0]), linear([0.1, 0.2]))
    masks = pruned(model, 0.25, scope="lamp")
    assert masks["0.weight"].flatten().tolist() == [False, True]
    assert masks["1.weight"].flatten().tolist() == [True, True]


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_are_zero_after_every_step_of_any_optimizer(name):
    model, images, labels = small_net(), torch.randn(8, 1, 6, 8), torch.arange(8) % 3
    optimizer = OPTIMIZERS[name](model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    optimizer.step(closure)  # momentum before the cut
    masks = dense_masks(model)
    hold = keep_at_zero(model, masks, optimizer)
    update_masks(model, masks, 0.7)
    alive = model[4].weight.clone()
    for _ in range(3):
        optimizer.step(closure)
        assert sparsity(model) == round(0.7 * 324) / 324
    assert not torch.equal(alive, model[4].weight), "the living weights train on"

    make_permanent(model, masks, hold)
    assert model.state_dict().keys() == small_net().state_dict().keys()
    assert all(type(value) is nn.Parameter and value.is_leaf for value in model.parameters())
    zeros = model[4].weight[~masks["4.weight"]]
    assert not zeros.signbit().any(), "no -0.0"
    optimizer.step(closure)
    assert sparsity(model) < 0.7, "nobody holds the weights any more"


def drawn(model, fraction, seed=0):
    """How many weights each layer keeps, and the masks, after two cuts at random."""
    masks, generator = dense_masks(model), torch.Generator().manual_seed(seed)
    for part in (fraction / 2, fraction):
        update_masks(model, masks, part, "global", "random", generator)
    return [int(mask.sum()) for mask in masks.values()], masks


def test_weights_drawn_at_random():
    torch.manual_seed(0)
    model = MnistCNN()
    kept, masks = drawn(copy.deepcopy(model), 0.9)
    again, other = (drawn(copy.deepcopy(model), 0.9, seed)[1] for seed in (0, 1))
    assert sum(kept) == 43_050
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    assert not torch.equal(masks["fc1.weight"], other["fc1.weight"])
    magnitudes = model.fc1.weight.detach().abs()
    assert magnitudes[masks["fc1.weight"]].mean() == pytest.approx(magnitudes.mean().item(), rel=0.02)

    sizes = [mask.numel() for mask in masks.values()]
    kept, _ = drawn(copy.deepcopy(model), 0.5)
    assert [k / n for k, n in zip(kept, sizes, strict=True)] == pytest.approx([0.5] * 4, abs=0.07)


def test_optimal_brain_damage_by_hand():
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 2, bias=False))
    model[0].weight.data = torch.tensor([[3.0, -2.0, 1.0]])
    model[1].weight.data = torch.tensor([[0.5], [4.0]])
    squares = {"0.weight": torch.tensor([[0.1, 1.0, 2.0]]), "1.weight": torch.tensor([[9.0], [0.0]])}
    masks = dense_masks(model)  # twice the damages: 0.9, 4, 2 and 2.25, 0
    update_masks(model, masks, 0.6, method="obd", squared_gradients=squares)
    assert [mask.flatten().tolist() for mask in masks.values()] == [[False, True, False], [True, False]]


def test_squared_gradients_are_averaged_over_the_steps():
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    averages = average_squared_gradients(model, optimizer, decay=0.75)
    for gradient, expected in ((2.0, 1.0), (-4.0, 0.75 * 1 + 0.25 * 16)):
        model.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        assert averages["weight"].tolist() == [[expected]]
    model.requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="weight is frozen"):
        average_squared_gradients(model, optimizer)


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_a_sparsity_of_its_own_for_each_layer(method):
    torch.manual_seed(0)
    model = MnistCNN()
    masks, generator = dense_masks(model), torch.Generator().manual_seed(0)
    wanted = {"conv1.weight": 0.0, "conv2.weight": 0.3, "fc1.weight": 0.99, "fc2.weight": 0.5}
    update_masks(model, masks, wanted, "global", method, generator)
    assert [int(mask.sum()) for mask in masks.values()] == [500, 17_500, 4_000, 2_500]
    by_layer = pruned(small_net(), 0.3, scope="layer")
    alike = dense_masks(small_net())
    update_masks(small_net(), alike, dict.fromkeys(alike, 0.3))
    assert all(torch.equal(alike[name], by_layer[name]) for name in alike)


def test_a_network_without_weights_is_refused():
    with pytest.raises(ValueError, match="ReLU has no convolution or linear layer"):
        dense_masks(nn.ReLU())


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="allowed: magnitude, obd, random"):
        update_masks(small_net(), {}, 0.5, method="chance")
    with pytest.raises(ValueError, match='"obd" without squared_gradients'):
        update_masks(small_net(), dense_masks(small_net()), 0.5, method="obd")
    model = small_net()
    with pytest.raises(ValueError, match="scope 'row'; allowed: global, layer, lamp"):
        pruned(model, 0.5, scope="row")
    for fraction in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="allowed: at least 0, below 1"):
            pruned(model, fraction)
        with pytest.raises(ValueError, match="allowed: at least 0, below 1"):
            pruned(model, dict.fromkeys(dense_masks(model), fraction))
    assert sparsity(model) == 0


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, math.inf]), min_size=1, max_size=40),
    st.floats(0, 1, exclude_max=True),
)
def test_keep_strongest_agrees_with_a_stable_sort(scores, fraction):
    order = sorted(range(len(scores)), key=lambda index: scores[index])  # Python's sort is stable: ties by index
    gone = set(order[: min(round(fraction * len(scores)), len(scores) - 1)])
    kept = keep_strongest(torch.tensor(scores), fraction).tolist()
    assert kept == [index not in gone for index in range(len(scores))]
