"""Filters of a CNN pruned for good by their L2 norm, then fine-tuning, on CIFAR-10.

    python structured_pruning.py                           # filters > 1/2 standard deviation below their layer's mean
    python structured_pruning.py --target_params 380528    # or as many as it takes for so many parameters,
    python structured_pruning.py --target_macs 20e6        # for so many multiply-adds,
    python structured_pruning.py --target_latency 0.5      # for half of the time

A network of 767,936 parameters is trained. The filters whose importance is below the cutoff are removed with all that
belongs to them, so that a narrower, smaller and faster network of the same class is left. It is fine-tuned by the
labels and by the soft targets of the dense network. The drop in accuracy is measured from the dense network trained
for the same number of additional epochs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import experiment
import models
import pruning
from experiment import cli

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from experiment.data import ImageData
    from experiment.run import Run
    from experiment.training import History, Recipe, Task
    from models.cifar_cnn import CifarCNN

NAME = "structured_cifar"  # of the files written
# To add one: its name here and in pruning.filters.METHODS, its scores in layer_scores there (in filter_scores, if it
# needs the loss as taylor does), its colour in experiment.plots.METHODS.
METHODS = {
    "l2": "the filter's L2 norm times its BatchNorm's |scale|",
    "l1": "its L1 norm times that scale",
    "fpgm": "its distance to the layer's other filters times that scale",
    "bn_scale": "its BatchNorm's |scale| alone",
    "taylor": "how much the loss changes without it, to first order",
    "layerwise_random": "at random, with l2's count for each layer",
    "random": "at random",
}
MODES = {
    "standardized": "1 + z-score within the layer",
    "relative": "fractions of the layer's highest importance",
    "absolute": "importance itself",
    "quantile": "a fraction of the layer's filters",
}
TARGETS = ("target_params", "target_macs", "target_latency")
CUTOFFS = ("pruning_threshold", *TARGETS)  # the flags that say which filters are removed; one of them is given
CONTROLS = {
    "longer": "the dense network fine-tuned for as many epochs, from which the drop is measured",
    "scratch": "the pruned architecture of the first --method, trained from scratch with equal FLOPs",
}
SENSITIVITY_THRESHOLDS = {
    "standardized": [0.0, 0.5, 1.0, 1.5, 2.0, 2.5],
    "relative": [0.0, 0.5, 0.6, 0.7, 0.8, 0.9],
    "quantile": [0.0, 0.1, 0.3, 0.5, 0.7, 0.9],
}
TAYLOR_EXAMPLES = 10_000  # of the training set, as they are
IMAGE = (3, 32, 32)

# How every network here is trained. Found by training on 45,000 of the training examples and evaluating on the other
# 5,000, at eight epochs; the rate of fine-tuning by benchmarks/held_out.py.
RECIPE = {
    "learning_rate": 0.2,
    "warm_up": 0.2,
    "momentum": 0.9,
    "weight_decay": 1.3e-3,
    "batch_norm_scale_rate": 0.1,
    "batch_norm_bias_rate": 16,
    "label_smoothing": 0.2,
    "shift_pixels": 2,
    "shift_mode": "reflect",
    "mirror": True,
    "lookahead": True,
}
FINE_TUNE_RATE = 0.06  # the highest learning rate after pruning; all else is as before
TEACHER_WEIGHT = 0.7  # of the soft targets in fine-tuning; the rest of the loss is that of the labels


def parse_args() -> tuple[argparse.Namespace, list[Cutoff]]:
    """The flags, and the cutoffs that they ask for."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add, cutoff = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    importance, fraction = cli.number(float, 0), cli.number(float, 0, 1, above=True)
    cutoff(
        "--pruning_threshold",
        type=importance,
        nargs="+",
        help="prune filters below this, 0.5 being half a standard deviation below their layer's mean (default: 0.5)",
    )
    cutoff("--target_params", type=cli.number(int, 1), nargs="+", help="prune to at most this many parameters")
    cutoff("--target_macs", type=cli.number(float, 1), nargs="+", help="prune to at most this many MACs per image")
    cutoff("--target_latency", type=fraction, nargs="+", help="prune to this fraction of the dense network's latency")
    add(
        "--threshold_mode",
        choices=tuple(MODES),
        default="standardized",
        help=f"the threshold's unit; {cli.meanings(MODES)}",
    )
    cli.add_choices_flag(parser, "--method", METHODS, "importance of a filter")
    add("--sensitivity", action="store_true", help="only evaluate each layer pruned alone, at several thresholds")
    add("--round_to", type=cli.number(int, 1), default=1, help="round each layer's filters up to a multiple of this")
    add("--fine_tune_epochs", type=cli.number(int, 0, 100_000), default=5, help="epochs after pruning")
    add("--baseline", type=Path, help="a dense network to prune, as results/structured_cifar_dense.pt")
    cli.add_controls_flag(parser, CONTROLS, default="longer")
    cli.add_shared_flags(parser, epochs=12, batch_size=128, train_size=50_000)
    args = parser.parse_args()
    if args.sensitivity:
        check_sensitivity(parser, args)
    if "scratch" in args.controls and args.baseline:
        parser.error("--controls scratch: cannot be combined with --baseline, whose training cost is not known")
    if not any(getattr(args, flag) for flag in CUTOFFS):
        args.pruning_threshold = SENSITIVITY_THRESHOLDS[args.threshold_mode] if args.sensitivity else [0.5]
    for threshold in args.pruning_threshold or []:
        if args.threshold_mode in ("relative", "quantile") and threshold > 1:
            parser.error(f"--pruning_threshold {threshold:g}: allowed: 0 to 1 in {args.threshold_mode} mode")
    mode, round_to = args.threshold_mode, args.round_to
    return args, [Cutoff(flag, value, mode, round_to) for flag in CUTOFFS for value in getattr(args, flag) or []]


