"""Fit and evaluate: the one training loop of both experiments."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from experiment import ranks
from experiment.data import ImageData, normalize
from experiment.errors import CheckpointError, Diverged
from experiment.journal import Checkpoint
from experiment.profiling import eval_mode
from experiment.results import one_line


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
    precision: torch.dtype = torch.float32,
    after_step: Callable[[int], None] = lambda step: None,
    state: dict[str, Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
    description: str = "",
    processes: int = 1,
) -> list[dict[str, Any]]:
    """Train `model` in place by cross-entropy and measure it on the test set after every epoch.

    `seed` alone decides the order of the examples and their augmentation; `mirror` shows each example as it is and as
    its mirror image in turn (Jordan 2024, arXiv:2404.00498, §3.6). Labels are smoothed by `label_smoothing`, but not
    those that `taught` gives.
    `precision` is that of the products in training, float32 or bfloat16; weights and the test are in float32.
    `lr_schedule` moves with every step. `after_step(step)` is called with the number of optimiser steps done, the
    first time with 0. Returns one entry per epoch: the steps done, the mean training loss, the test accuracy in
    percent and the seconds of training alone.

    What `checkpoint` holds of an earlier call that was stopped is taken up where it ended, on a CPU to the same end
    bit for bit; `state` is what `after_step` changes in place, to be kept with it. Raises CheckpointError, and Diverged
    where the loss is not finite: on a CPU at that step; on a GPU or in several processes, which would have to wait, at
    the end of the epoch.

    With all `processes` of torchrun at once each computes the gradients of its part of every batch. Their mean moves
    the same weights everywhere: the steps are those of one process, but for a BatchNorm, which sees the part alone.
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
    forward = DistributedDataParallel(model) if processes > 1 else model
    if data.train_labels.is_floating_point():
        label_smoothing = 0  # a teacher that learned from smooth labels says so itself
    train_size, in_epoch = len(data.train_labels), steps_per_epoch(len(data.train_labels), batch_size)
    hidden = None if ranks.rank() == 0 else True
    with tqdm(total=epochs * in_epoch, initial=step, desc=description, unit="step", disable=hidden) as bar:
        for epoch in range(len(history) + 1, epochs + 1):
            start, losses = time.perf_counter(), []
            model.train()
            turn = epoch if mirror else None
            for images, labels in batches(data, batch_size, augment, generator, turn, own_part(processes)):
                with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
                    logits = forward(images)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
                losses.append(loss.detach() * len(labels))
                whole = min(batch_size, train_size - batch_size * (step % in_epoch))  # not this process's part alone
                step += 1
                if loss.is_cpu and processes == 1:
                    check_finite(losses[-1:], step, f"{description}, epoch {epoch}")
                optimizer.zero_grad()
                (loss * (processes * len(labels) / whole)).backward()
                optimizer.step()
                lr_schedule.step()
                after_step(step)
                bar.update()
            if processes > 1:
                losses = [sum(losses)]
                ranks.add_up(losses[0])
                ranks.like_the_first(model)
            check_finite(losses, step, f"{description}, epoch {epoch}")
            train_loss = float(sum(losses)) / train_size
            seconds = time.perf_counter() - start
            accuracy = evaluate(model, data, processes=processes)
            history.append(
                {"epoch": epoch, "step": step, "train_loss": train_loss, "test_accuracy": accuracy, "seconds": seconds}
            )
            bar.set_postfix(accuracy=f"{accuracy:.2f} %")
            if checkpoint and checkpoint.is_due(epoch, epochs) and (processes == 1 or ranks.rank() == 0):
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
def taught(
    data: ImageData,
    teacher: nn.Module,
    share: float,
    *,
    mirror: bool = False,
    precision: torch.dtype = torch.float32,
    batch_size: int = 1000,
) -> ImageData:
    """The same data with labels `(N, classes)` that `teacher`, a trained network, has a `share` in: probabilities.

    Distillation (Hinton et al. 2015, arXiv:1503.02531, §2) by a teacher that looks at each training image once, as it
    is; with `mirror` at its mirror image too, and then it goes by the mean of the logits, which is right more often.
    """
    logits = []
    with eval_mode(teacher):
        for some in data.train_images.split(batch_size):
            images = normalize(some, data.mean, data.std)
            with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
                logits.append((teacher(images) + teacher(images.flip(3))) / 2 if mirror else teacher(images))
    said = torch.cat(logits).float().softmax(1)
    return replace(data, train_labels=F.one_hot(data.train_labels, len(data.classes)).to(said).lerp(said, share))


def steps_per_epoch(train_size: int, batch_size: int) -> int:
    """Optimiser steps in one pass over the training set, the last one perhaps on a smaller batch."""
    return math.ceil(train_size / batch_size)


def batches(
    data: ImageData,
    batch_size: int,
    augment: Callable[..., Tensor],
    generator: torch.Generator,
    turn: int | None = None,
    part: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training set once, shuffled and augmented: normalised images `(B, C, H, W)` and labels `(B, ...)`.

    The last batch holds what is left over and may be smaller. With `turn`, a number, every second example is mirrored,
    and with the next number the others are. Of each batch `part` alone is given, the same as without it.
    """
    order = torch.randperm(len(data.train_labels), generator=generator).to(data.train_labels.device)
    for chosen in order.split(batch_size):
        images = augment(data.train_images[chosen], generator=generator)
        if turn is not None:
            images = torch.where((chosen + turn).view(-1, 1, 1, 1) % 2 == 0, images.flip(3), images)
        yield normalize(images[part], data.mean, data.std), data.train_labels[chosen][part]


def own_part(processes: int) -> slice:
    """What this process takes of each batch that as many work on together."""
    return slice(ranks.rank(), None, processes) if processes > 1 else slice(None)


@torch.inference_mode()
def evaluate(model: nn.Module, data: ImageData, batch_size: int = 1000, processes: int = 1) -> float:
    """The percentage of test images whose largest logit is that of their class; `processes` share the work."""
    images, labels = data.test_images[own_part(processes)], data.test_labels[own_part(processes)]
    correct = torch.zeros((), dtype=torch.long, device=labels.device)
    with eval_mode(model):
        for some, theirs in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            correct += (model(normalize(some, data.mean, data.std)).argmax(1) == theirs).sum()
    if processes > 1:
        ranks.add_up(correct)
    return 100 * int(correct) / len(data.test_labels)
