"""How the cost of pruning grows with the network.

    python -m benchmarks.growth

A mask update on 1 to 100 million weights, beside torch's own global L1 pruning; surgery on networks of 21 to 201
layers. Medians of rounds in which everything takes its turn. Writes growth.json and growth.png.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torchvision
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils import prune
from tqdm import trange

from experiment import checkpoints, cli, measure, plots, report
from pruning import filters, magnitude
from pruning.surgery import remove_filters

WEIGHTS = (1_000_000, 10_000_000, 100_000_000)
SPARSITY = 0.9
OURS = {"ours": {}, "layer": {"scope": "layer"}, "lamp": {"scope": "lamp"}, "obd": {"method": "obd"}}
NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "densenet201")
IMAGE = (1, 3, 64, 64)


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=cli.number(int, 1), default=5, help="times that each is done")
    parser.add_argument("--results_dir", type=Path, default=Path("benchmarks/results"), help="folder for JSON and PNG")
    args = parser.parse_args()

    masks = [
        {"weights": measure.parameters(network_of(weights)), **{kind: [] for kind in (*OURS, "torch.nn.utils.prune")}}
        for weights in WEIGHTS
    ]
    for _ in trange(args.rounds, desc="mask updates", unit="round", disable=None):
        for row in masks:
            for kind, how in OURS.items():
                row[kind].append(update_seconds(row["weights"], **how))
            row["torch.nn.utils.prune"].append(torch_seconds(row["weights"]))
    models = {name: torchvision.models.get_model(name).eval() for name in NETWORKS}
    surgeries = [{"network": name, "layers": layers(model), "seconds": []} for name, model in models.items()]
    for _ in trange(args.rounds, desc="surgery", unit="round", disable=None):
        for row in surgeries:
            start = time.perf_counter()
            half_by_us(models[row["network"]])
            row["seconds"].append(time.perf_counter() - start)

    record = {
        "arguments": cli.as_json(args),
        "environment": report.environment(torch.device("cpu")),
        "mask_update": masks,
        "surgery": surgeries,
    }
    contents = {"growth.json": report.json_bytes(record), "growth.png": draw(record)}
    written = checkpoints.write_all(args.results_dir, contents)
    rows = []
    for row in masks:
        times = [statistics.median(row[kind]) for kind in (*OURS, "torch.nn.utils.prune")]
        rows.append([f"{row['weights']:,}", *(f"{seconds:.3f}" for seconds in times), f"{times[-1] / times[0]:.1f}"])
    header = ["mask update (s)", "global magnitude", "layer", "lamp", "obd", "torch.nn.utils.prune", "that / ours"]
    print(report.table(header, rows))
    rows = []
    for row in surgeries:
        seconds = statistics.median(row["seconds"])
        rows.append([row["network"], str(row["layers"]), f"{seconds:.2f}", f"{1000 * seconds / row['layers']:.1f}"])
    print(report.table(["network", "layers", "surgery (s)", "ms per layer"], rows))
    print(written)


def network_of(weights: int) -> nn.Module:
    """Ten linear layers of as many weights in all, the same each time."""
    torch.manual_seed(0)
    side = round((weights / 10) ** 0.5)
    return nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(10)))


def update_seconds(weights: int, scope: str = "global", method: str = "magnitude") -> float:
    model = network_of(weights)
    masks = magnitude.dense_masks(model)
    squares = {name: weight.detach().roll(1, 0).square() for name, weight in model.named_parameters()}
    start = time.perf_counter()
    magnitude.update_masks(model, masks, SPARSITY, scope, method, squared_gradients=squares)
    return time.perf_counter() - start


def torch_seconds(weights: int) -> float:
    """The same by torch: masks, and the masked weights that its pruning puts in the place of the parameters."""
    layers = [(layer, "weight") for layer in network_of(weights)]
    start = time.perf_counter()
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=SPARSITY)
    return time.perf_counter() - start


def layers(model: nn.Module) -> int:
    """Convolutions and linear layers."""
    return sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())


def half_by_us(model: nn.Module) -> nn.Module:
    """Half of the filters of every group removed, from the scores to the narrow network."""
    example = torch.zeros(IMAGE)
    scores = filters.filter_scores(model, example=example)
    keep = filters.filters_to_keep(scores, 0.5, "quantile")
    return remove_filters(model, example, filters.mark_weakest(scores, keep))[0]


@matplotlib.rc_context(plots.STYLE)
def draw(record: dict[str, Any]) -> bytes:
    """The PNG: seconds against weights and against layers."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    masks, surgery = figure.subplots(1, 2)
    weights = [row["weights"] for row in record["mask_update"]]
    for kind, style in (("ours", plots.PRUNED), ("torch.nn.utils.prune", plots.DENSE)):
        seconds = [statistics.median(row[kind]) for row in record["mask_update"]]
        masks.plot(weights, seconds, **{**style, "label": kind})
    masks.set(
        title="A mask update, by the number of weights", xlabel="weights", ylabel="seconds", xscale="log", yscale="log"
    )
    masks.legend(loc="upper left")
    for row in record["surgery"]:
        seconds = statistics.median(row["seconds"])
        surgery.plot(row["layers"], seconds, color=plots.PRUNED["color"], marker=plots.PRUNED["marker"])
        surgery.annotate(row["network"], (row["layers"], seconds), (8, -4), textcoords="offset points")
    surgery.set(title="Surgery, by the number of layers", xlabel="convolutions and linear layers", ylabel="seconds")
    surgery.set_xlim(0, 1.3 * max(row["layers"] for row in record["surgery"]))
    surgery.set_ylim(bottom=0)
    return plots.png(figure)


if __name__ == "__main__":
    cli.run(main)