def check_sensitivity(parser: cli.Parser, args: argparse.Namespace) -> None:
    """Refuse what makes no sense with --sensitivity."""
    for flag in TARGETS:
        if getattr(args, flag):
            parser.error(f"--{flag}: cannot be combined with --sensitivity")
    if "scratch" in args.controls:
        parser.error("--controls scratch: cannot be combined with --sensitivity")
    if cli.launched() > 1:
        parser.error("--sensitivity: cannot be combined with torchrun")
    for flag in ("method", "seed"):
        if len(getattr(args, flag)) > 1:
            parser.error(f"--{flag}: allowed: one value with --sensitivity")
    if not args.pruning_threshold and args.threshold_mode not in SENSITIVITY_THRESHOLDS:
        parser.error(f"--threshold_mode {args.threshold_mode}: with --sensitivity needs --pruning_threshold")


@dataclass(frozen=True)
class Cutoff:
    """Which filters are removed: those below a threshold, or as many as it takes for a target; `flag` asked for it."""

    flag: str
    value: float
    mode: str = "standardized"
    round_to: int = 1


@dataclass(frozen=True)
class Point:
    """One network to prune: from which seed, by which importance, at which cutoff."""

    seed: int
    method: str
    cutoff: Cutoff

    def __str__(self) -> str:
        return f"seed {self.seed} {self.method} at {self.cutoff.value}"


@dataclass(frozen=True)
class Setup:
    """What the points of a run have in common; `scratch` is the method whose networks are trained from scratch, too."""

    run: Run
    cifar: ImageData
    recipe: Recipe
    fine_tuning: Recipe
    baseline: CifarCNN | None
    longer: bool
    scratch: str | None


