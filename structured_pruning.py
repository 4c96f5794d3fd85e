"""Filters of a CNN pruned for good by their L2 norm, then fine-tuning, on CIFAR-10.

    python structured_pruning.py                           # below its layer's mean by half a standard deviation
    python structured_pruning.py --target_params 380528    # or as many as it takes for so many parameters,
    python structured_pruning.py --target_macs 20e6        # for so many multiply-adds,
    python structured_pruning.py --target_latency 0.5      # for half of the time

A network of 767,936 parameters is trained. The filters whose importance is below the cutoff are removed with all that
belongs to them, so that a narrower, smaller and faster network of the same class is left. It is fine-tuned by the
labels and by the soft targets of the dense network. The drop in accuracy is that from the dense network trained on for
as many epochs.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
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
CONTROLS = {
    "longer": "the dense network trained on like the pruned one, from which the drop is measured",
    "scratch": "what the first --method leaves, trained from scratch for as many FLOPs",
}
TARGETS = ("target_params", "target_macs", "target_latency")
CUTOFFS = ("pruning_threshold", *TARGETS)  # the flags that say which filters are removed; one of them is given
SENSITIVITY_THRESHOLDS = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
TAYLOR_EXAMPLES = 10_000  # of the training set, as they are
IMAGE = (3, 32, 32)

# How every network here is trained. Found by training on 45,000 of the training examples and evaluating on the other
# 5,000, at eight epochs.
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
FINE_TUNE_RATE, TEACHER_WEIGHT = 0.03, 0.7  # the rest of the loss is that of the labels


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    cutoff = parser.add_mutually_exclusive_group()
    cutoff.add_argument(
        "--pruning_threshold",
        type=cli.number(float, 0),
        nargs="+",
        help="remove filters of less importance (default: 0.5; with --sensitivity 0 to 2.5)",
    )
    cutoff.add_argument(
        "--target_params",
        type=cli.number(int, 1),
        nargs="+",
        help="instead of a threshold: the most parameters to keep; finds the threshold",
    )
    cutoff.add_argument(
        "--target_macs",
        type=cli.number(float, 1),
        nargs="+",
        help="the same for the multiply-adds of one image",
    )
    cutoff.add_argument(
        "--target_latency",
        type=cli.number(float, 0, 1, above=True),
        nargs="+",
        help="the same for the time of a batch of 256 as a fraction of the dense network's, measured on this device",
    )
    parser.add_argument(
        "--threshold_mode",
        choices=("standardized", "relative", "absolute", "quantile"),
        default="standardized",
        help="the threshold's unit: the layer's importances moved and scaled to mean 1 and standard deviation 1, as "
        "fractions of the highest, or as they are; or a fraction of the layer's filters",
    )
    parser.add_argument(
        "--method",
        choices=("l2", "l1", "fpgm", "bn_scale", "taylor", "layerwise_random", "random"),
        nargs="+",
        default=["l2"],
        help="importance of a filter: its L2 or L1 norm or its distance to the others (fpgm), times its BatchNorm's "
        "scale; that scale alone; what the loss would change by without it (taylor); or, as controls, at random, in "
        "all layers alike (random) or with l2's count for each layer (layerwise_random)",
    )
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="instead of all that: prune each layer alone, at several thresholds, without fine-tuning",
    )
    parser.add_argument(
        "--round_to", type=cli.number(int, 1), default=1, help="keep a multiple of this many filters in each layer"
    )
    parser.add_argument("--fine_tune_epochs", type=cli.number(int, 0, 100_000), default=5, help="epochs after pruning")
    parser.add_argument(
        "--baseline", type=Path, help="a dense network to prune, as structured_cifar_dense.pt, instead of training one"
    )
    cli.add_controls_flag(parser, CONTROLS, default="longer")
    cli.add_shared_flags(parser, epochs=12, batch_size=128, train_size=50_000)
    args = parser.parse_args()
    for flag in (*TARGETS, "controls"):
        if args.sensitivity and getattr(args, flag) not in (None, parser.get_default(flag)):
            parser.error(f"--{flag}: cannot be combined with --sensitivity")
    for flag in ("method", "seed"):
        if args.sensitivity and len(getattr(args, flag)) > 1:
            parser.error(f"--{flag}: allowed: one value with --sensitivity")
    if "scratch" in args.controls and args.baseline:
        parser.error("--controls scratch: cannot be combined with --baseline, whose training cost is not known")
    if not any(getattr(args, flag) for flag in CUTOFFS):
        args.pruning_threshold = SENSITIVITY_THRESHOLDS if args.sensitivity else [0.5]
    for threshold in args.pruning_threshold or []:
        if args.threshold_mode in ("relative", "quantile") and threshold > 1:
            parser.error(f"--pruning_threshold {threshold:g}: allowed: 0 to 1 in {args.threshold_mode} mode")
    return args


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

    @property
    def name(self) -> str:
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
    args = parse_args()
    if args.sensitivity and experiment.run.launched() > 1:
        raise cli.UsageError("--sensitivity: cannot be combined with torchrun")
    baseline, digest = load_baseline(args.baseline)
    cutoffs = [
        Cutoff(flag, value, args.threshold_mode, args.round_to)
        for flag in CUTOFFS
        for value in getattr(args, flag) or []
    ]
    check_targets(cutoffs, baseline or models.cifar_cnn.CifarCNN(), experiment.run.choose_device(args.device))
    points = [Point(*point) for point in itertools.product(args.seed, args.method, cutoffs)]
    arguments = cli.as_json(args) | {"baseline_sha256": digest}
    with experiment.run.start(NAME, cli.Options.of(args), arguments, len(points)) as run:
        cifar = run.rank_0_first(lambda: experiment.data.load_cifar10(args.data_dir)).first(args.train_size)
        recipe = experiment.training.Recipe(args.epochs, args.batch_size, precision=run.precision, **RECIPE)
        fine_tuning = replace(recipe, epochs=args.fine_tune_epochs, learning_rate=FINE_TUNE_RATE)
        scratch = args.method[0] if "scratch" in args.controls else None
        setup = Setup(run, cifar.to(run.device), recipe, fine_tuning, baseline, "longer" in args.controls, scratch)

        if args.sensitivity:
            return measure_sensitivity(setup, args.seed[0], args.method[0], cutoffs)
        run.split(args.seed, partial(prepare, setup), "dense network of seed")
        runs = run.for_each({point.name: partial(prune_and_measure, setup, point) for point in points})
        write_results(run, runs)


def load_baseline(path: Path | None) -> tuple[CifarCNN | None, str | None]:
    """The network of --baseline, if there is one, and the file's SHA-256. Raises UsageError for another file."""
    if path is None:
        return None, None
    try:
        model = experiment.checkpoints.load_model(path, models.cifar_cnn.CifarCNN)
    except cli.CheckpointError as error:
        raise cli.UsageError(f"--baseline {error}") from error
    return model, hashlib.sha256(path.read_bytes()).hexdigest()


