"""This project's filter pruning beside the torch-pruning package (DepGraph, Fang et al. 2023), on CIFAR-10.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.filters

Both prune the same trained networks to the same number of parameters, torch-pruning by its global L2 group magnitude;
as that leaves fewer multiply-adds, this project prunes to the same number of those, too. All are fine-tuned by this
project's recipe. Writes filters.json.
"""

import copy
import itertools
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch_pruning
from torch import nn

import experiment
import structured_pruning
from experiment import cli, measure, report
from experiment.data import ImageData
from experiment.report import Column
from experiment.training import Recipe
from models.cifar_cnn import CifarCNN
from structured_pruning import FINE_TUNE_RATE, RECIPE, Cutoff, Point, Setup, prepare

COLUMNS = [
    Column("parameters", "parameters", lambda run: run["pruned"]["parameters"], is_count=True),
    Column("macs_reduction", "times fewer MACs", lambda run: run["dense"]["macs"] / run["pruned"]["macs"]),
    Column("accuracy_before", "before fine-tuning (%)", lambda run: run["before_fine_tuning"]["test_accuracy"]),
    Column("test_accuracy", "accuracy (%)", lambda run: run["pruned"]["test_accuracy"]),
    Column("speed_up_1", "speedup, batch 1", lambda run: report.speed_up(run["dense"], run["pruned"], "batch 1")),
    Column("speed_up_256", "batch 256", lambda run: report.speed_up(run["dense"], run["pruned"], "batch 256")),
]


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
    cli.add_shared_flags(parser, epochs=12, batch_size=128, train_size=50_000)
    parser.set_defaults(results_dir="benchmarks/results", seed=[0, 1, 2])
    args = parser.parse_args()
    ways = list(itertools.product(args.seed, args.target_params, PRUNERS))
    with experiment.run.start("filters", cli.Options.of(args), cli.as_json(args), len(ways)) as run:
        cifar = run.load(experiment.data.load_cifar10)
        recipe = Recipe(args.epochs, args.batch_size, precision=run.precision, **RECIPE)
        fine_tuning = replace(recipe, epochs=args.fine_tune_epochs, learning_rate=FINE_TUNE_RATE)
        setup = Setup(run, cifar, recipe, fine_tuning, baseline=None, longer=False, scratch=None)
        run.split(args.seed, partial(prepare, setup), "dense network of seed")
        runs = run.for_each(ways, lambda way: prune_and_measure(setup, *way))
        head = {**run.head, "packages": {"torch-pruning": version("torch-pruning")}}
        made = report.make(head, runs, ("by", "target_params"), COLUMNS)
        run.write({"filters.json": report.json_bytes(made)})
        if run.rank == 0:
            print(report.summary_table(made, lambda point: f"{point['by']}, {point['target_params']:,}", COLUMNS))


def prune_and_measure(setup: Setup, seed: int, target_params: int, by: str) -> dict[str, Any]:
    """The record of one network pruned by one of PRUNERS and fine-tuned."""
    cifar, point = setup.cifar, Point(seed, "l2", Cutoff("target_params", target_params))
    dense, history, train_data, _ = prepare(setup, seed)
    narrow = PRUNERS[by](dense, point, cifar)
    difference = from_masked(dense, narrow, cifar)
    task = setup.run.task(str(point) if by == "ours" else f"{point} by {by}")
    pruned = structured_pruning.fine_tune(narrow, train_data, setup.fine_tuning, seed, task)
    measured = structured_pruning.measure(cifar, (dense, history), narrow, pruned)
    return {"seed": seed, "target_params": target_params, "by": by, "from_masked": difference, **measured}


def prune_by_us(dense: CifarCNN, point: Point, cifar: ImageData) -> CifarCNN:
    return structured_pruning.remove(dense, cifar, structured_pruning.choose_filters(dense, cifar, point)["marked"])


def prune_by_torch_pruning(dense: CifarCNN, point: Point, cifar: ImageData) -> CifarCNN:
    """By the lowest global pruning ratio, to a ten-thousandth, that leaves at most as many parameters as asked for."""
    low, high, target = 0, 10_000, point.cutoff.value
    while high - low > 1:
        middle = (low + high) // 2
        if measure.parameters(torch_pruned(dense, middle / 10_000, cifar)) <= target:
            high = middle
        else:
            low = middle
    model = torch_pruned(dense, high / 10_000, cifar)
    assert measure.parameters(model) <= target
    return model


def prune_to_its_macs(dense: CifarCNN, point: Point, cifar: ImageData) -> CifarCNN:
    """By us, to at most as many MACs as torch-pruning leaves at the point's parameters."""
    macs = measure.macs(prune_by_torch_pruning(dense, point, cifar), cifar.normalize(cifar.test_images[:1]))
    return prune_by_us(dense, replace(point, cutoff=Cutoff("target_macs", macs)), cifar)


PRUNERS = {"ours": prune_by_us, "torch-pruning": prune_by_torch_pruning, "ours, its MACs": prune_to_its_macs}


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
    removed filters are set to 0; which those are is read off the BatchNorms.
    """
    masked, narrow = copy.deepcopy(dense).double().eval(), copy.deepcopy(narrow).double().eval()
    for whole, part in zip(batch_norms(masked), batch_norms(narrow), strict=True):
        kept = torch.isin(whole.weight * whole.running_var, part.weight * part.running_var)
        assert kept.sum() == len(part.weight)
        whole.weight *= kept
        whole.bias *= kept
    images = cifar.normalize(cifar.test_images[:256]).double()
    return float((masked(images) - narrow(images)).abs().max())


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


if __name__ == "__main__":
    cli.run(main)
