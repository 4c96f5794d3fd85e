"""This project's magnitude pruning beside torch.nn.utils.prune, on MNIST.

    python -m benchmarks.weights

The same network, schedule, recipe, seeds and budget; torch's masks by `global_unstructured` with L1Unstructured, on
top of those of the cut before. Each pair is trained one after the other. Writes weights.json and weights.png.
"""

import argparse
import itertools
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils import prune
from tqdm import tqdm

import unstructured_pruning
from experiment import data, flags, plots, results
from experiment.data import ImageData
from experiment.start import has_bfloat16
from pruning import magnitude
from pruning.schedule import PolynomialDecay

KINDS = {"ours": plots.PRUNED, "torch.nn.utils.prune": {**plots.DENSE, "linestyle": "--"}}


def main() -> None:
    parser = flags.Parser(description=__doc__.splitlines()[0])
    fraction = flags.number(float, 0, 1, below=True)
    parser.add_argument(
        "--sparsity_target",
        type=fraction,
        nargs="+",
        default=[0.5, 0.9, 0.98, 0.99],
        help="fraction of the weights that is zero at the end, one or several",
    )
    parser.add_argument("--seed", type=flags.number(int, 0), nargs="+", default=[0, 1, 2], help="one or several")
    parser.add_argument("--epochs", type=flags.number(int, 1), default=10, help="passes over the training set")
    parser.add_argument("--train_size", type=flags.number(int, 1, 60_000), default=60_000, help="examples to train on")
    flags.add_folder_flags(parser, "benchmarks/results")
    args = parser.parse_args()
    cpu = torch.device("cpu")
    run = argparse.Namespace(
        epochs=args.epochs,
        train_size=args.train_size,
        batch_size=128,
        scope="global",
        label_smoothing=unstructured_pruning.LABEL_SMOOTHING,
        shift_pixels=unstructured_pruning.SHIFT_PIXELS,
        processes=1,
        initial_sparsity=0.0,
        begin_epoch=None,
        end_epoch=None,
        frequency=None,
        power=3.0,
        precision="bfloat16" if has_bfloat16(cpu) else "float32",
    )
    mnist = data.load_mnist(args.data_dir).first(args.train_size)

    runs = []
    for seed, target in tqdm(list(itertools.product(args.seed, args.sparsity_target)), unit="pair", disable=None):
        schedule = unstructured_pruning.schedule_for(target, run, parser)
        pruned = {
            "ours": unstructured_pruning.train_and_prune(run, seed, mnist, "magnitude", schedule)[1],
            "torch.nn.utils.prune": train_and_prune_by_torch(run, seed, mnist, schedule),
        }
        runs.append({"seed": seed, "sparsity_target": target, **pruned})
    record = {
        "arguments": flags.as_json(args),
        "environment": results.environment(cpu),
        "summary": [summary(target, runs) for target in args.sparsity_target],
        "runs": runs,
    }
    contents = {"weights.json": results.json_bytes(record), "weights.png": draw(record)}
    written = results.write_all(args.results_dir, contents)
    rows = [
        [
            f"{100 * row['sparsity_target']:g} %",
            *(results.with_std(row["test_accuracy"][kind]) for kind in KINDS),
            results.with_std(row["seconds_ratio"]),
        ]
        for row in record["summary"]
    ]
    print(results.table(["sparsity", *(f"{kind} (%)" for kind in KINDS), "torch's time per epoch / ours"], rows))
    print(written)


def train_and_prune_by_torch(
    args: argparse.Namespace, seed: int, mnist: ImageData, schedule: PolynomialDecay
) -> dict[str, Any]:
    """The record of a run like ours, but in torch's own memory format: its global pruning takes no other."""
    model = unstructured_pruning.untrained(seed, mnist).to(memory_format=torch.contiguous_format)
    layers = [(module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    total = sum(layer.weight.numel() for layer, _ in layers)
    for layer in layers:
        prune.identity(*layer)  # before the optimiser is made, which is to hold what torch trains
    optimizer = unstructured_pruning.sgd(model)

    def cut(step: int) -> None:
        if schedule.prunes_at(step):
            gone = sum(int((layer.weight_mask == 0).sum()) for layer, _ in layers)
            more = round(schedule.sparsity(step) * total) - gone
            if more > 0:
                prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=more)

    history = unstructured_pruning.fit(args, seed, mnist, model, optimizer, None, "torch.nn.utils.prune", cut)
    for layer in layers:
        prune.remove(*layer)
    assert magnitude.sparsity(model) == round(schedule.final_sparsity * total) / total
    return unstructured_pruning.record(model, history)


def summary(target: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds at one sparsity."""
    runs = [run for run in runs if run["sparsity_target"] == target]
    ratios = [run["torch.nn.utils.prune"]["seconds_per_epoch"] / run["ours"]["seconds_per_epoch"] for run in runs]
    return {
        "sparsity_target": target,
        "test_accuracy": {kind: results.mean_and_std([run[kind]["test_accuracy"] for run in runs]) for kind in KINDS},
        "seconds_ratio": results.mean_and_std(ratios),
    }


@matplotlib.rc_context(plots.STYLE)
def draw(record: dict[str, Any]) -> bytes:
    """The PNG: accuracy against sparsity."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    places = range(len(record["summary"]))
    for (kind, style), shift in zip(KINDS.items(), (-0.03, 0.03), strict=True):
        mean, std = ([row["test_accuracy"][kind][which] for row in record["summary"]] for which in ("mean", "std"))
        spread = None if None in std else std
        axes.errorbar([place + shift for place in places], mean, spread, capsize=4, **{**style, "label": kind})
    axes.set_xticks(places, [f"{100 * row['sparsity_target']:g} %" for row in record["summary"]])
    axes.set(
        title="Magnitude pruning on MNIST, by this project and by torch\n"
        f"(mean and sample standard deviation over {len(record['arguments']['seed'])} seeds)",
        xlabel="sparsity",
        ylabel="test accuracy (%)",
    )
    axes.legend(loc="lower left")
    return plots.png(figure)


if __name__ == "__main__":
    flags.run(main)