def check_targets(cutoffs: Sequence[Cutoff], largest: CifarCNN, device: torch.device) -> None:
    """Raise UsageError for a target that no network within the dense one meets."""
    for cutoff in cutoffs:
        if cutoff.flag in TARGETS:
            cost = experiment.measure.cost_of_widths(cutoff.flag, largest, IMAGE, device)
            low, high = cost([min(cutoff.round_to, width) for width in largest.widths]), cost(largest.widths)
            if not low <= cutoff.value <= high:
                raise cli.UsageError(f"--{cutoff.flag} {cutoff.value:g}: allowed: {low:.6g} to {high:.6g}")


def untrained(cifar: ImageData, seed: int, widths: Sequence[int] | None = None) -> CifarCNN:
    """The network that `seed` gives before training; its first layer whitens the images already."""

    def network() -> CifarCNN:
        model = models.cifar_cnn.CifarCNN(*([widths] if widths else []))
        model.whiten(cifar.normalize(cifar.train_images[:5000]).cpu())
        return model

    return experiment.training.initial(network, seed, cifar.train_images.device)


def train(model: CifarCNN, cifar: ImageData, recipe: Recipe, seed: int, task: Task | None = None) -> History:
    """Train `model` in place with a new optimiser; the history is empty where the recipe has no epochs."""
    if recipe.epochs == 0:
        return []
    return experiment.training.fit(model, experiment.training.sgd(model, recipe), cifar, recipe, seed, task=task)


