"""Fit and evaluate: the one training loop of both experiments."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from experiment.checkpoints import Checkpoint, one_line
from experiment.cli import CheckpointError, Diverged
from experiment.data import ImageData, batches, random_shift
from experiment.measure import eval_mode

History = list[dict[str, Any]]  # an entry per epoch
# Images at once where no gradients are wanted. The feature maps of more take memory that the system hands out anew for
# each layer, which is a fifth of the time on a CPU.
WITHOUT_GRADIENTS = 125


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum, cross-entropy, random shifts.

    The learning rate rises linearly to `learning_rate` for a fraction `warm_up` of the steps, then falls linearly
    to 0. `mirror` shows each example as it is and as its mirror image in turn (Jordan 2024, arXiv:2404.00498, §3.6).
    `label_smoothing` is not for soft targets. `precision`, float32 or bfloat16, is that of the matrix products; weights
    and evaluation are in float32.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    warm_up: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_norm_scale_rate: float | None = None  # their learning rates in multiples of the others'; None: as the others
    batch_norm_bias_rate: float | None = None
    label_smoothing: float = 0.0
    shift_pixels: int = 0
    shift_mode: str = "constant"
    mirror: bool = False
    lookahead: bool = False
    fused: bool = False  # an optimiser that is faster, and rounds differently
    precision: torch.dtype = torch.float32

    def steps(self, train_size: int) -> int:
        """Optimiser steps of the whole training."""
        return self.epochs * steps_per_epoch(train_size, self.batch_size)


@dataclass(frozen=True)
class Hook:
    """`after_step(step)` is called with the number of optimiser steps done, the first time with 0.

    A checkpoint keeps what it changes in place: the tensors by name in `state`, and the entries of `log`.
    """

    after_step: Callable[[int], None] = lambda step: None
    state: dict[str, Tensor] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """One training among those of a run: its name, its checkpoint and how many processes share it."""

    name: str = ""
    checkpoint: Checkpoint | None = None
    processes: int = 1
    nested: bool = False  # its progress bar stands below another


@dataclass
class State:
    """All that a training needs to continue where it was stopped."""

    model: nn.Module
    forward: nn.Module  # the same, as it is called in training
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator
    tensors: dict[str, Tensor]
    log: list[dict[str, Any]]
    history: History = field(default_factory=list)

    @property
    def step(self) -> int:
        """Optimiser steps in the epochs that are done."""
        return self.history[-1]["step"] if self.history else 0

    def snapshot(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_schedule": self.lr_schedule.state_dict(),
            "generator": self.generator.get_state(),
            "tensors": self.tensors,
            "log": self.log,
            "history": self.history,
        }

    @torch.no_grad()
    def restore(self, kept: dict[str, Any]) -> None:
        """Bring everything, in place, to where it was when the snapshot was taken."""
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.lr_schedule.load_state_dict(kept["lr_schedule"])
        self.generator.set_state(kept["generator"])
        for name, tensor in self.tensors.items():
            tensor.copy_(kept["tensors"][name])
        self.log[:] = kept["log"]
        self.history = kept["history"]


def initial(network: Callable[[], nn.Module], seed: int, device: torch.device) -> nn.Module:
    """The network that `network()` makes with the initial weights that `seed` gives, in channels_last on `device`."""
    torch.manual_seed(seed)
    return network().to(device, memory_format=torch.channels_last)


def other(seed: int) -> int:
    """Another seed, of its own for each; not one that is larger by 2**32, since PyTorch's generator takes 32 bits."""
    return seed ^ 2**31


def generator(seed: int) -> torch.Generator:
    """Random numbers on the CPU, so that they are the same whatever the device."""
    return torch.Generator().manual_seed(seed)


