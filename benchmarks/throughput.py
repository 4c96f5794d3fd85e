"""How near both experiments come to what the machine can do, and where the rest of the time goes.

    python -m benchmarks.throughput

Training and inference of both networks by the experiments' own loops, in turn with large matrix products, again and
again, because on a shared machine only what ran side by side can be compared. Operations are counted as they are done:
two for a multiply-add, forward and backward. Writes throughput.json and throughput.png.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import trange

import structured_pruning
import unstructured_pruning
from experiment import checkpoints, cli, data, plots, report
from experiment.data import ImageData
from experiment.training import Recipe, evaluate, fit, initial, sgd
from models.mnist_cnn import MnistCNN

MATRIX = 2048  # rows and columns
BATCH_SIZE = 128
PRECISIONS = (torch.float32, torch.bfloat16)
PARTS = {  # of a training step, by what torch calls its operations
    "convolution, matrix product": ("convolution", "mm"),
    "BatchNorm": ("batch_norm",),
    "pooling": ("pool",),
    "activation": ("clamp_min", "threshold_backward", "relu"),
}


@dataclass(frozen=True)
class Work:
    """One experiment: an epoch of its training, which returns its seconds, and what else there is to measure."""

    train: Callable[[torch.dtype], float]
    infer: Callable[[], Any]
    batches: Callable[[], Any]
    # for an example
    train_flops: int
    infer_flops: int


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=cli.number(int, 1), default=9, help="times that each kind of work is done")
    parser.add_argument("--train_size", type=cli.number(int, 1, 50_000), default=5120, help="examples of each")
    cli.add_folder_flags(parser, "benchmarks/results")
    args = parser.parse_args()

    works = {
        "CIFAR-10": cifar_work(args.data_dir, args.train_size),
        "MNIST": mnist_work(args.data_dir, args.train_size),
    }
    kinds, flops = {}, {}
    for dtype in PRECISIONS:
        matrix = torch.randn(MATRIX, MATRIX).to(dtype)
        kinds[f"matrix product, {name(dtype)}"] = partial(seconds_of, torch.mm, matrix, matrix)
        flops[f"matrix product, {name(dtype)}"] = 2 * MATRIX**3
    for title, work in works.items():
        for dtype in PRECISIONS:
            kinds[f"{title} training, {name(dtype)}"] = partial(work.train, dtype)
            flops[f"{title} training, {name(dtype)}"] = work.train_flops * args.train_size
        kinds[f"{title} inference, float32"] = partial(seconds_of, work.infer)
        flops[f"{title} inference, float32"] = work.infer_flops * args.train_size
    seconds = {kind: [] for kind in kinds}
    for turn in trange(args.rounds + 1, unit="round", disable=None):
        for kind, do in kinds.items():
            taken = do()
            if turn > 0:  # the first round warms up
                seconds[kind].append(taken)

    rates = {kind: [flops[kind] / 1e9 / each for each in times] for kind, times in seconds.items()}
    product = rates["matrix product, float32"]
    record = {
        "arguments": cli.as_json(args),
        "environment": report.environment(torch.device("cpu")),
        "gflops": {kind: statistics.median(values) for kind, values in rates.items()},
        "of_float32_matrix_product": {  # round by round, so that a machine that slows down slows both
            kind: statistics.median(rate / other for rate, other in zip(values, product, strict=True))
            for kind, values in rates.items()
        },
        "seconds": seconds,
        "training_time": {
            f"{title}, {name(dtype)}": shares(partial(work.train, dtype), work.batches)
            for title, work in works.items()
            for dtype in PRECISIONS
        },
    }
    contents = {"throughput.json": report.json_bytes(record), "throughput.png": draw(record)}
    written = checkpoints.write_all(args.results_dir, contents)
    rows = [
        [kind, f"{record['gflops'][kind]:.0f}", f"{record['of_float32_matrix_product'][kind]:.0%}"] for kind in kinds
    ]
    print(report.table(["", "GFLOP/s (median)", "of the float32 matrix product"], rows))
    parts = list(next(iter(record["training_time"].values())))
    rows = [[kind, *(f"{share:.1%}" for share in spent.values())] for kind, spent in record["training_time"].items()]
    print(report.table(["training time", *parts], rows))
    print(written)


def seconds_of(do: Callable[..., Any], *arguments: Any) -> float:  # noqa: ANN401  (whatever `do` takes)
    start = time.perf_counter()
    do(*arguments)
    return time.perf_counter() - start


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cifar_work(data_dir: Path, train_size: int) -> Work:
    cifar = data.load_cifar10(data_dir).first(train_size)
    model = structured_pruning.untrained(cifar, 0)
    recipe = Recipe(epochs=1, batch_size=BATCH_SIZE, **structured_pruning.RECIPE)

    def train(dtype: torch.dtype) -> float:
        again = replace(recipe, learning_rate=1e-3, precision=dtype)
        return fit(model, sgd(model, again), untested(cifar), again, 0)[0]["seconds"]

    return work_of(train, model, cifar, recipe)


def mnist_work(data_dir: Path, train_size: int) -> Work:
    mnist = data.load_mnist(data_dir).first(train_size)
    recipe = Recipe(epochs=1, batch_size=BATCH_SIZE, **unstructured_pruning.RECIPE)

    def train(dtype: torch.dtype) -> float:
        model = initial(MnistCNN, 0, torch.device("cpu"))
        optimizer = sgd(model, recipe)
        return fit(model, optimizer, untested(mnist), replace(recipe, precision=dtype), 0)[0]["seconds"]

    return work_of(train, initial(MnistCNN, 0, torch.device("cpu")), mnist, recipe)


def untested(images: ImageData) -> ImageData:
    """The data with a test set of one image, so that a training is nothing but that."""
    return replace(images, test_images=images.test_images[:1], test_labels=images.test_labels[:1])


def work_of(train: Callable[[torch.dtype], float], model: nn.Module, images: ImageData, recipe: Recipe) -> Work:
    inference = replace(images, test_images=images.train_images, test_labels=images.train_labels)
    augment = partial(data.random_shift, pixels=recipe.shift_pixels, mode=recipe.shift_mode)
    mirror_turn = 1 if recipe.mirror else None
    return Work(
        train=train,
        infer=partial(evaluate, model, inference),
        batches=lambda: data.batches(images, BATCH_SIZE, augment, torch.Generator(), mirror_turn),
        **flops_of(model, images.normalize(images.test_images[:1])),
    )


def flops_of(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """The operations that an example costs in training and in inference."""
    counted = {}
    for kind, backward in (("infer_flops", False), ("train_flops", True)):
        with FlopCounterMode(display=False) as counter:
            logits = model.eval()(example)
            if backward:
                F.cross_entropy(logits, torch.zeros(len(example), dtype=torch.long)).backward()
        counted[kind] = counter.get_total_flops() // len(example)
    return counted


def shares(train: Callable[[], float], batches: Callable[[], Any]) -> dict[str, float]:
    """The parts of a training's time: the data by themselves, the optimiser and the operations as torch sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        whole = train()
    events = profile.key_averages()
    parts = {
        part: sum(event.self_cpu_time_total for event in events if any(known in event.key for known in names)) / 1e6
        for part, names in PARTS.items()
    }
    parts["optimiser"] = sum(event.cpu_time_total for event in events if event.key.startswith("Optimizer.")) / 1e6
    parts["data"] = seconds_of(lambda: all(True for _ in batches()))
    parts["rest"] = whole - sum(parts.values())
    return {part: seconds / whole for part, seconds in parts.items()}