def dense_network(setup: Setup, seed: int) -> tuple[CifarCNN, History]:
    """The network to prune and its history: that of --baseline, or the one of `seed`, trained once in a run."""
    device = setup.cifar.train_images.device
    if setup.baseline:
        return experiment.training.initial(lambda: setup.baseline, seed, device), []
    model = untrained(setup.cifar, seed)
    return model, train(model, setup.cifar, setup.recipe, seed, setup.run.task(f"seed {seed} dense"))


def soft_targets(cifar: ImageData, teacher: CifarCNN, precision: torch.dtype) -> dict[str, Tensor]:
    """The labels to fine-tune on: the true ones and, with the larger weight, those of the teacher."""
    make = experiment.training.soft_targets
    return {"labels": make(cifar, teacher, TEACHER_WEIGHT, mirror=True, precision=precision)}


def fine_tune(
    model: CifarCNN, cifar: ImageData, recipe: Recipe, seed: int, task: Task | None = None
) -> tuple[CifarCNN, History]:
    """A copy of `model` trained further, and its history."""
    model = copy.deepcopy(model)
    return model, train(model, cifar, recipe, seed, task)


def prepare(setup: Setup, seed: int) -> tuple[CifarCNN, History, ImageData, tuple[CifarCNN, History] | None]:
    """What the points of a seed share, made once in a run: the dense network and its history, the data with its soft
    targets, and the control "longer".
    """
    run, cifar = setup.run, setup.cifar
    dense, history = dense_network(setup, seed)
    if setup.fine_tuning.epochs:
        make = partial(soft_targets, cifar, dense, setup.recipe.precision)
        cifar = experiment.training.with_labels(cifar, run.once(f"seed {seed} soft targets", make)["labels"])
    longer = None
    if setup.longer:
        longer = fine_tune(dense, cifar, setup.fine_tuning, seed, run.task(f"seed {seed} longer"))
    return dense, history, cifar, longer


def prune_and_measure(setup: Setup, point: Point) -> dict[str, Any]:
    """Train, prune, fine-tune, measure: the record of one point; a run of one point leaves its networks, too."""
    run, cifar = setup.run, setup.cifar
    dense, dense_history, labelled, longer = prepare(setup, point.seed)
    # Kept, because a cutoff found by measuring time may be another one after a stop.
    decided = run.once(f"{point.name} cutoff", partial(choose_filters, dense, cifar, point))
    cut = remove(dense, cifar, decided["marked"])
    pruned, history = fine_tune(cut, labelled, setup.fine_tuning, point.seed, run.task(point.name))
    record = {"seed": point.seed, "method": point.method, point.cutoff.flag: point.cutoff.value, **decided["record"]}
    record |= run.on_rank_0(lambda: measure(cifar, (dense, dense_history), cut, (pruned, history)))
    left = record["pruned"]["test_accuracy"]
    record["drop_from_baseline"] = round(record["dense"]["test_accuracy"] - left, 4)
    if longer:
        record["longer"] = {"test_accuracy": accuracy(*longer, cifar), "history": longer[1]}
        record["drop"] = round(record["longer"]["test_accuracy"] - left, 4)
    if point.method == setup.scratch:
        record["scratch"] = train_from_scratch(setup, point, record)
    if run.jobs == 1:
        networks = {NAME: pruned, f"{NAME}_dense": dense}
        contents = {f"{stem}.pt": experiment.checkpoints.network_bytes(each) for stem, each in networks.items()}
        contents[f"{NAME}.pt2"] = experiment.checkpoints.exported(pruned, cifar.normalize(cifar.test_images[:2]))
        run.write(contents)
    return record | {"peak_memory_bytes": experiment.measure.peak_memory_bytes(run.device)}


