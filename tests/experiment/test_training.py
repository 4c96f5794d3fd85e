import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from experiment.checkpoints import Checkpoint
from experiment.cli import CheckpointError, Diverged
from experiment.data import ImageData, batches, random_shift
from experiment.training import (
    Hook,
    Recipe,
    Task,
    evaluate,
    fit,
    generator,
    lookahead,
    other,
    sgd,
    soft_targets,
    steps_per_epoch,
    triangle,
    with_labels,
)


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


def test_mirror_images_take_turns(cifar10):
    data = cifar10.first(64)
    as_it_is, turned = (
        {image for images, _ in batches(data, 16, still, torch.Generator(), turn) for image in map(pixels, images)}
        for turn in (1, 2)
    )
    originals = {pixels(image) for images, _ in batches(data, 64, still, torch.Generator()) for image in images}
    mirrored = {pixels(image.flip(2)) for images, _ in batches(data, 64, still, torch.Generator()) for image in images}
    assert as_it_is | turned == originals | mirrored
    assert as_it_is.isdisjoint(turned)
    assert len(as_it_is & originals) == len(turned & originals) == 32


def pixels(image):
    return tuple(image.flatten().tolist())


@pytest.mark.parametrize(("size", "batch", "steps"), [(7, 3, 3), (6, 3, 2), (1, 128, 1), (60_000, 128, 469)])
def test_steps_per_epoch(size, batch, steps):
    assert steps_per_epoch(size, batch) == steps


def train(data, seed, after_step=lambda step: None, task=None, **changes):
    """A linear network after two epochs of batches of three, and its history."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    recipe = Recipe(**{"epochs": 2, "batch_size": 3, "learning_rate": 0.1, "warm_up": 0.5, "momentum": 0.0} | changes)
    return model, fit(model, sgd(model, recipe), data, recipe, seed, Hook(after_step), task)


def test_the_seed_decides_everything(tiny):
    first, second, other = (train(tiny, seed)[0][1].weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_another_seed_gives_other_numbers(seed):
    """A seed that is larger by 2**32 gives the same."""
    numbers = [torch.rand(5, generator=generator(each)) for each in (seed, other(seed), other(other(seed)))]
    assert not torch.equal(numbers[0], numbers[1])
    assert torch.equal(numbers[0], numbers[2])


def test_after_step_counts_the_steps_done(tiny):
    steps = []
    _, history = train(tiny, 0, steps.append)
    assert steps == [0, 1, 2, 3, 4, 5, 6]
    assert [epoch["step"] for epoch in history] == [3, 6]


def test_the_loss_is_the_mean_over_examples(tiny):
    """A network that is held at zero says 50:50, whatever it sees: every example costs log 2."""

    def hold_at_zero(step):
        for parameter in model.parameters():
            nn.init.zeros_(parameter)

    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    recipe = Recipe(epochs=1, batch_size=3, learning_rate=0.1, warm_up=0.5)
    history = fit(model, sgd(model, recipe), tiny, recipe, 0, Hook(hold_at_zero))
    assert history[0]["train_loss"] == pytest.approx(math.log(2))


def test_a_loss_that_is_not_finite_stops_the_run(tiny):
    with pytest.raises(Diverged, match="epoch 1, step 2: the loss is not finite"):
        train(tiny, 0, learning_rate=math.inf)


def test_products_in_bfloat16_leave_the_weights_in_float32(tiny):
    exact, rounded = (train(tiny, 0, precision=dtype)[0][1].weight for dtype in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 3, 4, 8, 9, 12])
@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_training_that_was_stopped_ends_as_if_it_never_had_been(mnist, tmp_path, stop_at, every):
    """Four epochs of three steps, with everything that has a memory: momentum, a schedule, averages, augmentation."""
    few = replace(mnist.first(90), test_images=mnist.test_images[:50], test_labels=mnist.test_labels[:50])

    recipe = Recipe(
        epochs=4,
        batch_size=40,
        learning_rate=0.1,
        warm_up=0.3,
        label_smoothing=0.1,
        shift_pixels=2,
        lookahead=True,
    )

    def trained(checkpoint=None, stop_at=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        total, log = torch.zeros(()), []

        def after_step(step):
            if step == stop_at:
                raise Stopped
            total.add_(step)
            log.append({"step": step})

        hook = Hook(after_step, {"total": total}, log)
        history = fit(model, sgd(model, recipe), few, recipe, 5, hook, Task(checkpoint=checkpoint))
        assert total == sum(range(13))
        assert log == [{"step": step} for step in range(13)]
        return model[1].weight, [{**epoch, "seconds": 0} for epoch in history]

    checkpoint = Checkpoint(tmp_path / "training.pt", every)
    with pytest.raises(Stopped):
        trained(checkpoint, stop_at)
    assert checkpoint.path.exists() == (every > 0 and stop_at > 3 * every)
    for _ in range(2):  # the second time there is nothing left to do
        weight, history = trained(checkpoint)
        assert torch.equal(weight, trained()[0])
        assert history == trained()[1]


def test_a_checkpoint_of_another_training_is_named(tiny, tmp_path):
    checkpoint = Checkpoint(tmp_path / "training.pt")
    for content in ({}, {"model": {"weight": torch.zeros(3)}}):
        checkpoint.save(content)
        with pytest.raises(CheckpointError, match=r"training\.pt: not of this training"):
            train(tiny, 0, task=Task(checkpoint=checkpoint))


@pytest.mark.parametrize("weight", [1, 0.7])
def test_a_student_by_hand(tiny, weight):
    """The gradient of the loss is (the student's probabilities - those of teacher and labels) times the inputs."""
    labelled = with_labels(tiny, soft_targets(tiny, Brightness(), weight, batch_size=3))
    model, _ = train(labelled, 0, epochs=1, batch_size=7, label_smoothing=0.3)  # soft targets are not smoothed
    torch.manual_seed(0)
    start = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    images = tiny.normalize(tiny.train_images)
    right = weight * Brightness()(images).softmax(1) + (1 - weight) * nn.functional.one_hot(tiny.train_labels)
    disagreement = start(images).softmax(1) - right  # (7, 2)
    gradient = disagreement.T @ images.flatten(1) / 7
    torch.testing.assert_close(model[1].weight, start[1].weight - 0.1 * gradient)
    torch.testing.assert_close(model[1].bias, start[1].bias - 0.1 * disagreement.mean(0))


def test_a_teacher_sees_mirror_images_too():
    """A network that sums the left column into class 0 and the right one into class 1."""
    columns = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    columns[1].weight.data = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]])
    images = torch.tensor([[1, 5], [2, 0]], dtype=torch.uint8).view(1, 1, 2, 2)
    labels = torch.tensor([0])
    data = ImageData(images, labels, images, labels, ("left", "right"), mean=(0.0,), std=(1 / 255,))
    probabilities = [1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))]
    assert soft_targets(data, columns, 1)[0].tolist() == pytest.approx(probabilities)
    assert soft_targets(data, columns, 1, mirror=True)[0].tolist() == [0.5, 0.5]
    assert soft_targets(data, columns, 0.5, mirror=True)[0].tolist() == [0.75, 0.25]


