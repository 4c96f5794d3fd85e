import copy
import io
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from models.mnist_cnn import MnistCNN
from pruning.magnitude import (
    SCOPES,
    average_squared_gradients,
    dense_masks,
    keep_at_zero,
    make_permanent,
    prunable_weights,
    sparsity,
    update_masks,
)
from tests.processes import ROOT


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 6, 3))


def linear(*rows):
    layer = nn.Linear(len(rows[0]), len(rows))
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer


def layers(*sizes):
    return nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for inputs, outputs in sizes))


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
    update_masks(model, masks, 4 / 6)
    assert masks["1.weight"].tolist() == [[False], [True]]


def test_position_is_that_of_the_index_in_channels_last_too():
    conv = nn.Conv2d(3, 2, 2).to(memory_format=torch.channels_last)
    nn.init.ones_(conv.weight)
    assert pruned(conv, 5 / 24)["weight"].flatten().tolist() == [False] * 5 + [True] * 19


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision(dtype):
    model = layers((40, 30)).to(dtype)
    masks = pruned(model, 0.7)
    magnitudes, mask = model[0].weight.detach().abs(), masks["0.weight"]
    assert sparsity(model) == 0.7
    assert (magnitudes[~mask] == 0).all()
    assert pruned(copy.deepcopy(model).float(), 0.7)["0.weight"].equal(mask)


@pytest.mark.parametrize("scope", SCOPES)
def test_nan_is_refused_and_nothing_is_pruned(scope):
    model = layers((4, 2), (4, 2))
    model[1].weight.data[0, :3] = math.nan
    before, masks = model[0].weight.clone(), dense_masks(model)
    with pytest.raises(ValueError, match=r"1\.weight: a weight or its squared gradient is NaN"):
        update_masks(model, masks, 14 / 16, scope)
    assert model[0].weight.equal(before)
    assert all(mask.all() for mask in masks.values())
    masks["1.weight"][0, :3] = False  # masked, it is not ranked, and becomes 0
    update_masks(model, masks, 0.5, scope)
    assert sparsity(model) == 0.5
    assert not model[1].weight.signbit()[~masks["1.weight"]].any()