def choose_filters(dense: CifarCNN, cifar: ImageData, point: Point) -> dict[str, Any]:
    """The filters to remove, boolean `(C_out,)` per layer, and the record of what decided: scores and threshold."""
    filters, cutoff, device = pruning.filters, point.cutoff, cifar.train_images.device
    scores = importance(dense, cifar, point.method, point.seed)
    if cutoff.flag in TARGETS:
        cost = experiment.measure.cost_of_widths(cutoff.flag, dense, IMAGE, device)
        fill = cutoff.flag != "target_latency"  # that one filter more takes more time, cannot be measured
        threshold, keep = filters.filters_for_target(
            scores, cutoff.value, lambda keep: cost([*keep.values()]), cutoff.mode, cutoff.round_to, fill
        )
    else:
        threshold = cutoff.value
        keep = filters.filters_to_keep(scores, threshold, cutoff.mode, cutoff.round_to)
    layers = [
        {"layer": layer, "filters": len(score), "kept": keep[layer], "scores": score.tolist()}
        for layer, score in scores.items()
    ]
    all_below = [
        layer for layer, score in scores.items() if filters.count_weak(score, threshold, cutoff.mode) == len(score)
    ]
    record = {"threshold": threshold, "all_below": all_below, "layers": layers}
    return {"marked": filters.mark_weakest(scores, keep), "record": record}


def importance(model: CifarCNN, cifar: ImageData, method: str, seed: int) -> dict[str, Tensor]:
    """The importance of the filters that are trained, which are all but those of the first layer."""
    example, numbers = cifar.normalize(cifar.test_images[:1]), experiment.training.generator(seed)
    losses = partial(experiment.training.losses, cifar, TAYLOR_EXAMPLES)
    scores = pruning.filters.filter_scores(model, method, numbers, example, losses)
    del scores["whitening"]
    return scores


def remove(model: CifarCNN, cifar: ImageData, marked: dict[str, Tensor]) -> CifarCNN:
    """The network without the filters that are marked."""
    return pruning.surgery.remove_filters(model, cifar.normalize(cifar.test_images[:1]), marked)[0]


def train_from_scratch(setup: Setup, point: Point, record: dict[str, Any]) -> dict[str, Any]:
    """The pruned network's shape trained from other initial weights, for as many epochs as the FLOPs of training and
    fine-tuning pay for (Liu et al. 2019, arXiv:1810.05270, §3, Scratch-B).
    """
    pruned, size = record["pruned"], len(setup.cifar.train_labels)
    budget = record["dense"]["training_flops"] + pruned["training_flops"]
    recipe = replace(setup.recipe, epochs=round(budget / (6 * pruned["macs"] * size)))
    model = untrained(setup.cifar, point.seed + 2**32, pruned["widths"])
    history = train(model, setup.cifar, recipe, point.seed, setup.run.task(f"{point.name} from scratch"))
    return {"test_accuracy": accuracy(model, history, setup.cifar), "history": history}


def accuracy(model: CifarCNN, history: History, cifar: ImageData) -> float:
    """The test accuracy after the last epoch; where there was none it is measured now."""
    return history[-1]["test_accuracy"] if history else experiment.training.evaluate(model, cifar)


def measure(
    cifar: ImageData, dense: tuple[CifarCNN, History], cut: CifarCNN, pruned: tuple[CifarCNN, History]
) -> dict[str, Any]:
    """The records of the dense and the pruned network, measured side by side."""
    images = cifar.normalize(cifar.test_images[:256])
    costs = experiment.measure.costs({"dense": dense[0], "pruned": pruned[0]}, images)
    records = {}
    for name, (model, history) in {"dense": dense, "pruned": pruned}.items():
        records[name] = costs[name] | {
            "test_accuracy": accuracy(model, history, cifar),
            "checkpoint_bytes": len(experiment.checkpoints.network_bytes(model)),
            "widths": list(model.widths),
            "history": history,
            "training_flops": 6 * costs[name]["macs"] * len(cifar.train_labels) * len(history),  # backward is 2 forward
        }
    if pruned[1]:  # for the soft targets the dense network has seen two images of each example
        records["pruned"]["training_flops"] += 4 * costs["dense"]["macs"] * len(cifar.train_labels)
    records["before_fine_tuning"] = {"test_accuracy": experiment.training.evaluate(cut, cifar)}
    return records


