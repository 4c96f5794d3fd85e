"""Filters of a CNN cut for good by their L2 norm, then fine-tuning, on CIFAR-10.

    python structured_pruning.py                                # filters below half of their layer's highest score go
    python structured_pruning.py --target_params 380528         # as many go as it takes for so many parameters
    python structured_pruning.py --target_params 380528 230000 --seed 0 1 2

A network of 767,936 parameters is trained. The filters whose score, their norm as the network uses it, is below the
cutoff are taken out for good with all that belongs to them, so that the network that is left is narrower, smaller and
faster. It is then trained a bit more.
"""

import argparse
from pathlib import Path

from experiment import flags
from pruning.methods import FILTER_METHODS, THRESHOLD_MODES

CONTROLS = {"longer": "dense network trained on as long", "scratch": "cut network trained from scratch"}
SENSITIVITY_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def parse_args() -> tuple[flags.Parser, argparse.Namespace]:
    parser = flags.Parser(description=__doc__.splitlines()[0])
    cutoff = parser.add_mutually_exclusive_group()
    cutoff.add_argument(
        "--pruning_threshold",
        type=flags.number(float, 0),
        nargs="+",
        help="filters of a score below this go, one or several (default: 0.5; for --sensitivity 0.3 to 0.9)",
    )
    parser.add_argument(
        "--threshold_mode",
        choices=THRESHOLD_MODES,
        default="relative",
        help="the threshold is a fraction of the highest score in the layer, the score itself, or the fraction of the "
        "layer's filters that goes",
    )
    cutoff.add_argument(
        "--target_params",
        type=flags.number(int, 1),
        nargs="+",
        help="instead of a threshold: the most parameters to leave, one or several; finds the relative threshold",
    )
    parser.add_argument(
        "--method",
        choices=FILTER_METHODS,
        nargs="+",
        default=["l2"],
        help="what decides which filters go, one or several: their L2 or L1 norm, their distance to the others (fpgm), "
        "the scale of their BatchNorm; or, to compare with, chance, in each layer as many as by l2 (shuffled) or in "
        "all layers alike (random)",
    )
    parser.add_argument(
        "--controls",
        choices=CONTROLS,
        nargs="*",
        help="also train the dense network as much longer, and what the first --method leaves from scratch at the same "
        "total cost; or the one that is named",
    )
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="instead of all that: cut each layer alone, at several thresholds, without fine-tuning",
    )
    parser.add_argument(
        "--round_to", type=flags.number(int, 1), default=1, help="keep a multiple of so many filters in each layer"
    )
    parser.add_argument(
        "--fine_tune_epochs", type=flags.number(int, 0, 100_000), default=5, help="passes after the cut"
    )
    parser.add_argument(
        "--baseline", type=Path, help="a dense network to cut, as structured_cifar_dense.pt, instead of training one"
    )
    flags.add_shared_flags(parser, epochs=8, batch_size=128, train_size=50_000)
    args = parser.parse_args()
    args.controls = list(CONTROLS) if args.controls == [] else args.controls or []
    if args.sensitivity:
        for flag in ("target_params", "controls"):
            if getattr(args, flag):
                parser.error(f"--{flag}: allowed: without --sensitivity")
        for flag in ("method", "seed"):
            if len(getattr(args, flag)) > 1:
                parser.error(f"--{flag}: allowed: one value with --sensitivity")
    if "scratch" in args.controls and args.baseline:
        parser.error("--controls scratch: allowed: without --baseline, whose training nobody knows the cost of")
    if args.pruning_threshold is None:
        args.pruning_threshold = list(SENSITIVITY_THRESHOLDS) if args.sensitivity else [0.5]
    for threshold in args.pruning_threshold:
        if args.threshold_mode != "absolute" and threshold > 1:
            parser.error(f"--pruning_threshold {threshold:g}: allowed: 0 to 1 in {args.threshold_mode} mode")
    if args.target_params and args.threshold_mode != "relative":
        parser.error(f"--threshold_mode {args.threshold_mode}: allowed: relative, which is what --target_params finds")
    return parser, args


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before torch is imported, which takes seconds

