"""What a network costs and what it consists of. Nothing here changes the network that it measures."""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

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


def describe_weights(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The record of a network's weights, by layer: how many there are, how many are not 0, and how large these are."""
    layers = [
        {"layer": name, "weights": weight.numel(), "nonzero": int(weight.count_nonzero())}
        for name, weight in weights.items()
    ]
    total, nonzero = (sum(layer[kind] for layer in layers) for kind in ("weights", "nonzero"))
    return {
        "nonzero_weights": nonzero,
        "sparsity": (total - nonzero) / total,
        "layers": layers,
        "histogram": magnitude_histogram(weights.values()),
    }


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds of all convolutions and linear layers in one forward pass of one example, in eval mode."""
    # In train mode the example would move BatchNorm's running statistics.
    with torch.no_grad(), eval_mode(model), FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops() // 2 // len(example)  # it counts a multiply-add as two


def costs(models: dict[str, nn.Module], images: Tensor) -> dict[str, dict[str, Any]]:
    """Multiply-adds of one image and latencies of each model, measured side by side.

    `images` are 256, normalised, `(N, C, H, W)`; the latencies are those of one of them and of all.
    """
    batches = {f"batch {size}": latency_ms(models, images[:size]) for size in (1, 256)}
    return {
        name: {
            "macs": macs(model, images[:1]),
            "latency_ms": {batch: times[name] for batch, times in batches.items()},
        }
        for name, model in models.items()
    }


def cost_of_widths(
    kind: str, dense: nn.Module, image: tuple[int, ...], device: torch.device
) -> Callable[[Sequence[int]], float]:
    """What a network of the dense one's class with such widths costs, as a function of the widths.

    kind "target_params": its parameters; "target_macs": its multiply-adds for an image `(C, H, W)`;
    "target_latency": its time for a batch of 256 on `device`, as a fraction of the dense network's.
    """
    network = type(dense)

    def latency(widths: Sequence[int]) -> float:
        if tuple(widths) == tuple(dense.widths):
            return 1.0
        both = {"dense": copy.deepcopy(dense).to(device), "narrow": network(widths).to(device)}
        times = latency_ms(both, torch.randn(256, *image, device=device))
        return times["narrow"] / times["dense"]

    def count(widths: Sequence[int]) -> int:
        with torch.device("meta"):  # no numbers, only shapes
            narrow, images = network(widths), torch.empty(1, *image)
        return parameters(narrow) if kind == "target_params" else macs(narrow, images)

    return latency if kind == "target_latency" else count


@torch.inference_mode()
def latency_ms(models: dict[str, nn.Module], batch: Tensor, seconds: float = 2.0, least: int = 11) -> dict[str, float]:
    """Milliseconds of each model for a forward pass of `batch` in eval mode: the median of interleaved repetitions.

    Each model in the memory format in which it is faster. The repetitions take about `seconds` in all, but each model
    has at `least` so many.
    """
    chosen = {name: faster_format(model, batch) for name, model in models.items()}
    times = {name: [] for name in models}
    end, repetitions = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or repetitions < least:
        for name, (model, images) in chosen.items():
            times[name].append(seconds_of(model, images))
        repetitions += 1
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def faster_format(model: nn.Module, batch: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of model and batch in eval mode, in the memory format in which the model is faster; both are warm."""
    candidates = [
        (copy.deepcopy(model).eval().to(memory_format=layout), batch.to(memory_format=layout))
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    times = [[seconds_of(*candidate) for candidate in candidates] for _ in range(4)]
    fastest = [min(column[1:]) for column in zip(*times, strict=True)]  # the first time warms up
    return candidates[fastest.index(min(fastest))]


def seconds_of(model: nn.Module, images: Tensor) -> float:
    """Seconds of one forward pass."""
    start = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory that this process has held so far: on CUDA that of the device; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # not resource.getrusage: that of a process that was forked starts with what its parent held
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):  # not Linux, or it does not say
        return None


def magnitude_histogram(weights: Iterable[Tensor]) -> dict[str, list]:
    """Nonzero weights by |w|, ten bins a decade: {"edges": 61 numbers from 1e-5 to 10, "counts": 60 integers}.

    The few weights beyond either end count in the bin there.
    """
    flat = torch.cat([weight.detach().flatten() for weight in weights])
    magnitudes = flat[flat != 0].abs().double().clamp(1e-5, 10).cpu().numpy()
    counts, edges = np.histogram(magnitudes, bins=np.logspace(-5, 1, 61))
    return {"edges": edges.tolist(), "counts": counts.tolist()}