def measure_sensitivity(setup: Setup, seed: int, method: str, cutoffs: list[Cutoff]) -> None:
    """Prune each layer alone, at several thresholds, without fine-tuning; report what that does to the accuracy."""
    run, cifar, report = setup.run, setup.cifar, experiment.report
    model, history = dense_network(setup, seed)
    whole, layers, rows = accuracy(model, history, cifar), [], []
    for layer, score in importance(model, cifar, method, seed).items():
        points = []
        for cutoff in cutoffs:
            keep = pruning.filters.filters_to_keep({layer: score}, cutoff.value, cutoff.mode, cutoff.round_to)
            cut = remove(model, cifar, pruning.filters.mark_weakest({layer: score}, keep))
            left = experiment.training.evaluate(cut, cifar)
            points.append({"threshold": cutoff.value, "kept": keep[layer], "test_accuracy": left})
        layers.append({"layer": layer, "filters": len(score), "points": points})
        rows.append([layer, str(len(score)), *(f"{each['test_accuracy']:.2f} ({each['kept']})" for each in points)])
    contents = {"schema": report.SCHEMA, **run.head, "seed": seed, "test_accuracy": whole, "layers": layers}
    header = ["accuracy (filters kept)", "filters", *(f"at {cutoff.value:g}" for cutoff in cutoffs)]
    text = f"{report.table(header, rows)}\naccuracy of the whole network: {whole:.2f}"
    run.publish(f"{NAME}_sensitivity", contents, experiment.plots.sensitivity(contents), text)


def write_results(run: Run, runs: list[dict[str, Any]]) -> None:
    """The JSON with every record, the figure, and a table on the screen."""
    report, plots, column = experiment.report, experiment.plots, experiment.report.Column
    by = next(flag for flag in CUTOFFS if flag in runs[0])

    def speed_up(run: dict[str, Any], batch: str) -> float:
        return report.speed_up(run["dense"], run["pruned"], batch)

    columns = [
        column("parameters", "parameters", lambda run: run["pruned"]["parameters"]),
        column("accuracy_before", "before fine-tuning (%)", lambda run: run["before_fine_tuning"]["test_accuracy"]),
        column("test_accuracy", "test accuracy (%)", lambda run: run["pruned"]["test_accuracy"]),
        column("drop", "drop (points)", lambda run: run.get("drop")),
        column("drop_from_baseline", "from the dense network", lambda run: run["drop_from_baseline"]),
        column("macs_reduction", "times fewer MACs", lambda run: run["dense"]["macs"] / run["pruned"]["macs"]),
        column("speed_up_1", "times as fast, batch 1", partial(speed_up, batch="batch 1")),
        column("speed_up_256", "batch 256", partial(speed_up, batch="batch 256")),
        column("longer_accuracy", "dense + as many epochs (%)", lambda run: run.get("longer", {}).get("test_accuracy")),
        column("scratch_accuracy", "from scratch (%)", lambda run: run.get("scratch", {}).get("test_accuracy")),
    ]
    contents = report.make(run.head, runs, ("method", by), columns)
    text = report.summary_table(contents, lambda point: f"{point['method']}, {by} {point[by]:,}", columns)
    if run.jobs > 1:
        return run.publish(f"{NAME}_sweep", contents, plots.structured_sweep(contents), text)
    layers = runs[0]["layers"]
    rows = [[layer["layer"], str(layer["filters"]), str(layer["kept"])] for layer in layers]
    text += "\n\n" + report.table(["layer", "filters", "kept"], rows)
    if all(layer["kept"] == layer["filters"] for layer in layers):
        text += "\nno filter is below the cutoff: nothing was pruned"
    for layer in runs[0]["all_below"]:
        text += f"\n{layer}: every filter is below the cutoff, the most important is kept"
    networks = (f"{NAME}.pt", f"{NAME}.pt2", f"{NAME}_dense.pt")
    run.publish(NAME, contents, plots.structured(contents), text, networks)


if __name__ == "__main__":
    cli.run(main, resumable=True)