def test_infinity_is_the_strongest():
    assert pruned(nn.Sequential(linear([math.inf, 1.0], [2.0, -math.inf])), 0.5)["0.weight"].tolist() == [
        [True, False],
        [False, True],
    ]


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
def test_a_pruned_weight_stays_pruned(scope):
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
    with pytest.raises(ValueError, match="sparsity by layer; allowed: one of each mask"):
        update_masks(model, dense_masks(model), {"0.weight": 0.5})
    for masks in ({"5.weight": torch.ones(1)}, {"1.weight": torch.ones(4, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="no weight of a convolution or linear layer"):
            update_masks(model, masks, 0.5)
    for mask in (torch.ones(4, 1, 3, 3), torch.ones(4, 1, 3, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"the mask of 0.weight is .*; allowed: torch.bool \(4, 1, 3, 3\) on cpu"):
            keep_at_zero(model, {"0.weight": mask}, torch.optim.SGD(model.parameters()))
    with pytest.raises(TypeError, match="optimizer NoneType; allowed"):
        keep_at_zero(model, dense_masks(model), None)


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm", "torch.nn.utils.prune"],
)
def test_a_computed_weight_is_refused(wrap):
    model = layers((3, 3), (3, 3))
    wrap(model[1])
    for function in (dense_masks, sparsity):
        with pytest.raises(ValueError, match="the weight of 1 is computed from other tensors"):
            function(model)


class Trained:
    """A network at sparsity 0.5, its masks and an optimiser with momentum; `step` is one step of any optimiser."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = layers((6, 5), (5, 4))
        self.optimizer = self.new_optimizer(self.model)
        self.masks = dense_masks(self.model)
        self.step(self.model, self.optimizer)
        self.hold = keep_at_zero(self.model, self.masks, self.optimizer)
        update_masks(self.model, self.masks, 0.5)

    @staticmethod
    def new_optimizer(model):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    @staticmethod
    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.randn(8, model[0].in_features)).square().sum().backward()
        optimizer.step()


def loaded_masks_updated(trained):
    masks = copy.deepcopy(trained.masks)
    update_masks(trained.model, masks, 0.7)
    return trained.model, trained.optimizer, masks


def entry_replaced(trained):
    trained.masks["1.weight"] = torch.rand(4, 5) < 0.3
    return trained.model, trained.optimizer, trained.masks


def one_layer_updated_by_itself(trained):
    part = {"1.weight": trained.masks["1.weight"]}
    update_masks(trained.model, part, 0.9)
    return trained.model, trained.optimizer, trained.masks


def copied(trained):
    model, optimizer = copy.deepcopy((trained.model, trained.optimizer))
    return model, optimizer, trained.masks


def copied_after_which_the_original_is_free(trained):
    model, optimizer, masks = copied(trained)
    trained.hold.remove()
    return model, optimizer, masks


def saved_whole(trained):
    file = io.BytesIO()
    torch.save(trained.model, file)
    file.seek(0)
    model = torch.load(file, weights_only=False)
    return model, trained.new_optimizer(model), trained.masks


def parameters_assigned(trained):
    trained.model.load_state_dict(layers((6, 5), (5, 4)).state_dict(), assign=True)
    return trained.model, trained.new_optimizer(trained.model), trained.masks


def parameters_assigned_to_the_old_optimizer(trained):
    trained.model.load_state_dict(layers((6, 5), (5, 4)).state_dict(), assign=True)
    return trained.model, trained.optimizer, trained.masks


def second_optimizer(trained):
    return trained.model, torch.optim.Adam(trained.model[1].parameters(), lr=0.1), trained.masks


def second_hold(trained):
    optimizer = torch.optim.Adam(trained.model[1].parameters(), lr=0.1)
    hold = keep_at_zero(trained.model, {"1.weight": trained.masks["1.weight"]}, optimizer)
    assert hold is trained.hold
    return trained.model, optimizer, trained.masks


@pytest.mark.parametrize(
    "change",
    [
        loaded_masks_updated,
        entry_replaced,
        one_layer_updated_by_itself,
        copied,
        copied_after_which_the_original_is_free,
        saved_whole,
        parameters_assigned,
        parameters_assigned_to_the_old_optimizer,
        second_optimizer,
        second_hold,
    ],
)
def test_masked_weights_are_zero_after_every_step_whatever_happens(change):
    trained = Trained()
    model, optimizer, masks = change(trained)
    for _ in range(3):
        Trained.step(model, optimizer)
        for name, weight in prunable_weights(model).items():
            assert (weight[~masks[name]] == 0).all()
            assert not weight[~masks[name]].signbit().any()
    before = sparsity(model)
    make_permanent(model, masks, trained.hold)
    assert "_hold" not in vars(model)
    assert "_hold" not in vars(trained.model)
    Trained.step(model, Trained.new_optimizer(model))
    assert sparsity(model) < before


def test_given_masks_are_kept_without_any_update():
    model = layers((6, 5), (5, 4))
    masks = {name: torch.rand_like(weight) < 0.5 for name, weight in model.named_parameters()}
    optimizer = Trained.new_optimizer(model)
    keep_at_zero(model, masks, optimizer)
    Trained.step(model, optimizer)
    for name, weight in model.named_parameters():
        assert (weight == 0).equal(~masks[name])


def test_an_infinite_gradient_leaves_a_masked_weight_at_zero():
    trained = Trained()
    for weight in prunable_weights(trained.model).values():
        weight.grad = torch.full_like(weight, math.inf)
    trained.optimizer.step()
    for name, weight in prunable_weights(trained.model).items():
        assert (weight[~trained.masks[name]] == 0).all()


def test_the_hold_is_not_another_networks():
    Trained()
    other = layers((6, 5), (5, 4))
    Trained.step(other, Trained.new_optimizer(other))
    assert sparsity(other) == 0


def test_a_network_from_a_file_is_held_in_another_process(tmp_path):
    torch.save(Trained().model, tmp_path / "network.pt")
    program = f"""
import torch
from pruning.magnitude import sparsity
model = torch.load({str(tmp_path / "network.pt")!r}, weights_only=False)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for weight in model.parameters():
    weight.grad = torch.ones_like(weight)
optimizer.step()
print(sparsity(model))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0.5", done.stderr


class Around(torch.optim.Optimizer):
    """Wraps another optimiser, and does not initialise itself as one."""

    def __init__(self, inner):
        self.param_groups = inner.param_groups


def test_an_optimizer_without_hooks_is_refused():
    model = layers((6, 5), (5, 4))
    with pytest.raises(TypeError, match=r"optimizer Around; allowed: a torch\.optim\.Optimizer, initialised as such"):
        keep_at_zero(model, dense_masks(model), Around(torch.optim.SGD(model.parameters(), 0.1)))


def test_other_masks_than_were_kept_are_noticed():
    trained = Trained()
    masks = {name: ~mask for name, mask in trained.masks.items()}
    with pytest.warns(UserWarning, match="25 masked weights were not 0"):
        make_permanent(trained.model, masks, trained.hold)
    assert sparsity(trained.model) == 1


def test_a_layer_left_out_of_the_masks_is_not_pruned():
    trained = Trained()
    del trained.masks["1.weight"]
    trained.model[1].weight.data.fill_(0.5)
    update_masks(trained.model, trained.masks, 0.9)
    Trained.step(trained.model, trained.optimizer)
    make_permanent(trained.model, trained.masks, trained.hold)
    assert int((trained.model[0].weight == 0).sum()) == 27
    assert int((trained.model[1].weight == 0).sum()) == 0


def test_a_change_by_masks_is_a_change_to_autograd():
    model = layers((4, 3), (3, 2))
    loss = model(torch.randn(2, 4)).sum()
    pruned(model, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class WithAModule(nn.Module):
    """A network that calls a part of itself what wrappers call the network."""

    def __init__(self):
        super().__init__()
        self.module = layers((6, 5), (5, 4))

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        nn.DataParallel,
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    ],
)
@pytest.mark.parametrize("network", [lambda: layers((6, 5), (5, 4)), WithAModule])
def test_names_are_the_plain_networks(wrap, network):
    model = network()
    wrapped, optimizer = wrap(model), Trained.new_optimizer(model)
    assert dense_masks(wrapped).keys() == dense_masks(model).keys() == dict(model.named_parameters()).keys()
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in wrapped.named_parameters()}
    hold = keep_at_zero(wrapped, masks, optimizer)
    for part in (wrapped, model):
        update_masks(part, masks, 0.5)
        wrapped(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
        assert sparsity(model) == 0.5
    make_permanent(model, masks, hold)


def test_squared_gradients_of_a_loss_scaler_and_its_overflows():
    """What a fused optimiser is given is scaled; where it overflows, GradScaler skips the step."""
    plain, scaled = linear([0.5, 2.0]), linear([0.5, 2.0])
    averages = []
    for model, scaler in (
        (plain, torch.amp.GradScaler("cpu", enabled=False)),
        (scaled, torch.amp.GradScaler("cpu", init_scale=1024)),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        averages.append(average_squared_gradients(model, optimizer)["weight"])
        for factor in (1.0, 3.0, math.inf, math.nan, 2.0):
            if factor * 0 == 0 or scaler.is_enabled():
                optimizer.zero_grad()
                scaler.scale(factor * model(torch.ones(1, 2)).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
    expected = 0.01 * 4 + 0.99 * (0.01 * 9 + 0.99 * 0.01 * 1)
    assert [mean.flatten().tolist() for mean in averages] == [pytest.approx([expected] * 2)] * 2


def test_a_weight_without_gradient_and_half_precision():
    model = layers((1, 1), (1, 1)).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    averages = average_squared_gradients(model, optimizer, decay=0.5)
    optimizer.step()
    model[0].weight.grad = torch.full((1, 1), 1e-4, dtype=torch.half)
    for _ in range(2):
        optimizer.step()
        model[0].weight.grad = None
    assert averages["0.weight"].item() == pytest.approx(0.25e-8, rel=1e-2)
    assert averages["1.weight"].item() == 0
