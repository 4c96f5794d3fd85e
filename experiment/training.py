"""Fit and evaluate: the one training loop of both experiments."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from experiment.data import ImageData, normalize
from experiment.journal import Checkpoint
from experiment.results import CheckpointError, one_line


def triangle(optimizer: torch.optim.Optimizer, steps: int, warm_up: float) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rates that rise in a line to the optimiser's own for a fraction `warm_up` of `steps`, then fall to 0."""

    def factor(step: int) -> float:
        return min(1, (step + 1) / (warm_up * steps), (steps - step) / ((1 - warm_up) * steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def lookahead(
    step: int, model: nn.Module, average: dict[str, Tensor], steps: int, every: int = 5, decay: float = 0.95
) -> None:
    """For `fit` to call after each of `steps` steps: sets the network back to a running average of itself now and then.

    Lookahead (Zhang et al. 2019, arXiv:1907.08610, §2) with the decay of Jordan (2024, arXiv:2404.00498, §3.4): none
    at first, `decay` per step in the end. The averages, at first a copy of the network's tensors by name, change in
    place; they are what is left in the network after the last step.
    """
    if step % every == 0 or step == steps:
        state = model.state_dict()
        for name, value in average.items():
            value.lerp_(state[name], 1 - decay**every * (step / steps) ** 3)
            state[name].copy_(value)


class Diverged(Exception):
    """The training loss is no longer a number; the message says when and what to try."""


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_schedule: torch.optim.lr_scheduler.LRScheduler,
    data: ImageData,
    *,
    epochs: int,
    batch_size: int,
    augment: Callable[..., Tensor],
    label_smoothing: float,
    seed: int,
    mirror: bool = False,
    teacher: nn.Module | None = None,
    teacher_share: float = 1,
    precision: torch.dtype = torch.float32,
    after_step: Callable[[int], None] = lambda step: None,
    state: dict[str, Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
    description: str = "",
) -> list[dict[str, Any]]:
    """Train `model` in place by cross-entropy and measure it on the test set after every epoch.

    `seed` alone decides the order of the examples and their augmentation; `mirror` shows each example as it is and as
    its mirror image in turn (Jordan 2024, arXiv:2404.00498, §3.6). A `teacher` gives its own probabilities, which have
    `teacher_share` in the loss and the labels the rest (distillation: Hinton et al. 2015, arXiv:1503.02531, §2); with
    `mirror` it looks at both images.
    `precision` is that of the products in training, float32 or bfloat16; weights and the test are in float32.
    `lr_schedule` moves with every step. `after_step(step)` is called with the number of optimiser steps done, the
    first time with 0. Returns one entry per epoch: the steps done, the mean training loss, the test accuracy in
    percent and the seconds of training alone.

    What `checkpoint` holds of an earlier call that was stopped is taken up where it ended, on a CPU to the same end
    bit for bit; `state` is what `after_step` changes in place, to be kept with it. Raises CheckpointError, and Diverged
    where the loss is not finite: on a CPU at that step, on a GPU, which would have to wait, at the end of the epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    stateful = {"model": model, "optimizer": optimizer, "lr_schedule": lr_schedule}
    state = state or {}
    kept = checkpoint.load() if checkpoint else None
    if kept is not None:
        try:
            history = restore(kept, stateful, state, generator)
        except Exception as error:  # a file of something else can be wrong in any way
            raise CheckpointError(f"{checkpoint.path}: not of this training ({one_line(error)})") from error
        step = history[-1]["step"]
    else:
        history, step = [], 0
        after_step(step)
    steps = epochs * steps_per_epoch(len(data.train_labels), batch_size)
    with tqdm(total=steps, initial=step, desc=description, unit="step", disable=None) as bar:
        for epoch in range(len(history) + 1, epochs + 1):
            start, losses = time.perf_counter(), []
            model.train()
            for images, labels in batches(data, batch_size, augment, generator, turn=epoch if mirror else None):
                with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
                    taught = None if teacher is None else probabilities(teacher, images, mirror)
                    logits = model(images)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
                if taught is not None:
                    loss = loss.lerp(F.cross_entropy(logits.float(), taught), teacher_share)
                losses.append(loss.detach() * len(labels))
                step += 1
                if loss.is_cpu:
                    check_finite(losses[-1:], step, f"{description}, epoch {epoch}")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                lr_schedule.step()
                after_step(step)
                bar.update()
            check_finite(losses, step, f"{description}, epoch {epoch}")
            train_loss = float(sum(losses)) / len(data.train_labels)
            seconds = time.perf_counter() - start
            accuracy = evaluate(model, data)
            history.append(
                {"epoch": epoch, "step": step, "train_loss": train_loss, "test_accuracy": accuracy, "seconds": seconds}
            )
            bar.set_postfix(accuracy=f"{accuracy:.2f} %")
            if checkpoint and checkpoint.is_due(epoch, epochs):
                checkpoint.save(snapshot(stateful, state, generator, history))
    return history


def check_finite(losses: list[Tensor], last_step: int, where: str) -> None:
    """Raise Diverged if one of the losses, of the steps up to the last, is NaN or infinite."""
    finite = torch.stack(losses).isfinite().tolist()
    if not all(finite):
        step = last_step - len(losses) + 1 + finite.index(False)
        raise Diverged(
            f"{where}, step {step}: the loss is not finite; try a larger --batch_size or --precision float32"
        )


def snapshot(
    stateful: dict[str, Any], state: dict[str, Tensor], generator: torch.Generator, history: list[dict[str, Any]]
) -> dict[str, Any]:
    """All that training needs to go on."""
    return {
        **{name: part.state_dict() for name, part in stateful.items()},
        "state": state,
        "generator": generator.get_state(),
        "history": history,
    }


@torch.no_grad()
def restore(
    kept: dict[str, Any], stateful: dict[str, Any], state: dict[str, Tensor], generator: torch.Generator
) -> list[dict[str, Any]]:
    """Bring everything, in place, to where it was when `snapshot` was taken; returns the history up to there."""
    for name, part in stateful.items():
        part.load_state_dict(kept[name])
    for name, tensor in state.items():
        tensor.copy_(kept["state"][name])
    generator.set_state(kept["generator"])
    return kept["history"]


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor, mirror: bool = False) -> Tensor:
    """What a trained network says of normalised images `(N, C, H, W)`: the classes' probabilities `(N, classes)`.

    With `mirror`, by the mean of the logits of each image and its mirror image, which is right more often.
    """
    model.eval()
    logits = (model(images) + model(images.flip(3))) / 2 if mirror else model(images)
    return logits.float().softmax(1)


def steps_per_epoch(train_size: int, batch_size: int) -> int:
    """Optimiser steps in one pass over the training set, the last one perhaps on a smaller batch."""
    return math.ceil(train_size / batch_size)


def batches(
    data: ImageData,
    batch_size: int,
    augment: Callable[..., Tensor],
    generator: torch.Generator,
    turn: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training set once, shuffled and augmented: normalised images `(B, C, H, W)` and labels `(B,)`.

    The last batch holds what is left over and may be smaller. With `turn`, a number, every second example is mirrored,
    and with the next number the others are.
    """
    order = torch.randperm(len(data.train_labels), generator=generator).to(data.train_labels.device)
    for chosen in order.split(batch_size):
        images = augment(data.train_images[chosen], generator=generator)
        if turn is not None:
            images = torch.where((chosen + turn).view(-1, 1, 1, 1) % 2 == 0, images.flip(3), images)
        yield normalize(images, data.mean, data.std), data.train_labels[chosen]


@torch.inference_mode()
def evaluate(model: nn.Module, data: ImageData, batch_size: int = 1000) -> float:
    """The percentage of test images whose largest logit is that of their class."""
    model.eval()
    correct = 0
    for images, labels in zip(data.test_images.split(batch_size), data.test_labels.split(batch_size), strict=True):
        correct += (model(normalize(images, data.mean, data.std)).argmax(1) == labels).sum()
    return 100 * int(correct) / len(data.test_labels)