import copy
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from experiment import data, plots, profiling, ranks, results, training
from experiment.journal import Checkpoint, Journal
from experiment.start import start
from models.cifar_cnn import CifarCNN
from pruning import filters
from pruning.surgery import remove_filters

# Found by training on 45,000 of the training examples and judging on the other 5,000.
LEARNING_RATE, WARM_UP, MOMENTUM, WEIGHT_DECAY = 0.2, 0.2, 0.9, 1.3e-3
BIAS_RATE = 16  # the learning rate of BatchNorm's biases, in multiples of the others'
# BatchNorm's scales learn slowly, so that a layer's scores stay as they start: alike in the first three layers, which
# do most of the work, and falling from 1 to 0 by these powers of a line in the others, which hold most of the
# parameters. The network comes to rely on a filter the more, the larger its scale, and the cutoff falls on those that
# matter least. The last layer, whose parameters do the least work, gives most.
SCALE_RATE, SCALE_POWERS = 0.1, (0.6, 0.95, 1.9)
FINE_TUNE_RATE, TEACHER_SHARE = 0.03, 0.7  # the rest of the loss is the labels'
LABEL_SMOOTHING, SHIFT_PIXELS = 0.2, 2

NAME = "structured_cifar"  # of the files written


def main() -> None:
    parser, args = parse_args()
    if args.sensitivity and ranks.launched() > 1:
        parser.error("--sensitivity: allowed: in one process, without torchrun")
    given_model = given_baseline(parser, args)
    wanted = list(itertools.product(args.seed, args.method, args.target_params or args.pruning_threshold))
    device, journal = start(parser, args, NAME, len(wanted))
    given_model = given_model and given_model.to(device, memory_format=torch.channels_last)
    cifar = ranks.first_before_others(lambda: data.load_cifar10(args.data_dir)).first(args.train_size).to(device)
    head = {"arguments": flags.as_json(args), "environment": results.environment(device)}
    if args.sensitivity:
        measure_sensitivity(args, head, dense(args, journal, cifar, given_model, args.seed[0])[0], cifar)
        return journal.close()
    if len(wanted) == 1:
        run, models = dense_and_pruned(args, journal, cifar, given_model, *wanted[0])
        if ranks.rank() == 0:
            write_run(args, {**head, **run}, models, cifar)
    else:
        # First what the runs of a seed have in common: then it is on disk, for all processes to read.
        ranks.share(args.seed, lambda seed: make_common(args, journal, cifar, given_model, seed))
        runs = journal.all_of(
            {
                run_name(*each): lambda each=each: dense_and_pruned(args, journal, cifar, given_model, *each)[0]
                for each in wanted
            }
        )
        if ranks.rank() == 0:
            write_sweep(args, head, runs)
    journal.close()


def given_baseline(parser: flags.Parser, args: argparse.Namespace) -> CifarCNN | None:
    """The network of --baseline, if there is one; exits with one line where it is none or --target_params too small."""
    model, args.baseline_sha256 = None, None
    if args.baseline:
        try:
            model = results.load_model(args.baseline, CifarCNN)
            args.baseline_sha256 = hashlib.sha256(args.baseline.read_bytes()).hexdigest()
        except results.CheckpointError as error:
            parser.error(f"--baseline {error}")
    if args.target_params:
        largest = model or CifarCNN()
        smallest = CifarCNN([min(args.round_to, width) for width in largest.widths])
        low, high = profiling.parameters(smallest), profiling.parameters(largest)
        for target in args.target_params:
            if not low <= target <= high:
                parser.error(f"--target_params {target}: allowed: {low} to {high}")
    return model


def run_name(seed: int, method: str, wanted: float) -> str:
    return f"seed {seed} {method} at {wanted}"