def sgd(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser; where BatchNorm has learning rates of its own, its scales do not decay."""
    groups = [{"params": list(model.parameters())}]
    if recipe.batch_norm_scale_rate is not None:
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        scales, biases = [norm.weight for norm in norms], [norm.bias for norm in norms]
        theirs = {id(parameter) for parameter in scales + biases}
        rate, bias_rate = recipe.learning_rate, recipe.batch_norm_bias_rate
        groups = [
            {"params": [each for each in model.parameters() if id(each) not in theirs and each.requires_grad]},
            {"params": scales, "lr": recipe.batch_norm_scale_rate * rate, "weight_decay": 0},
            {"params": biases, "lr": bias_rate * rate, "weight_decay": recipe.weight_decay / bias_rate},
        ]
    return torch.optim.SGD(
        groups,
        recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
        fused=recipe.fused,
    )


def triangle(optimizer: torch.optim.Optimizer, steps: int, warm_up: float) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rates that rise linearly to the optimiser's own for a fraction `warm_up` of `steps`, then fall to 0."""

    def factor(step: int) -> float:
        rise, fall = max(1, warm_up * steps), max(1, (1 - warm_up) * steps)
        return min(1, (step + 1) / rise, (steps - step) / fall)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def lookahead(
    step: int, model: nn.Module, average: dict[str, Tensor], steps: int, every: int = 5, decay: float = 0.95
) -> None:
    """Every few of the `steps` steps, set the network to a running average of itself.

    Lookahead (Zhang et al. 2019, arXiv:1907.08610, §2) with the decay of Jordan (2024, arXiv:2404.00498, §3.4): 0 at
    the beginning, `decay` per step at the end. The averages, at first a copy of the network's tensors by name, change
    in place; after the last step the network is the average.
    """
    if step % every == 0 or step == steps:
        state = model.state_dict()
        for name, value in average.items():
            value.lerp_(state[name], 1 - decay**every * (step / steps) ** 3)
            state[name].copy_(value)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageData,
    recipe: Recipe,
    seed: int,
    hook: Hook | None = None,
    task: Task | None = None,
) -> History:
    """Train `model` in place and evaluate it on the test set after every epoch.

    `seed` alone decides the order of the examples and their augmentation. Returns one entry per epoch: the steps done,
    the mean training loss, the test accuracy in percent and the seconds of training alone; none where the recipe has
    no epochs.

    A training that was stopped continues from the task's checkpoint, on a CPU to the same end bit for bit. Raises
    CheckpointError, and Diverged where the loss is not finite: on a CPU at that step; on a GPU or in several processes,
    which would have to wait, at the end of the epoch.

    With all `task.processes` of torchrun at once each computes the gradients of its part of every batch, and the mean
    of these moves the same weights everywhere: the steps are those of one process. But a BatchNorm sees its part alone.
    """
    hook, task = hook or Hook(), task or Task()
    if recipe.epochs == 0:
        return []
    steps = recipe.steps(len(data.train_labels))
    lr_schedule = triangle(optimizer, steps, recipe.warm_up)
    average = {}
    if recipe.lookahead:
        average = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}

    def after_step(step: int) -> None:
        hook.after_step(step)
        if recipe.lookahead:
            lookahead(step, model, average, steps)

    tensors = {**hook.state, **{f"average of {name}": value for name, value in average.items()}}
    forward = DistributedDataParallel(model) if task.processes > 1 else model
    state = State(model, forward, optimizer, lr_schedule, generator(seed), tensors, hook.log)
    if not continued(state, task.checkpoint):
        after_step(0)
    with progress(state, steps, task) as bar:
        for epoch in range(len(state.history) + 1, recipe.epochs + 1):
            start = time.perf_counter()
            step, loss = train_epoch(state, data, recipe, task, after_step, bar)
            seconds = time.perf_counter() - start
            accuracy = evaluate(model, data, processes=task.processes)
            state.history.append(
                {"epoch": epoch, "step": step, "train_loss": loss, "test_accuracy": accuracy, "seconds": seconds}
            )
            bar.set_postfix(accuracy=f"{accuracy:.2f} %")
            if task.name and not task.nested and rank(task.processes) == 0 and not sys.stderr.isatty():
                print(f"{task.name}: epoch {epoch} of {recipe.epochs}, {accuracy:.2f} %", flush=True)
            if task.checkpoint and task.checkpoint.is_due(epoch, recipe.epochs) and rank(task.processes) == 0:
                task.checkpoint.save(state.snapshot())
    return state.history


def train(
    model: nn.Module, data: ImageData, recipe: Recipe, seed: int, task: Task | None = None
) -> tuple[nn.Module, History]:
    """The network itself, trained by `fit` with the recipe's optimiser, and its history."""
    return model, fit(model, sgd(model, recipe), data, recipe, seed, task=task)


def continued(state: State, checkpoint: Checkpoint | None) -> bool:
    """Restore what the checkpoint holds, if it holds anything. Raises CheckpointError if that is something else."""
    kept = checkpoint.load() if checkpoint else None
    if kept is None:
        return False
    try:
        state.restore(kept)
    except Exception as error:  # a file of something else can be wrong in any way
        raise CheckpointError(f"{checkpoint.path}: not of this training ({one_line(error)})") from error
    return True


def progress(state: State, steps: int, task: Task) -> tqdm:
    """A bar over all steps, shown on rank 0 where there is a terminal and anything left to do."""
    hidden = True if state.step == steps or rank(task.processes) > 0 else None
    where = {"position": 1, "leave": False} if task.nested else {}
    return tqdm(total=steps, initial=state.step, desc=task.name, unit="step", disable=hidden, **where)