def main() -> None:
    args, cutoffs = parse_args()
    baseline = load_baseline(args.baseline)
    if not args.resume:  # a resumed run has passed it; measuring time again might refuse it
        device = experiment.run.choose_device(args.device, args.deterministic)
        check_targets(cutoffs, baseline or models.cifar_cnn.CifarCNN(), device)
    points = [Point(*point) for point in itertools.product(args.seed, args.method, cutoffs)]
    arguments = cli.as_json(args) | {"baseline_sha256": args.baseline and cli.sha256(args.baseline)}
    jobs = 1 if args.sensitivity else len(points)
    with experiment.run.start(NAME, cli.Options.of(args), arguments, jobs) as run:
        cifar = run.load(experiment.data.load_cifar10)
        recipe = experiment.training.Recipe(args.epochs, args.batch_size, precision=run.precision, **RECIPE)
        fine_tuning = replace(recipe, epochs=args.fine_tune_epochs, learning_rate=FINE_TUNE_RATE)
        scratch = args.method[0] if "scratch" in args.controls else None
        setup = Setup(run, cifar, recipe, fine_tuning, baseline, "longer" in args.controls, scratch)

        if args.sensitivity:
            return measure_sensitivity(setup, args.seed[0], args.method[0], cutoffs)
        run.split(args.seed, partial(prepare, setup), "dense network of seed")
        runs = run.for_each(points, partial(prune_and_measure, setup))
        report, text = experiment.report.structured(run.head, runs, cutoffs[0].flag)
        run.publish(f"{NAME}_sweep" if run.jobs > 1 else NAME, report, experiment.plots.structured(report), text)


def load_baseline(path: Path | None) -> CifarCNN | None:
    """The network of --baseline, if there is one. Raises UsageError for another file."""
    if path is None:
        return None
    try:
        return experiment.checkpoints.load_model(path, models.cifar_cnn.CifarCNN)
    except cli.CheckpointError as error:
        raise cli.UsageError(f"--baseline {error}") from error


def check_targets(cutoffs: Sequence[Cutoff], largest: CifarCNN, device: torch.device) -> None:
    """Raise UsageError for a target that no network within the dense one meets."""
    for cutoff in cutoffs:
        if cutoff.flag in TARGETS:
            cost = experiment.measure.cost_of_widths(cutoff.flag, largest, IMAGE, device)
            low, high = cost([min(cutoff.round_to, width) for width in largest.widths]), cost(largest.widths)
            if not low <= cutoff.value <= high:
                raise cli.UsageError(f"--{cutoff.flag} {cutoff.value:g}: allowed: {low:.6g} to {high:.6g}")


def untrained(cifar: ImageData, seed: int, *widths: Sequence[int]) -> CifarCNN:
    """The network that `seed` gives before training; its first layer whitens the images already."""
    network = partial(models.cifar_cnn.CifarCNN, *widths)
    model = experiment.training.initial(network, seed, cifar.train_images.device)
    model.whiten(cifar.normalize(cifar.train_images[:5000]).cpu())
    return model


def dense_network(setup: Setup, seed: int) -> tuple[CifarCNN, History]:
    """The network to prune and its history: that of --baseline, or the one of `seed`, trained once in a run."""
    run, cifar, training = setup.run, setup.cifar, experiment.training
    if setup.baseline:
        return training.initial(lambda: setup.baseline, seed, run.device), []
    return training.train(untrained(cifar, seed), cifar, setup.recipe, seed, run.task(f"seed {seed} dense"))


def fine_tune(
    model: CifarCNN, cifar: ImageData, recipe: Recipe, seed: int, task: Task | None = None
) -> tuple[CifarCNN, History]:
    """A copy of `model` trained further with a new optimiser, and its history."""
    return experiment.training.train(copy.deepcopy(model), cifar, recipe, seed, task)


