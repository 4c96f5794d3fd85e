"""This project's magnitude pruning beside torch.nn.utils.prune, on MNIST.

    python -m benchmarks.weights

The same network, schedule, recipe, seeds and budget; torch's masks by `global_unstructured` with L1Unstructured, on
top of those of the cut before. Each pair is trained one after the other. Writes weights.json and weights.png.
"""

import itertools
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils import prune
from tqdm import tqdm

import unstructured_pruning
from experiment import checkpoints, cli, data, plots, report
from experiment.data import ImageData
from experiment.run import choose_precision
from experiment.training import Hook, Recipe, Task, fit, initial, sgd
from models.mnist_cnn import MnistCNN
from pruning import magnitude
from pruning.schedule import PolynomialDecay
from unstructured_pruning import Point

KINDS = {"ours": plots.PRUNED, "torch.nn.utils.prune": {**plots.DENSE, "linestyle": "--"}}


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    fraction = cli.number(float, 0, 1, below=True)
    parser.add_argument(
        "--sparsity_target",
        type=fraction,
        nargs="+",
        default=[0.5, 0.9, 0.98, 0.99],
        help="fraction of the weights that is zero at the end, one or several",
    )
    parser.add_argument("--seed", type=cli.number(int, 0), nargs="+", default=[0, 1, 2], help="one or several")
    parser.add_argument("--epochs", type=cli.number(int, 1), default=10, help="passes over the training set")
    parser.add_argument("--train_size", type=cli.number(int, 1, 60_000), default=60_000, help="examples to train on")
    cli.add_folder_flags(parser, "benchmarks/results")
    args = parser.parse_args()
    cpu = torch.device("cpu")
    precision = choose_precision("auto", cpu)
    recipe = Recipe(epochs=args.epochs, batch_size=128, precision=precision, **unstructured_pruning.RECIPE)
    mnist = data.load_mnist(args.data_dir).first(args.train_size)

    runs = []
    for seed, target in tqdm(list(itertools.product(args.seed, args.sparsity_target)), unit="pair", disable=None):
        point = Point(seed, "magnitude", "global", default_schedule(target, recipe.steps(args.train_size)))
        model, history, _ = unstructured_pruning.train_and_prune(mnist, recipe, point)
        pruned = {
            "ours": unstructured_pruning.describe(model, history, mnist),
            "torch.nn.utils.prune": train_and_prune_by_torch(mnist, recipe, point),
        }
        runs.append({"seed": seed, "sparsity_target": target, **pruned})
    record = {
        "arguments": cli.as_json(args),
        "environment": report.environment(cpu),
        "summary": [summary(target, runs) for target in args.sparsity_target],
        "runs": runs,
    }
    contents = {"weights.json": report.json_bytes(record), "weights.png": draw(record)}
    written = checkpoints.write_all(args.results_dir, contents)
    rows = [
        [
            f"{100 * row['sparsity_target']:g} %",
            *(report.with_std(row["test_accuracy"][kind]) for kind in KINDS),
            report.with_std(row["seconds_ratio"]),
        ]
        for row in record["summary"]
    ]
    print(report.table(["sparsity", *(f"{kind} (%)" for kind in KINDS), "torch's time per epoch / ours"], rows))
    print(written)


def default_schedule(target: float, steps: int) -> PolynomialDecay:
    """The default schedule of unstructured_pruning.py in a training of `steps` steps."""
    begin, end = round(0.1 * steps), round(0.6 * steps)
    return PolynomialDecay(begin, end, target, frequency=max(1, (end - begin) // 50))


def train_and_prune_by_torch(mnist: ImageData, recipe: Recipe, point: Point) -> dict[str, Any]:
    """The record of a run like ours, but in torch's own memory format: its global pruning takes no other."""
    model = initial(MnistCNN, point.seed, torch.device("cpu")).to(memory_format=torch.contiguous_format)
    layers = [(module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    total = sum(layer.weight.numel() for layer, _ in layers)
    for layer in layers:
        prune.identity(*layer)  # before the optimiser is made, which is to hold what torch trains
    optimizer = sgd(model, recipe)

    def update(step: int) -> None:
        if point.schedule.prunes_at(step):
            pruned = sum(int((layer.weight_mask == 0).sum()) for layer, _ in layers)
            more = round(point.schedule.sparsity(step) * total) - pruned
            if more > 0:
                prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=more)

    history = fit(model, optimizer, mnist, recipe, point.seed, Hook(update), Task("torch.nn.utils.prune"))
    for layer in layers:
        prune.remove(*layer)
    assert magnitude.sparsity(model) == round(point.schedule.final_sparsity * total) / total
    return unstructured_pruning.describe(model, history, mnist)


def summary(target: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds at one sparsity."""
    runs = [run for run in runs if run["sparsity_target"] == target]
    ratios = [run["torch.nn.utils.prune"]["seconds_per_epoch"] / run["ours"]["seconds_per_epoch"] for run in runs]
    return {
        "sparsity_target": target,
        "test_accuracy": {kind: report.mean_and_std([run[kind]["test_accuracy"] for run in runs]) for kind in KINDS},
        "seconds_ratio": report.mean_and_std(ratios),
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
    cli.run(main)