def test_batch_norm_learns_at_its_own_rates_by_hand():
    """One step of plain SGD at rate 0.5 with weight decay 0.4; the scale does not decay."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    weight, scale, bias = model.parameters()
    for parameter in model.parameters():
        parameter.data.fill_(2.0)
        parameter.grad = torch.ones_like(parameter)
    sgd(model, Recipe(1, 1, 0.5, 0.5, momentum=0.0, weight_decay=0.4)).step()
    assert weight.item() == scale.item() == bias.item() == pytest.approx(2 - 0.5 * (1 + 0.4 * 2))
    for parameter in model.parameters():
        parameter.data.fill_(2.0)
    rates = {"batch_norm_scale_rate": 0.1, "batch_norm_bias_rate": 16}
    sgd(model, Recipe(1, 1, 0.5, 0.5, momentum=0.0, weight_decay=0.4, **rates)).step()
    assert weight.item() == pytest.approx(2 - 0.5 * (1 + 0.4 * 2))
    assert scale.item() == pytest.approx(2 - 0.05)
    assert bias.item() == pytest.approx(2 - 8 * (1 + 0.4 / 16 * 2))


def test_augmentation_is_part_of_the_seed(mnist):
    def first_batch(seed):
        shift = partial(random_shift, pixels=2)
        return next(batches(mnist.first(64), 64, shift, torch.Generator().manual_seed(seed)))

    assert torch.equal(first_batch(3)[0], first_batch(3)[0])
    assert not torch.equal(first_batch(3)[0], first_batch(4)[0])


@pytest.mark.parametrize("steps", [*range(1, 13), 4690])
def test_the_learning_rate_rises_in_a_line_and_falls_to_nothing(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule, rates = triangle(optimizer, steps, warm_up=0.2), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert all(0 < rate <= 0.5 for rate in rates)
    assert optimizer.param_groups[0]["lr"] == 0
    if steps == 10:
        assert rates == pytest.approx([0.25, 0.5, 0.5, 0.4375, 0.375, 0.3125, 0.25, 0.1875, 0.125, 0.0625])


def test_lookahead_by_hand():
    """Every second step of four, half of the weight is remembered per step in the end: 0, 1/4 * 1/8, 1/4."""
    model = nn.BatchNorm1d(1, affine=False)
    average, seen = {"running_mean": torch.zeros(1)}, []
    for step, value in enumerate([0.0, 8.0, 16.0, 5.0, 7.0]):
        model.running_mean.fill_(value)
        lookahead(step, model, average, steps=4, every=2, decay=0.5)
        seen.append(model.running_mean.item())
    at_2 = 16 * (1 - 1 / 32)
    assert seen == [0, 8, at_2, 5, 0.25 * at_2 + 0.75 * 7]
    assert model.num_batches_tracked == 0