def prepare(setup: Setup, seed: int) -> tuple[CifarCNN, History, ImageData, tuple[CifarCNN, History] | None]:
    """What the points of a seed share: the dense network, its history, the data with the soft targets to fine-tune on,
    and the control "longer". Made once in a run; each later call finds the finished trainings in their checkpoints.
    """
    run, cifar, training = setup.run, setup.cifar, experiment.training
    dense, history = dense_network(setup, seed)
    if setup.fine_tuning.epochs:
        labels = run.once(
            f"soft targets of seed {seed}",
            lambda: training.soft_targets(setup.cifar, dense, TEACHER_WEIGHT, mirror=True, precision=run.precision),
        )
        cifar = training.with_labels(cifar, labels)
    longer = None
    if setup.longer:
        longer = fine_tune(dense, cifar, setup.fine_tuning, seed, run.task(f"seed {seed} longer"))
    return dense, history, cifar, longer


def prune_and_measure(setup: Setup, point: Point) -> dict[str, Any]:
    """Train, prune, fine-tune, measure: the record of one point. A run of one point also saves its networks."""
    run, cifar, describe = setup.run, setup.cifar, experiment.report.describe
    dense, dense_history, train_data, longer = prepare(setup, point.seed)
    # Kept, because a cutoff found by measuring time may be another one after a stop.
    chosen = run.once(f"{point} cutoff", partial(choose_filters, dense, cifar, point))
    narrow = remove(dense, cifar, chosen["marked"])
    pruned, history = fine_tune(narrow, train_data, setup.fine_tuning, point.seed, run.task(str(point)))
    record = {"seed": point.seed, "method": point.method, point.cutoff.flag: point.cutoff.value, **chosen["record"]}
    record |= run.on_rank_0(lambda: measure(cifar, (dense, dense_history), narrow, (pruned, history)))
    test_accuracy = record["pruned"]["test_accuracy"]
    record["drop_from_baseline"] = round(record["dense"]["test_accuracy"] - test_accuracy, 4)
    if longer:
        record["longer"] = describe(*longer, cifar)
        record["drop"] = round(record["longer"]["test_accuracy"] - test_accuracy, 4)
    if point.method == setup.scratch:
        record["scratch"] = describe(*train_from_scratch(setup, point, record), cifar)
    if run.jobs == 1:
        files, images = experiment.checkpoints, cifar.normalize(cifar.test_images[:2])
        run.write(files.network_files(NAME, pruned, pruned, images) | {f"{NAME}_dense.pt": files.network_bytes(dense)})
    return record


def choose_filters(dense: CifarCNN, cifar: ImageData, point: Point) -> dict[str, Any]:
    """The filters to remove, boolean `(C_out,)` per layer, and the record of what decided: scores and threshold."""
    filters, mode = pruning.filters, point.cutoff.mode
    scores = importance(dense, cifar, point.method, point.seed)
    threshold, keep = apply_cutoff(dense, scores, point.cutoff, cifar.train_images.device)
    layers = [
        {"layer": layer, "filters": len(score), "kept": keep[layer], "scores": score.tolist()}
        for layer, score in scores.items()
    ]
    all_below = [layer for layer, score in scores.items() if filters.count_weak(score, threshold, mode) == len(score)]
    record = {"threshold": threshold, "all_below": all_below, "layers": layers}
    return {"marked": filters.mark_weakest(scores, keep), "record": record}


def apply_cutoff(
    dense: CifarCNN, scores: dict[str, Tensor], cutoff: Cutoff, device: torch.device
) -> tuple[float, dict[str, int]]:
    """The threshold, given or found, and how many filters each layer keeps."""
    filters = pruning.filters
    if cutoff.flag not in TARGETS:
        return cutoff.value, filters.filters_to_keep(scores, cutoff.value, cutoff.mode, cutoff.round_to)
    cost = experiment.measure.cost_of_widths(cutoff.flag, dense, IMAGE, device)
    fill = cutoff.flag != "target_latency"  # time is too noisy to tell one filter more
    try:
        return filters.filters_for_target(
            scores, cutoff.value, lambda keep: cost([*keep.values()]), cutoff.mode, cutoff.round_to, fill
        )
    except ValueError as error:  # a latency that was within reach when it was measured before
        raise cli.Failure(f"--{cutoff.flag} {cutoff.value:g}: {error}") from error


