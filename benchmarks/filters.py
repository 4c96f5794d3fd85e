"""This project's filter cut and surgery beside the torch-pruning package (DepGraph, Fang et al. 2023), on CIFAR-10.

    python structured_pruning.py                   # once: leaves the network that both cut
    pip install -r benchmarks/requirements.txt
    python -m benchmarks.filters

Both cut the same trained network to the same number of parameters, torch-pruning by its global L2 group magnitude, and
both are fine-tuned by this project's recipe. Then the surgery alone, on torchvision's networks. Writes filters.json.
"""

import argparse
import copy
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_pruning
import torchvision
from torch import nn
from tqdm import tqdm

import structured_pruning
from benchmarks.growth import IMAGE, half_by_us
from experiment import data, flags, profiling, results
from experiment.data import ImageData
from experiment.start import has_bfloat16
from models.cifar_cnn import CifarCNN
from pruning import filters
from pruning.surgery import remove_filters

NETWORKS = ("resnet18", "resnet50", "densenet121")


def main() -> None:
    parser = flags.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target_params",
        type=flags.number(int, 1),
        nargs="+",
        default=[380_528, 230_000],
        help="the most parameters to leave, one or several",
    )
    parser.add_argument("--fine_tune_epochs", type=flags.number(int, 0), default=5, help="passes after the cut")
    parser.add_argument("--rounds", type=flags.number(int, 1), default=5, help="times that each surgery is done")
    parser.add_argument(
        "--baseline", type=Path, default=Path("results/structured_cifar_dense.pt"), help="the network to cut"
    )
    parser.add_argument("--train_size", type=flags.number(int, 1, 50_000), default=50_000, help="examples to train on")
    flags.add_folder_flags(parser, "benchmarks/results")
    args = parser.parse_args()
    cpu = torch.device("cpu")
    run = argparse.Namespace(
        fine_tune_epochs=args.fine_tune_epochs,
        train_size=args.train_size,
        batch_size=128,
        processes=1,
        precision="bfloat16" if has_bfloat16(cpu) else "float32",
    )
    cifar = data.load_cifar10(args.data_dir).first(args.train_size)
    dense = results.load_model(args.baseline, CifarCNN).to(memory_format=torch.channels_last)
    lessons = structured_pruning.taught(run, cifar, dense)

    cuts = []
    for target in args.target_params:
        for kind, cut in (("ours", cut_by_us), ("torch-pruning", cut_by_torch_pruning)):
            models = {"dense": dense, "cut": cut(dense, target, cifar)}
            models["pruned"], history = structured_pruning.fine_tuned(run, 0, models["cut"], lessons)
            measured = structured_pruning.measure(models, cifar, {"pruned": history})
            difference = from_masked(dense, models["cut"], cifar)
            cuts.append({"kind": kind, "target_params": target, "from_masked": difference, **measured})
    record = {
        "arguments": flags.as_json(args),
        "environment": {**results.environment(cpu), "torch-pruning": version("torch-pruning")},
        "cuts": cuts,
        "surgery": surgeries(args.rounds),
    }
    written = results.write_all(args.results_dir, {"filters.json": results.json_bytes(record)})
    rows = [
        [
            f"{row['kind']}, {row['target_params']:,}",
            f"{row['pruned']['parameters']:,}",
            f"{row['pruned']['macs'] / 1e6:.1f} M",
            *(f"{row[network]['test_accuracy']:.2f}" for network in ("cut", "pruned")),
            *(f"{structured_pruning.speed_up(row, batch):.2f}" for batch in ("batch 1", "batch 256")),
            f"{row['from_masked']:.0e}",
            " ".join(map(str, row["pruned"]["widths"])),
        ]
        for row in cuts
    ]
    header = ["", "parameters", "MACs", "cut (%)", "fine-tuned (%)", "times as fast, batch 1", "batch 256"]
    header += ["from masked", "filters"]
    print(results.table(header, rows))
    print(f"dense: {cuts[0]['dense']['test_accuracy']:.2f} %")
    rows = [
        [
            f"{network}, {kind}",
            f"{statistics.median(operation['seconds']):.2f}",
            f"{operation['parameters'] / record['surgery'][network]['parameters']:.0%}",
        ]
        for network in NETWORKS
        for kind, operation in record["surgery"][network]["by"].items()
    ]
    print(results.table(["surgery", "median seconds", "parameters left"], rows))
    print(written)


def cut_by_us(dense: CifarCNN, target: int, cifar: ImageData) -> CifarCNN:
    scores = structured_pruning.trained_scores(dense, "l2")
    _, keep = filters.filters_for_target(scores, target, structured_pruning.parameters_with)
    return remove_filters(dense, structured_pruning.example(cifar), filters.mark_weakest(scores, keep))[0]


def cut_by_torch_pruning(dense: CifarCNN, target: int, cifar: ImageData) -> CifarCNN:
    """By the lowest global pruning ratio, to a ten-thousandth, that leaves at most `target` parameters."""
    low, high = 0, 10_000
    while high - low > 1:
        middle = (low + high) // 2
        if profiling.parameters(torch_pruned(dense, middle / 10_000, cifar)) <= target:
            high = middle
        else:
            low = middle
    model = torch_pruned(dense, high / 10_000, cifar)
    assert profiling.parameters(model) <= target
    return model


def torch_pruned(dense: CifarCNN, ratio: float, cifar: ImageData) -> CifarCNN:
    model = copy.deepcopy(dense)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        structured_pruning.example(cifar),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[model.whitening, model.head],
    )
    pruner.step()
    return model


@torch.no_grad()
def from_masked(dense: CifarCNN, cut: CifarCNN, cifar: ImageData) -> float:
    """The largest difference, in float64, of the cut network's outputs from those of the dense one with what is gone
    set to 0; which filters are gone is read off the BatchNorms' scales.
    """
    masked, cut = copy.deepcopy(dense).double().eval(), copy.deepcopy(cut).double().eval()
    for whole, part in zip(batch_norms(masked), batch_norms(cut), strict=True):
        stays = torch.isin(whole.weight, part.weight)
        assert stays.sum() == len(part.weight)
        whole.weight *= stays
        whole.bias *= stays
    images = data.normalize(cifar.test_images[:256], cifar.mean, cifar.std).double()
    return float((masked(images) - cut(images)).abs().max())


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def surgeries(rounds: int) -> dict[str, dict[str, Any]]:
    """What both take to cut half of the filters of every layer, and what they leave, in turn."""
    operations = {"ours": half_by_us, "torch-pruning": half_by_torch_pruning}
    measured = {}
    for network in tqdm(NETWORKS, desc="surgery", unit="network", disable=None):
        model = torchvision.models.get_model(network).eval()
        by = {kind: {"seconds": [], "parameters": 0} for kind in operations}
        for turn in range(rounds):
            for kind in list(operations)[:: 1 if turn % 2 else -1]:
                patient = copy.deepcopy(model)
                begin = time.perf_counter()
                narrow = operations[kind](patient)
                by[kind]["seconds"].append(time.perf_counter() - begin)
                by[kind]["parameters"] = profiling.parameters(narrow)
        measured[network] = {"parameters": profiling.parameters(model), "by": by}
    return measured


def half_by_torch_pruning(model: nn.Module) -> nn.Module:
    pruner = torch_pruning.pruner.BasePruner(
        model,
        torch.zeros(IMAGE),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[layer for layer in model.modules() if isinstance(layer, nn.Linear)],
    )
    pruner.step()
    return model


if __name__ == "__main__":
    flags.run(main)
