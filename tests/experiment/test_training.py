import math
from functools import partial

import pytest
import torch
from torch import nn

from experiment.data import ImageData, random_shift
from experiment.training import batches, evaluate, fit, steps_per_epoch


class Brightness(nn.Module):
    """Says class 1 of the bright images, class 0 of the dark ones."""

    def forward(self, images):
        return torch.stack([-images.mean((1, 2, 3)), images.mean((1, 2, 3))], dim=1)


def still(images, generator):
    return images


@pytest.fixture
def tiny():
    """Seven training and seven test images of 1 pixel, each of its own brightness; the first four are dark."""
    images = torch.tensor([0, 10, 20, 30, 200, 210, 220], dtype=torch.uint8).view(7, 1, 1, 1)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 0])
    return ImageData(images, labels, images, labels, ("dark", "bright"), mean=(0.4,), std=(0.3,))


def test_accuracy_counts_examples_not_batches(tiny):
    for batch_size in (1, 2, 3, 6, 7, 100):
        assert evaluate(Brightness(), tiny, batch_size) == 100 * 6 / 7


def test_an_epoch_shows_every_example_once(tiny):
    shown = list(batches(tiny, 3, still, torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in shown] == [3, 3, 1]
    pixels = torch.cat([images.flatten() for images, _ in shown])
    assert pixels.sort().values.mul(0.3).add(0.4).mul(255).round().tolist() == [0, 10, 20, 30, 200, 210, 220]


@pytest.mark.parametrize(("size", "batch", "steps"), [(7, 3, 3), (6, 3, 2), (1, 128, 1), (60_000, 128, 469)])
def test_steps_per_epoch(size, batch, steps):
    assert steps_per_epoch(size, batch) == steps


def train(data, seed, after_step=lambda step: None, label_smoothing=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    options = {"epochs": 2, "batch_size": 3, "augment": still, "label_smoothing": label_smoothing, "seed": seed}
    return model, fit(model, optimizer, constant, data, **options, after_step=after_step)


def test_the_seed_decides_everything(tiny):
    first, second, other = (train(tiny, seed)[0][1].weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_after_step_counts_the_steps_done(tiny):
    steps = []
    _, history = train(tiny, 0, steps.append)
    assert steps == [0, 1, 2, 3, 4, 5, 6]
    assert [epoch["step"] for epoch in history] == [3, 6]


def test_the_loss_is_the_mean_over_examples(tiny):
    """A network held at zero weights says 50:50, whatever it sees: every example costs log 2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    options = {"epochs": 1, "batch_size": 3, "augment": still, "label_smoothing": 0.0, "seed": 0}
    assert fit(model, optimizer, constant, tiny, **options)[0]["train_loss"] == pytest.approx(math.log(2))


def test_augmentation_is_part_of_the_seed(mnist):
    def first_batch(seed):
        shift = partial(random_shift, pixels=2)
        return next(batches(mnist.first(64), 64, shift, torch.Generator().manual_seed(seed)))

    assert torch.equal(first_batch(3)[0], first_batch(3)[0])
    assert not torch.equal(first_batch(3)[0], first_batch(4)[0])
