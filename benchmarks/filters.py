"""This project's filter pruning beside the torch-pruning package (DepGraph, Fang et al. 2023), on CIFAR-10.

    python structured_pruning.py                   # once: leaves the network that both prune
    pip install -r benchmarks/requirements.txt
    python -m benchmarks.filters

Both prune the same trained network to the same number of parameters, torch-pruning by its global L2 group magnitude,
and both are fine-tuned by this project's recipe. Writes filters.json.
"""

import copy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch_pruning
from torch import nn

import structured_pruning
from experiment import checkpoints, cli, data, measure, report
from experiment.data import ImageData
from experiment.run import choose_precision
from experiment.training import Recipe, soft_targets, with_labels
from models.cifar_cnn import CifarCNN
from structured_pruning import FINE_TUNE_RATE, RECIPE, TEACHER_WEIGHT, Cutoff, Point


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target_params",
        type=cli.number(int, 1),
        nargs="+",
        default=[380_528, 230_000],
        help="the most parameters to keep, one or several",
    )
    parser.add_argument("--fine_tune_epochs", type=cli.number(int, 0), default=5, help="epochs after pruning")
    parser.add_argument(
        "--baseline", type=Path, default=Path("results/structured_cifar_dense.pt"), help="the network to prune"
    )
    parser.add_argument("--train_size", type=cli.number(int, 1, 50_000), default=50_000, help="examples to train on")
    cli.add_folder_flags(parser, "benchmarks/results")
    args = parser.parse_args()
    cpu = torch.device("cpu")
    recipe = Recipe(args.fine_tune_epochs, 128, precision=choose_precision("auto", cpu), **RECIPE)
    recipe = replace(recipe, learning_rate=FINE_TUNE_RATE)
    cifar = data.load_cifar10(args.data_dir).first(args.train_size)
    dense = checkpoints.load_model(args.baseline, CifarCNN).to(memory_format=torch.channels_last)
    labels = soft_targets(cifar, dense, TEACHER_WEIGHT, mirror=True, precision=recipe.precision)
    labelled = with_labels(cifar, labels)

    cuts = []
    for target in args.target_params:
        for kind, prune in (("ours", prune_by_us), ("torch-pruning", prune_by_torch_pruning)):
            narrow = prune(dense, target, cifar)
            pruned = structured_pruning.fine_tune(narrow, labelled, recipe, 0)
            measured = structured_pruning.measure(cifar, (dense, []), narrow, pruned)
            difference = from_masked(dense, narrow, cifar)
            cuts.append({"kind": kind, "target_params": target, "from_masked": difference, **measured})
    record = {
        "arguments": cli.as_json(args),
        "environment": {**report.environment(cpu), "torch-pruning": version("torch-pruning")},
        "cuts": cuts,
    }
    written = checkpoints.write_all(args.results_dir, {"filters.json": report.json_bytes(record)})
    rows = [
        [
            f"{row['kind']}, {row['target_params']:,}",
            f"{row['pruned']['parameters']:,}",
            f"{row['pruned']['macs'] / 1e6:.1f} M",
            *(f"{row[network]['test_accuracy']:.2f}" for network in ("before_fine_tuning", "pruned")),
            *(f"{report.speed_up(row['dense'], row['pruned'], batch):.2f}" for batch in ("batch 1", "batch 256")),
            f"{row['from_masked']:.0e}",
            " ".join(map(str, row["pruned"]["widths"])),
        ]
        for row in cuts
    ]
    header = ["", "parameters", "MACs", "before fine-tuning (%)", "after (%)", "times as fast, batch 1", "batch 256"]
    header += ["from masked", "filters"]
    print(report.table(header, rows))
    print(f"dense: {cuts[0]['dense']['test_accuracy']:.2f} %")
    print(written)


def prune_by_us(dense: CifarCNN, target: int, cifar: ImageData) -> CifarCNN:
    decided = structured_pruning.choose_filters(dense, cifar, Point(0, "l2", Cutoff("target_params", target)))
    return structured_pruning.remove(dense, cifar, decided["marked"])


def prune_by_torch_pruning(dense: CifarCNN, target: int, cifar: ImageData) -> CifarCNN:
    """By the lowest global pruning ratio, to a ten-thousandth, that leaves at most `target` parameters."""
    low, high = 0, 10_000
    while high - low > 1:
        middle = (low + high) // 2
        if measure.parameters(torch_pruned(dense, middle / 10_000, cifar)) <= target:
            high = middle
        else:
            low = middle
    model = torch_pruned(dense, high / 10_000, cifar)
    assert measure.parameters(model) <= target
    return model


def torch_pruned(dense: CifarCNN, ratio: float, cifar: ImageData) -> CifarCNN:
    model = copy.deepcopy(dense)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        cifar.normalize(cifar.test_images[:1]),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[model.whitening, model.head],
    )
    pruner.step()
    return model


@torch.no_grad()
def from_masked(dense: CifarCNN, narrow: CifarCNN, cifar: ImageData) -> float:
    """The largest difference, in float64, of the narrow network's outputs from those of the dense one in which the
    removed filters are set to 0; which those are is read off the BatchNorms' scales.
    """
    masked, narrow = copy.deepcopy(dense).double().eval(), copy.deepcopy(narrow).double().eval()
    for whole, part in zip(batch_norms(masked), batch_norms(narrow), strict=True):
        kept = torch.isin(whole.weight, part.weight)
        assert kept.sum() == len(part.weight)
        whole.weight *= kept
        whole.bias *= kept
    images = cifar.normalize(cifar.test_images[:256]).double()
    return float((masked(images) - narrow(images)).abs().max())


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


if __name__ == "__main__":
    cli.run(main)