def train_epoch(
    state: State, data: ImageData, recipe: Recipe, task: Task, after_step: Callable[[int], None], bar: tqdm
) -> tuple[int, float]:
    """One pass over the training set; returns the steps done by then and the mean loss. Raises Diverged."""
    step, losses, size = state.step, [], len(data.train_labels)
    epoch = len(state.history) + 1
    label_smoothing = 0 if data.train_labels.is_floating_point() else recipe.label_smoothing
    augment = partial(random_shift, pixels=recipe.shift_pixels, mode=recipe.shift_mode)
    mirror_turn = epoch if recipe.mirror else None
    state.model.train()
    own = own_part(task.processes)
    epoch_batches = batches(data, recipe.batch_size, augment, state.generator, mirror_turn, own)
    for index, (images, labels) in enumerate(epoch_batches):
        with torch.autocast(images.device.type, recipe.precision, enabled=recipe.precision != torch.float32):
            logits = state.forward(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        losses.append(loss.detach() * len(labels))
        step += 1
        if loss.is_cpu and task.processes == 1:
            check_finite(losses[-1:], step, f"{task.name}, epoch {epoch}")
        state.optimizer.zero_grad()
        whole = min(recipe.batch_size, size - recipe.batch_size * index)  # not this process's part alone
        (loss * (task.processes * len(labels) / whole)).backward()
        state.optimizer.step()
        state.lr_schedule.step()
        after_step(step)
        bar.update()
    if task.processes > 1:
        losses = [sum(losses)]
        dist.all_reduce(losses[0])
        for buffer in state.model.buffers():  # as BatchNorm's running statistics; the parameters are equal anyway
            dist.broadcast(buffer, 0)
    check_finite(losses, step, f"{task.name}, epoch {epoch}")
    return step, float(sum(losses)) / size


def check_finite(losses: list[Tensor], last_step: int, where: str) -> None:
    """Raise Diverged if one of the losses, of the steps up to the last, is NaN or infinite."""
    finite = torch.stack(losses).isfinite().tolist()
    if not all(finite):
        step = last_step - len(losses) + 1 + finite.index(False)
        raise Diverged(
            f"{where}, step {step}: the loss is not finite; try a larger --batch_size or --precision float32, with "
            "--no-resume"
        )


@torch.no_grad()
def soft_targets(
    data: ImageData,
    teacher: nn.Module,
    weight: float,
    *,
    mirror: bool = False,
    precision: torch.dtype = torch.float32,
    batch_size: int = WITHOUT_GRADIENTS,
) -> Tensor:
    """Labels `(N, classes)` for the training images: `weight` times the teacher's probabilities, else the true ones.

    Distillation (Hinton et al. 2015, arXiv:1503.02531, §2) from a teacher that sees each training image once, without
    augmentation; with `mirror` its mirror image too, and then the logits of the two are averaged.
    """
    logits = []
    with eval_mode(teacher):
        for some in data.train_images.split(batch_size):
            images = data.normalize(some)
            with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
                logits.append((teacher(images) + teacher(images.flip(3))) / 2 if mirror else teacher(images))
    probabilities = torch.cat(logits).float().softmax(1)
    return F.one_hot(data.train_labels, len(data.classes)).to(probabilities).lerp(probabilities, weight)


def losses(data: ImageData, size: int, model: nn.Module, batch_size: int = 500) -> Iterator[Tensor]:
    """For each batch of the first `size` training examples, as they are, the sum of their cross-entropies."""
    images, labels = data.train_images[:size].split(batch_size), data.train_labels[:size].split(batch_size)
    for some, theirs in zip(images, labels, strict=True):
        yield F.cross_entropy(model(data.normalize(some)), theirs, reduction="sum")


def with_labels(data: ImageData, labels: Tensor) -> ImageData:
    """The same data with other labels `(N,)` or `(N, classes)` to train on."""
    return replace(data, train_labels=labels.to(data.train_images.device))


def steps_per_epoch(train_size: int, batch_size: int) -> int:
    """Optimiser steps in one pass over the training set, the last one perhaps on a smaller batch."""
    return math.ceil(train_size / batch_size)


def rank(processes: int) -> int:
    """The number of this process among those that share a training."""
    return dist.get_rank() if processes > 1 else 0


def own_part(processes: int) -> slice:
    """The examples that this process takes of each batch that as many share."""
    return slice(rank(processes), None, processes)


@torch.inference_mode()
def evaluate(model: nn.Module, data: ImageData, batch_size: int = WITHOUT_GRADIENTS, processes: int = 1) -> float:
    """The percentage of test images whose largest logit is that of their class; `processes` share the work."""
    images, labels = data.test_images[own_part(processes)], data.test_labels[own_part(processes)]
    correct = torch.zeros((), dtype=torch.long, device=labels.device)
    with eval_mode(model):
        for some, theirs in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            correct += (model(data.normalize(some)).argmax(1) == theirs).sum()
    if processes > 1:
        dist.all_reduce(correct)
    return 100 * int(correct) / len(data.test_labels)


def accuracy(model: nn.Module, history: History, data: ImageData) -> float:
    """The test accuracy after the last epoch, whichever was best; where there was none it is measured now."""
    return history[-1]["test_accuracy"] if history else evaluate(model, data)
