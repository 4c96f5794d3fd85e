"""Filters of a CNN cut for good by their L2 norm, then fine-tuning, on CIFAR-10.

    python structured_pruning.py                                # filters below half of their layer's largest norm go
    python structured_pruning.py --target_params 380528         # as many go as it takes for so many parameters
    python structured_pruning.py --target_params 380528 230000 --seed 0 1 2

A network of 767,936 parameters is trained. The filters whose norm is below the cutoff are taken out for good with all
that belongs to them, so that the network that is left is narrower, smaller and faster. It is then trained a bit more.
"""

import argparse
import copy
import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiment import data, flags, plots, profiling, results, training
from experiment.journal import Checkpoint, Journal
from models.cifar_cnn import CifarCNN
from pruning import filters
from pruning.surgery import remove_filters

# Found by training on 45,000 of the training examples and judging on the other 5,000.
LEARNING_RATE, WARM_UP, MOMENTUM, WEIGHT_DECAY = 0.2, 0.2, 0.9, 1.3e-3
BIAS_RATE = 16  # the learning rate of BatchNorm's biases, in multiples of the others'
SCALE_DECAY = 0.0  # the weight decay of BatchNorm's scales
FINE_TUNE_RATE = 0.1
LABEL_SMOOTHING, CROP = 0.2, (28, 28)

NAME = "structured_cifar"  # of the files written


def main() -> None:
    args, given_model, device, journal = parse_args()
    cifar = data.load_cifar10(args.data_dir).first(args.train_size)
    cifar = replace(cifar, test_images=data.central_crop(cifar.test_images, size=CROP)).to(device)
    head = {"arguments": flags.as_json(args), "environment": results.environment(device)}
    wanted = list(itertools.product(args.seed, args.target_params or args.pruning_threshold))
    if len(wanted) == 1:
        run, models = dense_and_pruned(args, journal, cifar, given_model, *wanted[0])
        write_run(args, {**head, **run}, models, cifar)
    else:
        runs = [
            journal.once(
                run_name(*each), lambda each=each: dense_and_pruned(args, journal, cifar, given_model, *each)[0]
            )
            for each in wanted
        ]
        write_sweep(args, head, runs)
    journal.close()


def run_name(seed: int, wanted: float) -> str:
    return f"seed {seed} at {wanted:g}"


def dense_and_pruned(
    args: argparse.Namespace,
    journal: Journal,
    cifar: data.ImageData,
    given_model: CifarCNN | None,
    seed: int,
    wanted: float,
) -> tuple[dict[str, Any], dict[str, CifarCNN]]:
    """Train (once for all runs of the seed), cut, fine-tune, measure: the record and the networks."""
    dense_model, dense_history = given_model, []
    if given_model is None:
        dense_model = untrained(seed, cifar)
        checkpoint = journal.checkpoint(f"seed {seed} dense")
        dense_history = train(args, seed, dense_model, cifar, args.epochs, LEARNING_RATE, checkpoint=checkpoint)
    cut_model, report = cut(args, dense_model, wanted, cifar)
    pruned_model = copy.deepcopy(cut_model)
    checkpoint = journal.checkpoint(run_name(seed, wanted))
    history = train(
        args, seed, pruned_model, cifar, args.fine_tune_epochs, FINE_TUNE_RATE, dense_model, checkpoint=checkpoint
    )
    models = {"dense": dense_model, "cut": cut_model, "pruned": pruned_model}
    records = measure(models, cifar)
    for record, epochs, teacher_macs in (
        (records["dense"], dense_history, 0),
        (records["pruned"], history, records["dense"]["macs"]),
    ):
        record["history"] = epochs  # backward costs twice as much as forward, which is all a teacher does
        record["training_flops"] = (6 * record["macs"] + 2 * teacher_macs) * args.train_size * len(epochs)
    drop = records["dense"]["test_accuracy"] - records["pruned"]["test_accuracy"]
    return {"seed": seed, **report, "drop": round(drop, 4), **records}, models


def untrained(seed: int, cifar: data.ImageData) -> CifarCNN:
    """The network that `seed` gives before training; its first layer knows the images already."""
    torch.manual_seed(seed)
    model = CifarCNN()
    model.whiten(data.normalize(cifar.train_images[:5000], cifar.mean, cifar.std).cpu())
    return model.to(cifar.train_images.device, memory_format=torch.channels_last)