@matplotlib.rc_context(plots.STYLE)
def draw(record: dict[str, Any]) -> bytes:
    """The PNG: rates beside the matrix product's, and the parts of a training's time."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    rates, times = figure.subplots(2, 1)
    of_product = record["of_float32_matrix_product"]
    colors = ["#999999" if kind.startswith("matrix") else plots.DENSE["color"] for kind in of_product]
    bars = rates.barh(list(of_product), [100 * share for share in of_product.values()], color=colors)
    rates.bar_label(bars, [f"{rate:.0f} GFLOP/s" for rate in record["gflops"].values()], padding=4)
    share = of_product["CIFAR-10 training, float32"]
    rates.set(
        title=f"Training in float32 on CIFAR-10 runs at {share:.0%} of a matrix product's rate",
        xlabel="rate (% of the float32 matrix product's)",
        xlim=(0, 120 * max(of_product.values())),
    )
    left = [0.0] * len(record["training_time"])
    colors = [*(layer["color"] for layer in plots.LAYERS), "#999999"]
    for part, color in zip(next(iter(record["training_time"].values())), colors, strict=True):
        widths = [100 * parts[part] for parts in record["training_time"].values()]
        times.barh(list(record["training_time"]), widths, left=left, color=color, edgecolor="white", label=part)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    times.set(title="Where the time of training goes", xlabel="% of the time", xlim=(0, 100))
    times.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)
    for axes in (rates, times):
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    return plots.png(figure)


if __name__ == "__main__":
    cli.run(main)
