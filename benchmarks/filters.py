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
from pathlib import Path
from typing import Any

import torch
import torch_pruning
import torchvision
from torch import nn
from tqdm import tqdm

import structured_pruning
from benchmarks.growth import IMAGE, surgery_seconds
from experiment import data, flags, profiling, results, start, training
from experiment.data import ImageData
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
    flags.add_shared_flags(parser, epochs=8, batch_size=128, train_size=50_000)
    parser.set_defaults(results_dir=Path("benchmarks/results"))
    args = parser.parse_args()
    device = start.choose_device(parser, args)
    cifar = data.load_cifar10(args.data_dir).first(args.train_size).to(device)
    dense = results.load_model(args.baseline, CifarCNN).to(device, memory_format=torch.channels_last)

    cuts = []
    for target in args.target_params:
        for kind, cut in (("ours", cut_by_us), ("torch-pruning", cut_by_torch_pruning)):
            cuts.append(cut_and_fine_tune(args, cifar, dense, target, kind, cut(dense, target, cifar)))
    record = {
        "arguments": flags.as_json(args),
        "environment": {**results.environment(device), "torch-pruning": torch_pruning.__version__},
        "dense_test_accuracy": training.evaluate(dense, cifar),
        "cuts": cuts,
        "surgery_seconds": surgeries(args.rounds),
    }
    written = results.write_all(args.results_dir, {"filters.json": results.json_bytes(record)})
    rows = [
        [
            f"{row['kind']}, {row['target_params']:,}",
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e6:.1f} M",
            f"{row['cut_accuracy']:.2f}",
            f"{row['test_accuracy']:.2f}",
            *(f"{row['speed_up'][batch]:.2f}" for batch in ("batch 1", "batch 256")),
            " ".join(map(str, row["widths"])),
        ]
        for row in cuts
    ]
    header = ["", "parameters", "MACs", "cut (%)", "fine-tuned (%)", "times as fast, batch 1", "batch 256", "filters"]
    print(results.table(header, rows))
    print(f"dense: {record['dense_test_accuracy']:.2f} %")
    rows = [
        [network, *(f"{statistics.median(times):.2f}" for times in kinds.values())]
        for network, kinds in record["surgery_seconds"].items()
    ]
    print(results.table(["surgery (median seconds)", "ours", "torch-pruning"], rows))
    print(written)


def cut_by_us(dense: CifarCNN, target: int, cifar: ImageData) -> CifarCNN:
    scores = structured_pruning.trained_scores(dense, "l2")
    _, keep = filters.filters_for_target(scores, target, structured_pruning.parameters_with)
    return remove_filters(dense, structured_pruning.example(cifar), filters.mark_weakest(scores, keep))[0]


def cut_by_torch_pruning(dense: CifarCNN, target: int, cifar: ImageData) -> CifarCNN:
    """The largest network of at most `target` parameters that a global pruning ratio gives, to a ten-thousandth."""
    low, high = 0, 10_000
    while high - low > 1:
        middle = (low + high) // 2
        if profiling.parameters(torch_pruned(dense, middle / 10_000, cifar)) <= target:
            high = middle
        else:
            low = middle
    return torch_pruned(dense, high / 10_000, cifar)


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


def cut_and_fine_tune(
    args: argparse.Namespace, cifar: ImageData, dense: CifarCNN, target: int, kind: str, cut: CifarCNN
) -> dict[str, Any]:
    images = data.normalize(cifar.test_images[:256], cifar.mean, cifar.std)
    model, history = structured_pruning.fine_tuned(args, args.seed[0], cut, cifar, dense)
    shapes = {"dense": dense, "cut": cut}
    latency = {
        f"batch {size}": profiling.latency_ms(shapes, images[:size], repetitions)
        for size, repetitions in ((1, 200), (256, 20))
    }
    return {
        "kind": kind,
        "target_params": target,
        "widths": list(cut.widths),
        "parameters": profiling.parameters(cut),
        "macs": profiling.macs(cut, images[:1]),
        "cut_accuracy": training.evaluate(cut, cifar),
        "test_accuracy": training.evaluate(model, cifar),
        "speed_up": {batch: times["dense"] / times["cut"] for batch, times in latency.items()},
        "history": history,
    }


def surgeries(rounds: int) -> dict[str, dict[str, list[float]]]:
    """The seconds that both take to score and take out half of the filters, in turn."""
    seconds = {network: {"ours": [], "torch-pruning": []} for network in NETWORKS}
    for _ in tqdm(range(rounds), desc="surgery", unit="round", disable=None):
        for network, times in seconds.items():
            model = torchvision.models.get_model(network).eval()
            times["ours"].append(surgery_seconds(model))
            times["torch-pruning"].append(torch_pruning_seconds(model))
    return seconds


def torch_pruning_seconds(model: nn.Module) -> float:
    """The same by torch-pruning, which changes the network itself."""
    begin = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        torch.zeros(IMAGE),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[layer for layer in model.modules() if isinstance(layer, nn.Linear)],
    )
    pruner.step()
    return time.perf_counter() - begin


if __name__ == "__main__":
    flags.run(main)