def train(
    args: argparse.Namespace,
    seed: int,
    model: CifarCNN,
    cifar: data.ImageData,
    epochs: int,
    learning_rate: float,
    teacher: CifarCNN | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place by a new optimiser, on the labels or on what `teacher` says; an entry for every epoch."""
    if epochs == 0:
        return []
    batch_norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    groups = [
        {"params": [layer.weight for layer in layers if layer.weight.requires_grad]},
        {"params": [layer.weight for layer in batch_norms], "weight_decay": SCALE_DECAY},
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
        augment=partial(data.random_crop, size=CROP),
        mirror=True,
        label_smoothing=0 if teacher else LABEL_SMOOTHING,  # a teacher that learned from smooth labels says so itself
        teacher=teacher,
        seed=seed,
        after_step=partial(training.lookahead, model=model, average=average, steps=steps),
        state={"average": average},
        checkpoint=checkpoint,
        description=f"seed {seed}, {profiling.parameters(model):,} parameters",
    )


def cut(
    args: argparse.Namespace, dense_model: CifarCNN, wanted: float, cifar: data.ImageData
) -> tuple[CifarCNN, dict[str, Any]]:
    """The dense network without its weakest filters, and what was cut; `wanted` is a threshold or a size."""
    norms = filters.filter_norms(dense_model)
    del norms["whitening"]  # it is not trained
    if args.target_params:
        threshold, keep = filters.filters_for_target(norms, wanted, parameters_with, args.round_to)
        report = {"target_params": wanted, "threshold": threshold, "guarded": []}
    else:
        keep = filters.filters_to_keep(norms, wanted, args.threshold_mode, args.round_to)
        guarded = [
            layer for layer, norm in norms.items() if filters.count_weak(norm, wanted, args.threshold_mode) == len(norm)
        ]
        report = {"pruning_threshold": wanted, "threshold": wanted, "guarded": guarded}
    example = data.normalize(cifar.test_images[:1], cifar.mean, cifar.std)
    model, _ = remove_filters(dense_model, example, filters.mark_weakest(norms, keep))
    report["layers"] = [
        {"layer": layer, "filters": len(norm), "kept": keep[layer], "norms": norm.tolist()}
        for layer, norm in norms.items()
    ]
    return model, report


def parameters_with(keep: dict[str, int]) -> int:
    """The size of the network with so many filters in each layer."""
    return profiling.parameters(CifarCNN(list(keep.values())))


def measure(models: dict[str, CifarCNN], cifar: data.ImageData) -> dict[str, dict[str, Any]]:
    """What is worth knowing of each network; the speeds are measured side by side."""
    images = data.normalize(cifar.test_images[:256], cifar.mean, cifar.std)
    shapes = {"dense": models["dense"], "pruned": models["pruned"]}  # fine-tuning does not change the shape
    latency = {
        f"batch {size}": profiling.latency_ms(shapes, images[:size], repetitions)
        for size, repetitions in ((1, 200), (256, 20))
    }
    return {
        name: {
            "test_accuracy": training.evaluate(model, cifar),
            "parameters": profiling.parameters(model),
            "macs": profiling.macs(model, images[:1]),
            "latency_ms": {batch: times.get(name, times["pruned"]) for batch, times in latency.items()},
            "checkpoint_bytes": len(results.checkpoint(model)),
            "widths": list(model.widths),
        }
        for name, model in models.items()
    }


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
    sweep = {**head, "summary": results.summarize(runs, by, quantities), "runs": runs}
    contents = {f"{NAME}_sweep.json": results.json_bytes(sweep), f"{NAME}_sweep.png": plots.structured_sweep(sweep)}
    written = results.write_all(args.results_dir, contents)
    header = ["", "parameters", "before fine-tuning (%)", "test accuracy (%)", "drop (points)"]
    rows = [
        ["dense", f"{runs[0]['dense']['parameters']:,}", "", results.with_std(sweep["summary"]["dense"]), *[""] * 4]
    ]
    for point in sweep["summary"]["pruned"]:
        rows.append(
            [
                f"{by} {point[by]}",
                f"{point['parameters']['mean']:,.0f}",
                *(results.with_std(point[name]) for name in list(quantities)[1:]),
            ]
        )
    print(results.table([*header, "MACs (times fewer)", "batch 1 (times as fast)", "batch 256"], rows))
    print(written)


def speed_up(run: dict[str, Any], batch: str) -> float:
    """How many times as fast as the dense network the pruned one is."""
    return run["dense"]["latency_ms"][batch] / run["pruned"]["latency_ms"][batch]


def parse_args() -> tuple[argparse.Namespace, CifarCNN | None, torch.device, Journal]:
    parser = flags.Parser(description=__doc__.splitlines()[0])
    cutoff = parser.add_mutually_exclusive_group()
    cutoff.add_argument(
        "--pruning_threshold",
        type=flags.number(float, 0),
        nargs="+",
        default=[0.5],
        help="filters of a norm below this go, one or several",
    )
    parser.add_argument(
        "--threshold_mode",
        choices=filters.MODES,
        default="relative",
        help="the threshold is a fraction of the largest norm in the layer, the norm itself, or the fraction of the "
        "layer's filters that goes",
    )
    cutoff.add_argument(
        "--target_params",
        type=flags.number(int, 1),
        nargs="+",
        help="instead of a threshold: the most parameters to leave, one or several; finds the relative threshold",
    )
    parser.add_argument(
        "--round_to", type=flags.number(int, 1), default=1, help="keep a multiple of so many filters in each layer"
    )
    parser.add_argument(
        "--fine_tune_epochs", type=flags.number(int, 0, 100_000), default=5, help="passes after the cut"
    )
    parser.add_argument(
        "--baseline", type=Path, help=f"a dense network to cut, as {NAME}_dense.pt, instead of training one"
    )
    flags.add_shared_flags(parser, epochs=12, batch_size=128, train_size=data.TRAIN_SIZE["cifar10"])
    args = parser.parse_args()
    for threshold in args.pruning_threshold:
        if args.threshold_mode != "absolute" and threshold > 1:
            parser.error(f"--pruning_threshold {threshold:g}: allowed: 0 to 1 in {args.threshold_mode} mode")
    if args.target_params and args.threshold_mode != "relative":
        parser.error(f"--threshold_mode {args.threshold_mode}: allowed: relative, which is what --target_params finds")
    model = None
    if args.baseline:
        try:
            model = results.load_model(args.baseline, CifarCNN)
        except results.CheckpointError as error:
            parser.error(f"--baseline {error}")
    if args.target_params:
        largest = model or CifarCNN()
        smallest = CifarCNN([min(args.round_to, width) for width in largest.widths])
        low, high = profiling.parameters(smallest), profiling.parameters(largest)
        for target in args.target_params:
            if not low <= target <= high:
                parser.error(f"--target_params {target}: allowed: {low} to {high}")
    device = flags.check_shared_flags(parser, args)
    model = model and model.to(device, memory_format=torch.channels_last)
    return args, model, device, flags.journal(parser, args, NAME)


if __name__ == "__main__":
    flags.run(main)
