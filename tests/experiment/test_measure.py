import copy

import pytest
import torch
from torch import nn

from experiment import checkpoints
from experiment.data import ImageData
from experiment.measure import costs as costs_of
from experiment.measure import (
    latency_ms,
    macs,
    magnitude_histogram,
    nonzero_parameters,
    parameters,
    peak_memory_bytes,
)
from experiment.training import evaluate, soft_targets
from models.cifar_cnn import CifarCNN
from models.mnist_cnn import MnistCNN
from tests.processes import SERVER, exit_code_of


def test_lenet_by_hand():
    by_hand = 24 * 24 * 25 * 20 + 8 * 8 * 20 * 25 * 50 + 800 * 500 + 500 * 10
    assert by_hand == 2_293_000
    for batch_size in (1, 3):
        assert macs(MnistCNN(), torch.zeros(batch_size, 1, 28, 28)) == by_hand


def test_grouped_and_strided_convolutions_by_hand():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, groups=2), nn.Conv2d(8, 8, (1, 3), groups=8))
    assert macs(model, torch.zeros(2, 4, 9, 11)) == 4 * 5 * 9 * 2 * 8 + 4 * 3 * 3 * 8


@pytest.mark.parametrize(
    "measure",
    [
        lambda model, images: macs(model, images),
        lambda model, images: latency_ms({"": model}, images, seconds=0, least=1),
        lambda model, images: checkpoints.network_bytes(model),
        lambda model, images: checkpoints.exported(model, images),
        lambda model, images: soft_targets(gray(images), model, 0.5, mirror=True),
        lambda model, images: evaluate(model, gray(images)),
    ],
    ids=["macs", "latency", "checkpoint", "export", "soft targets", "accuracy"],
)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_that_looks_at_a_network_changes_it(measure, training):
    """BatchNorm's running statistics would move in train mode, and dropout would draw."""
    model = CifarCNN((2, 2, 2, 2, 2, 2)).train(training)
    model.bn2.train(not training)  # one module may be in another mode than the rest
    before = copy.deepcopy(model)
    measure(model, torch.randn(4, 3, 32, 32))
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]


def gray(images):
    """A data set of as many random images."""
    labels, bytes = torch.zeros(len(images), dtype=torch.long), torch.randint(256, images.shape, dtype=torch.uint8)
    return ImageData(bytes, labels, bytes, labels, ("",) * 10, (0.5,) * 3, (0.2,) * 3)


def test_parameters_count_once_and_only_if_they_train():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(3, 4))
    model[2].weight = model[0].weight
    assert parameters(model) == 12 + 4 + 8 + 4
    model[1].requires_grad_(False)
    assert parameters(model) == 12 + 4 + 4
    nn.init.zeros_(model[0].bias)
    model[0].weight.data[0, 0] = 0
    model[2].bias.data[:] = 1
    assert nonzero_parameters(model) == 11 + 0 + 4


@pytest.fixture
def one_thread():
    """On a busy machine two threads wait for each other longer than a small network takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_larger_network_takes_longer(one_thread):
    small, large = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 256, 3)
    measured = latency_ms({"small": small, "large": large}, torch.randn(16, 8, 32, 32), seconds=0, least=9)
    assert measured["large"] > 2 * measured["small"] > 0


def test_costs_are_those_of_each_model(one_thread):
    images = torch.zeros(256, 1, 28, 28)
    costs = costs_of({"wide": MnistCNN(), "narrow": MnistCNN((2, 3, 4))}, images)
    assert costs["wide"]["macs"] == 2_293_000
    assert costs["narrow"]["macs"] == macs(MnistCNN((2, 3, 4)), images[:1])
    assert costs["wide"]["latency_ms"].keys() == {"batch 1", "batch 256"}
    assert costs["wide"]["latency_ms"]["batch 256"] > costs["narrow"]["latency_ms"]["batch 256"] > 0


def hold_a_gigabyte(told):
    before = peak_memory_bytes(torch.device("cpu"))
    torch.ones(250_000_000)  # and let go again
    told.put(peak_memory_bytes(torch.device("cpu")) - before)


def test_memory_once_held_stays_the_peak():
    told = SERVER.SimpleQueue()
    assert exit_code_of(hold_a_gigabyte, told) == 0
    assert 0.9e9 < told.get() < 1.2e9


def test_histogram_counts_every_nonzero_weight():
    weights = torch.tensor([0.0, 1e-9, 1e-5, 0.011, -0.012, 3.0, 50.0])
    histogram = magnitude_histogram([weights[:3], weights[3:]])
    assert sum(histogram["counts"]) == 6
    edges = histogram["edges"]
    assert (edges[0], edges[-1], len(edges)) == (pytest.approx(1e-5), pytest.approx(10), 61)
    (bin_of_a_hundredth,) = [i for i in range(60) if edges[i] <= 0.0115 < edges[i + 1]]
    assert histogram["counts"][bin_of_a_hundredth] == 2
    assert (histogram["counts"][0], histogram["counts"][-1]) == (2, 1)
