"""What a network costs and what it is made of."""

import contextlib
import copy
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the network into eval mode for a while; every module comes back in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def nonzero_parameters(model: nn.Module) -> int:
    """Trainable parameters that are not exactly 0."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters() if parameter.requires_grad)


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds of all convolutions and linear layers in one forward pass of one example, in eval mode."""
    # In train mode the example would move BatchNorm's running statistics.
    with torch.no_grad(), eval_mode(model), FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops() // 2 // len(example)  # it counts a multiply-add as two


@torch.inference_mode()
def latency_ms(models: dict[str, nn.Module], batch: Tensor, repetitions: int = 50) -> dict[str, float]:
    """Milliseconds of each model for a forward pass of `batch` in eval mode: the median of interleaved repetitions.

    Each model in the memory format in which it is faster.
    """
    candidates = [
        (name, copy.deepcopy(model).eval().to(memory_format=layout), batch.to(memory_format=layout))
        for name, model in models.items()
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    seconds = [[] for _ in candidates]
    for repetition in range(repetitions + 3):
        for (_, model, images), times in zip(candidates, seconds, strict=True):
            start = time.perf_counter()
            model(images)
            if batch.is_cuda:
                torch.cuda.synchronize()
            if repetition >= 3:  # the first ones warm up
                times.append(time.perf_counter() - start)
    medians = [(name, statistics.median(times)) for (name, _, _), times in zip(candidates, seconds, strict=True)]
    return {name: 1000 * min(median for other, median in medians if other == name) for name in models}


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory that this process has held so far: on CUDA that of the device; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # not resource.getrusage: that of a process that was forked starts with what its parent held
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return None
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def magnitude_histogram(weights: Tensor) -> dict[str, list]:
    """Nonzero weights by |w|, ten bins a decade: {"edges": 61 numbers from 1e-5 to 10, "counts": 60 integers}.

    The few weights beyond either end count in the bin there.
    """
    magnitudes = weights[weights != 0].abs().double().clamp(1e-5, 10).cpu().numpy()
    counts, edges = np.histogram(magnitudes, bins=np.logspace(-5, 1, 61))
    return {"edges": edges.tolist(), "counts": counts.tolist()}