def importance(model: CifarCNN, cifar: ImageData, method: str, seed: int) -> dict[str, Tensor]:
    """The importance of every filter that is trained, `(C_out,)` per layer."""
    example, generator = cifar.normalize(cifar.train_images[:1]), experiment.training.generator(seed)
    losses = partial(experiment.training.losses, cifar, TAYLOR_EXAMPLES)
    scores = pruning.filters.filter_scores(model, method, generator, example, losses)
    del scores["whitening"]  # is not trained
    return scores


def remove(model: CifarCNN, cifar: ImageData, marked: dict[str, Tensor]) -> CifarCNN:
    """The network without the filters that are marked."""
    return pruning.surgery.remove_filters(model, cifar.normalize(cifar.train_images[:1]), marked)[0]


def train_from_scratch(setup: Setup, point: Point, record: dict[str, Any]) -> tuple[CifarCNN, History]:
    """The pruned network's shape trained from other initial weights, for as many epochs as the FLOPs of training and
    fine-tuning pay for (Liu et al. 2019, arXiv:1810.05270, §3, Scratch-B).
    """
    pruned, size = record["pruned"], len(setup.cifar.train_labels)
    budget = record["dense"]["training_flops"] + pruned["training_flops"]
    recipe = replace(setup.recipe, epochs=round(budget / (6 * pruned["macs"] * size)))
    model = untrained(setup.cifar, experiment.training.other(point.seed), pruned["widths"])
    task = setup.run.task(f"{point} from scratch")
    return experiment.training.train(model, setup.cifar, recipe, point.seed, task)


def measure(
    cifar: ImageData, dense: tuple[CifarCNN, History], narrow: CifarCNN, pruned: tuple[CifarCNN, History]
) -> dict[str, Any]:
    """The records of the dense and the pruned network, measured side by side, and the accuracy before fine-tuning."""
    images, size = cifar.normalize(cifar.test_images[:256]), len(cifar.train_labels)
    costs = experiment.measure.costs({"dense": dense[0], "pruned": pruned[0]}, images)
    records = {"before_fine_tuning": {"test_accuracy": experiment.training.evaluate(narrow, cifar)}}
    for name, (model, history) in {"dense": dense, "pruned": pruned}.items():
        flops = 6 * costs[name]["macs"] * size * len(history)  # backward is twice forward
        records[name] = experiment.report.describe(model, history, cifar) | costs[name] | {"training_flops": flops}
    if pruned[1]:  # the teacher sees each example and its mirror image
        records["pruned"]["training_flops"] += 4 * costs["dense"]["macs"] * size
    return records


def measure_sensitivity(setup: Setup, seed: int, method: str, cutoffs: list[Cutoff]) -> None:
    """Prune each layer alone, at several thresholds, without fine-tuning; report what that does to the accuracy."""
    run, cifar, training = setup.run, setup.cifar, experiment.training
    model, history = dense_network(setup, seed)
    layers = []
    for layer, score in importance(model, cifar, method, seed).items():
        points = []
        for cutoff in cutoffs:
            keep = pruning.filters.filters_to_keep({layer: score}, cutoff.value, cutoff.mode, cutoff.round_to)
            narrow = remove(model, cifar, pruning.filters.mark_weakest({layer: score}, keep))
            test_accuracy = training.evaluate(narrow, cifar)
            points.append({"threshold": cutoff.value, "kept": keep[layer], "test_accuracy": test_accuracy})
        layers.append({"layer": layer, "filters": len(score), "points": points})
    whole = training.accuracy(model, history, cifar)
    report, text = experiment.report.sensitivity(run.head, seed, whole, layers)
    run.publish(f"{NAME}_sensitivity", report, experiment.plots.sensitivity(report), text)


if __name__ == "__main__":
    cli.run(main)