def dense_and_pruned(
    args: argparse.Namespace,
    journal: Journal,
    cifar: data.ImageData,
    given_model: CifarCNN | None,
    seed: int,
    method: str,
    wanted: float,
) -> tuple[dict[str, Any], dict[str, CifarCNN]]:
    """Train (once for all runs of the seed), cut, fine-tune, measure: the record and the networks."""
    name = run_name(seed, method, wanted)
    dense_model, dense_history, lessons = dense_and_lessons(args, journal, cifar, given_model, seed)
    cut_model, report = cut(args, dense_model, seed, method, wanted, cifar)
    pruned_model, history = fine_tuned(args, seed, cut_model, lessons, journal.checkpoint(name))
    models = {"dense": dense_model, "cut": cut_model, "pruned": pruned_model}
    histories = {"dense": dense_history, "pruned": history}
    records = ranks.first_alone(args.processes, lambda: measure(models, cifar, histories))
    for network, epochs in histories.items():
        record = records[network]
        record["history"] = epochs
        record["training_flops"] = 6 * record["macs"] * args.train_size * len(epochs)  # backward is twice forward
    if history:  # the teacher has looked at two images of each example
        records["pruned"]["training_flops"] += 4 * records["dense"]["macs"] * args.train_size
    drop = records["dense"]["test_accuracy"] - records["pruned"]["test_accuracy"]
    run = {"seed": seed, "method": method, **report, "drop": round(drop, 4), **records}
    if "longer" in args.controls:
        longer_model, longer_history = trained_on(args, journal, lessons, dense_model, seed)
        run["longer"] = {"test_accuracy": accuracy(longer_model, longer_history, cifar), "history": longer_history}
    if "scratch" in args.controls and method == args.method[0]:
        run["scratch"] = from_scratch(args, cifar, run, journal.checkpoint(f"{name} from scratch"))
    run["peak_memory_bytes"] = profiling.peak_memory_bytes(cifar.train_images.device)
    return run, models


def dense(
    args: argparse.Namespace, journal: Journal, cifar: data.ImageData, given_model: CifarCNN | None, seed: int
) -> tuple[CifarCNN, list[dict[str, Any]]]:
    """The network to be cut and its history: the one that was given, or the one that `seed` gives, trained."""
    if given_model:
        return given_model, []
    model = untrained(seed, cifar)
    for scale, power in zip((model.bn4.weight, model.bn5.weight, model.bn6.weight), SCALE_POWERS, strict=True):
        scale.data = torch.linspace(1, 0, len(scale)).pow(power).to(scale)
    checkpoint = journal.checkpoint(f"seed {seed} dense")
    return model, train(args, seed, model, cifar, args.epochs, LEARNING_RATE, checkpoint)


def dense_and_lessons(
    args: argparse.Namespace, journal: Journal, cifar: data.ImageData, given_model: CifarCNN | None, seed: int
) -> tuple[CifarCNN, list[dict[str, Any]], data.ImageData]:
    """The dense network, its history, and what it teaches: all made once for the runs of a seed."""
    model, history = dense(args, journal, cifar, given_model, seed)
    said = journal.once(f"seed {seed} lessons", lambda: {"labels": taught(args, cifar, model).train_labels})
    return model, history, replace(cifar, train_labels=said["labels"].to(cifar.train_labels.device))


def make_common(
    args: argparse.Namespace, journal: Journal, cifar: data.ImageData, given_model: CifarCNN | None, seed: int
) -> None:
    """Make what the runs of a seed share, so that the journal has it."""
    model, _, lessons = dense_and_lessons(args, journal, cifar, given_model, seed)
    if "longer" in args.controls:
        trained_on(args, journal, lessons, model, seed)


def taught(args: argparse.Namespace, cifar: data.ImageData, dense_model: CifarCNN) -> data.ImageData:
    """What fine-tuning learns from: the labels and, for the larger part, what the dense network says."""
    if args.fine_tune_epochs == 0:
        return cifar
    return training.taught(cifar, dense_model, TEACHER_SHARE, mirror=True, precision=getattr(torch, args.precision))


def fine_tuned(
    args: argparse.Namespace,
    seed: int,
    model: CifarCNN,
    lessons: data.ImageData,
    checkpoint: Checkpoint | None = None,
) -> tuple[CifarCNN, list[dict[str, Any]]]:
    """A copy of `model` trained on, and its history."""
    model = copy.deepcopy(model)
    if args.fine_tune_epochs == 0:
        return model, []
    return model, train(args, seed, model, lessons, args.fine_tune_epochs, FINE_TUNE_RATE, checkpoint)


def trained_on(
    args: argparse.Namespace, journal: Journal, lessons: data.ImageData, dense_model: CifarCNN, seed: int
) -> tuple[CifarCNN, list[dict[str, Any]]]:
    """The dense network with the training that the cut ones get, once for all runs of the seed, and its history."""
    return fine_tuned(args, seed, dense_model, lessons, journal.checkpoint(f"seed {seed} dense trained on"))


def from_scratch(
    args: argparse.Namespace, cifar: data.ImageData, run: dict[str, Any], checkpoint: Checkpoint
) -> dict[str, Any]:
    """The record of a network of the widths that are left in `run`, trained from scratch at the same total cost.

    That is as many epochs as the FLOPs of training and fine-tuning pay for (Liu et al. 2019, arXiv:1810.05270, §3,
    Scratch-B).
    """
    seed, pruned = run["seed"], run["pruned"]
    model = untrained(seed + 2**32, cifar, pruned["widths"])
    budget = run["dense"]["training_flops"] + pruned["training_flops"]
    epochs = round(budget / (6 * pruned["macs"] * args.train_size))
    history = train(args, seed, model, cifar, epochs, LEARNING_RATE, checkpoint)
    return {"test_accuracy": accuracy(model, history, cifar), "history": history}


def untrained(seed: int, cifar: data.ImageData, widths: Sequence[int] = CifarCNN.WIDTHS) -> CifarCNN:
    """The network that `seed` gives before training; its first layer knows the images already."""
    torch.manual_seed(seed)
    model = CifarCNN(widths)
    model.whiten(data.normalize(cifar.train_images[:5000], cifar.mean, cifar.std).cpu())
    return model.to(cifar.train_images.device, memory_format=torch.channels_last)


def train(
    args: argparse.Namespace,
    seed: int,
    model: CifarCNN,
    cifar: data.ImageData,
    epochs: int,
    learning_rate: float,
    checkpoint: Checkpoint | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place by a new optimiser; an entry for every epoch."""
    batch_norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    groups = [
        {"params": [layer.weight for layer in layers if layer.weight.requires_grad]},
        {"params": [layer.weight for layer in batch_norms], "lr": SCALE_RATE * learning_rate, "weight_decay": 0},
        {
            "params": [layer.bias for layer in batch_norms],
            "lr": BIAS_RATE * learning_rate,
            "weight_decay": WEIGHT_DECAY / BIAS_RATE,
        },
    ]
    optimizer = torch.optim.SGD(groups, learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    steps = epochs * training.steps_per_epoch(args.train_size, args.batch_size)
    average = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    return training.fit(
        model,
        optimizer,
        training.triangle(optimizer, steps, WARM_UP),
        cifar,
        epochs=epochs,
        batch_size=args.batch_size,
        augment=partial(data.random_shift, pixels=SHIFT_PIXELS, mode="reflect"),
        mirror=True,
        label_smoothing=LABEL_SMOOTHING,
        precision=getattr(torch, args.precision),
        seed=seed,
        after_step=partial(training.lookahead, model=model, average=average, steps=steps),
        state=average,
        checkpoint=checkpoint,
        description=f"seed {seed}, {profiling.parameters(model):,} parameters",
        processes=args.processes,
    )


def cut(
    args: argparse.Namespace,
    dense_model: CifarCNN,
    seed: int,
    method: str,
    wanted: float,
    cifar: data.ImageData,
) -> tuple[CifarCNN, dict[str, Any]]:
    """The dense network without its weakest filters, and what was cut; `wanted` is a threshold or a size."""
    scores = trained_scores(dense_model, method, torch.Generator().manual_seed(seed))
    if args.target_params:
        threshold, keep = filters.filters_for_target(scores, wanted, parameters_with, args.round_to)
        report = {"target_params": wanted, "threshold": threshold, "guarded": []}
    else:
        keep = filters.filters_to_keep(scores, wanted, args.threshold_mode, args.round_to)
        guarded = [
            layer
            for layer, score in scores.items()
            if filters.count_weak(score, wanted, args.threshold_mode) == len(score)
        ]
        report = {"pruning_threshold": wanted, "threshold": wanted, "guarded": guarded}
    model, _ = remove_filters(dense_model, example(cifar), filters.mark_weakest(scores, keep))
    report["layers"] = [
        {"layer": layer, "filters": len(score), "kept": keep[layer], "scores": score.tolist()}
        for layer, score in scores.items()
    ]
    return model, report


def trained_scores(model: CifarCNN, method: str, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
    """The scores of the filters that are trained, which are all but those of the first layer."""
    scores = filters.filter_scores(model, method, generator)
    del scores["whitening"]
    return scores


def example(cifar: data.ImageData) -> torch.Tensor:
    """A batch of one image, as the networks see it."""
    return data.normalize(cifar.test_images[:1], cifar.mean, cifar.std)


def parameters_with(keep: dict[str, int]) -> int:
    """The size of the network with so many filters in each layer."""
    return profiling.parameters(CifarCNN(list(keep.values())))


def accuracy(model: CifarCNN, history: list[dict[str, Any]], cifar: data.ImageData) -> float:
    """The test accuracy that the last epoch of `history` ended with; measured now, where there was none."""
    return history[-1]["test_accuracy"] if history else training.evaluate(model, cifar)


def measure(
    models: dict[str, CifarCNN], cifar: data.ImageData, histories: dict[str, list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """What is worth knowing of each network, trained by `histories`; the speeds are measured side by side."""
    images = data.normalize(cifar.test_images[:256], cifar.mean, cifar.std)
    shapes = {"dense": models["dense"], "pruned": models["pruned"]}  # fine-tuning does not change the shape
    latency = {
        f"batch {size}": profiling.latency_ms(shapes, images[:size], repetitions)
        for size, repetitions in ((1, 200), (256, 20))
    }
    return {
        name: {
            "test_accuracy": accuracy(model, histories.get(name, []), cifar),
            "parameters": profiling.parameters(model),
            "macs": profiling.macs(model, images[:1]),
            "latency_ms": {batch: times.get(name, times["pruned"]) for batch, times in latency.items()},
            "checkpoint_bytes": len(results.checkpoint(model)),
            "widths": list(model.widths),
        }
        for name, model in models.items()
    }


def measure_sensitivity(args: argparse.Namespace, head: dict[str, Any], model: CifarCNN, cifar: data.ImageData) -> None:
    """Cut each layer alone, at several thresholds, without fine-tuning: what that does to the accuracy."""
    scores = trained_scores(model, args.method[0], torch.Generator().manual_seed(args.seed[0]))
    report = {**head, "seed": args.seed[0], "test_accuracy": training.evaluate(model, cifar), "layers": []}
    for layer, score in tqdm(scores.items(), unit="layer", disable=None):
        points = []
        for threshold in args.pruning_threshold:
            keep = filters.filters_to_keep({layer: score}, threshold, args.threshold_mode, args.round_to)
            cut_model, _ = remove_filters(model, example(cifar), filters.mark_weakest({layer: score}, keep))
            accuracy = training.evaluate(cut_model, cifar)
            points.append({"threshold": threshold, "kept": keep[layer], "test_accuracy": accuracy})
        report["layers"].append({"layer": layer, "filters": len(score), "points": points})
    contents = {
        f"{NAME}_sensitivity.json": results.json_bytes(report),
        f"{NAME}_sensitivity.png": plots.sensitivity(report),
    }
    written = results.write_all(args.results_dir, contents)
    rows = [
        [layer["layer"], str(layer["filters"])]
        + [f"{point['test_accuracy']:.2f} ({point['kept']})" for point in layer["points"]]
        for layer in report["layers"]
    ]
    header = ["accuracy (filters left)", "filters", *(f"at {value:g}" for value in args.pruning_threshold)]
    print(results.table(header, rows))
    print(f"accuracy of the whole network: {report['test_accuracy']:.2f}")
    print(written)


def write_run(
    args: argparse.Namespace, run: dict[str, Any], models: dict[str, CifarCNN], cifar: data.ImageData
) -> None:
    """One seed, one cut: the networks themselves, the record, its picture, and a table on the screen."""
    images = data.normalize(cifar.test_images[:2], cifar.mean, cifar.std)
    contents = {
        f"{NAME}.json": results.json_bytes(run),
        f"{NAME}.png": plots.structured(run),
        f"{NAME}.pt": results.checkpoint(models["pruned"]),
        f"{NAME}.pt2": results.exported(models["pruned"], images),
        f"{NAME}_dense.pt": results.checkpoint(models["dense"]),
    }
    written = results.write_all(args.results_dir, contents)
    networks = [run[name] for name in ("dense", "cut", "pruned")]
    rows = [
        ["test accuracy (%)", *(f"{network['test_accuracy']:.2f}" for network in networks)],
        ["parameters", *(f"{network['parameters']:,}" for network in networks)],
        ["MACs of an example", *(f"{network['macs']:,}" for network in networks)],
        ["latency, batch 1 (ms)", *(f"{network['latency_ms']['batch 1']:.2f}" for network in networks)],
        ["latency, batch 256 (ms)", *(f"{network['latency_ms']['batch 256']:.2f}" for network in networks)],
        ["checkpoint (bytes)", *(f"{network['checkpoint_bytes']:,}" for network in networks)],
    ]
    for layer in run["layers"]:
        rows.append([f"  filters of {layer['layer']}", f"{layer['filters']}", f"{layer['kept']}", f"{layer['kept']}"])
    print(results.table(["", "dense", "cut", "pruned"], rows))
    if all(layer["kept"] == layer["filters"] for layer in run["layers"]):
        print("nothing was cut: no filter is below the cutoff")
    for layer in run["guarded"]:
        print(f"{layer}: every filter is below the cutoff, the strongest stays")
    print(f"accuracy lost to pruning: {run['drop']:.2f} points")
    for control, told in CONTROLS.items():
        if control in run:
            print(f"{told}: {run[control]['test_accuracy']:.2f} %")
    print(written)


def write_sweep(args: argparse.Namespace, head: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Several seeds or cuts: every record, the curve, and a table on the screen."""
    by = "target_params" if args.target_params else "pruning_threshold"
    quantities = {
        "parameters": lambda run: run["pruned"]["parameters"],
        "cut_accuracy": lambda run: run["cut"]["test_accuracy"],
        "test_accuracy": lambda run: run["pruned"]["test_accuracy"],
        "drop": lambda run: run["drop"],
        "macs_reduction": lambda run: run["dense"]["macs"] / run["pruned"]["macs"],
        "speed_up_1": partial(speed_up, batch="batch 1"),
        "speed_up_256": partial(speed_up, batch="batch 256"),
    }
    for control in args.controls:
        quantities[f"{control}_accuracy"] = lambda run, control=control: run.get(control, {}).get("test_accuracy")
    sweep = {**head, "summary": results.summarize(runs, ("method", by), quantities), "runs": runs}
    contents = {f"{NAME}_sweep.json": results.json_bytes(sweep), f"{NAME}_sweep.png": plots.structured_sweep(sweep)}
    written = results.write_all(args.results_dir, contents)
    header = ["", "parameters", "before fine-tuning (%)", "test accuracy (%)", "drop (points)"]
    header += ["MACs (times fewer)", "batch 1 (times as fast)", "batch 256"]
    header += [f"{CONTROLS[control]} (%)" for control in args.controls]
    size = runs[0]["dense"]["parameters"]
    rows = [["dense", f"{size:,}", "", results.with_std(sweep["summary"]["dense"]), *[""] * (len(header) - 4)]]
    for point in sweep["summary"]["pruned"]:
        name, parameters = f"{point['method']}, {by} {point[by]}", f"{point['parameters']['mean']:,.0f}"
        rows.append([name, parameters, *(results.with_std(point.get(quantity)) for quantity in list(quantities)[1:])])
    print(results.table(header, rows))
    print(written)


def speed_up(run: dict[str, Any], batch: str) -> float:
    """How many times as fast as the dense network the pruned one is."""
    return run["dense"]["latency_ms"][batch] / run["pruned"]["latency_ms"][batch]


if __name__ == "__main__":
    flags.run(main, resumable=True)
