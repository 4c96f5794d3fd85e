"""What a run reports: JSON, summaries over seeds, tables, and the machine behind the numbers."""

import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from experiment import checkpoints, measure, training
from experiment.cli import Failure
from experiment.data import ImageData

SCHEMA = 3  # of the JSON that the scripts write; before 3, `drop` was from the dense network without fine-tuning


@dataclass(frozen=True)
class Column:
    """A quantity of every run: its name in the JSON, its title in the table, and how a run's record tells it.

    What is None was not measured there.
    """

    name: str
    title: str
    of: Callable[[dict[str, Any]], float | None]
    is_count: bool = False


def describe(model: nn.Module, history: training.History, data: ImageData) -> dict[str, Any]:
    """The record of a trained network; the accuracy is that of the last epoch, whichever was best."""
    return {
        "test_accuracy": training.accuracy(model, history, data),
        "parameters": measure.parameters(model),
        "nonzero_parameters": measure.nonzero_parameters(model),
        "checkpoint_bytes": len(checkpoints.network_bytes(model)),
        "widths": list(model.widths),
        "seconds_per_epoch": statistics.median(epoch["seconds"] for epoch in history) if history else None,
        "history": history,
    }


def json_bytes(report: dict[str, Any]) -> bytes:
    """Indented JSON; raises ValueError for NaN or infinity, which are not JSON."""
    return (json.dumps(report, indent=2, allow_nan=False) + "\n").encode()


def load(path: Path | str) -> dict[str, Any]:
    """The report that a script has written. Raises Failure for a file of anything else, or of an older version."""
    try:
        report = json.loads(Path(path).read_text())
        schema = report.get("schema", 1)
    except (ValueError, AttributeError) as error:
        raise Failure(f"{path}: not a report of these scripts ({error})") from error
    if schema != SCHEMA:
        raise Failure(f"{path}: a report of schema {schema}, written by another version of this project; run it again")
    return report


def unstructured(head: dict[str, Any], runs: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """What unstructured_pruning.py reports on its runs, as JSON and as text; `head` says how they were made."""
    columns = [
        Column("nonzero_weights", "nonzero weights", lambda run: run["pruned"]["nonzero_weights"], is_count=True),
        Column("test_accuracy", accuracy_title(head["arguments"]), lambda run: run["pruned"]["test_accuracy"]),
        Column("drop", "drop (points)", lambda run: run["drop"]),
        Column("ticket_accuracy", "lottery ticket (%)", lambda run: run.get("ticket", {}).get("test_accuracy")),
        Column("scratch_accuracy", "from scratch (%)", lambda run: run.get("scratch", {}).get("test_accuracy")),
        Column(
            "compacted_nonzero",
            "nonzero after compaction",
            lambda run: run["compacted"]["nonzero_parameters"],
            is_count=True,
        ),
        Column(
            "compacted_parameters",
            "parameters after compaction",
            lambda run: run["compacted"]["parameters"],
            is_count=True,
        ),
        Column("compacted_speed_up", "speedup", lambda run: speed_up(run["dense"], run["compacted"], "batch 256")),
    ]

    def label(point: dict[str, Any]) -> str:
        scope = "" if point["scope"] == "global" else f", {point['scope']}"
        return f"{point['method']}{scope}, {100 * point['sparsity_target']:g} %"

    report = make(head, runs, ("method", "scope", "sparsity_target"), columns)
    text = summary_table(report, label, columns)
    if len(runs) == 1:
        rows = [
            [row["layer"], f"{row['weights']:,}", f"{row['nonzero']:,}", f"{1 - row['nonzero'] / row['weights']:.2%}"]
            for row in runs[0]["pruned"]["layers"]
        ]
        text += "\n\n" + table(["layer", "weights", "nonzero", "sparsity"], rows)
    return report, text


def structured(head: dict[str, Any], runs: list[dict[str, Any]], cutoff: str) -> tuple[dict[str, Any], str]:
    """The same for structured_pruning.py; `cutoff` is the flag that said which filters are removed."""

    def faster(batch: str) -> Callable[[dict[str, Any]], float]:
        return lambda run: speed_up(run["dense"], run["pruned"], batch)

    columns = [
        Column("parameters", "parameters", lambda run: run["pruned"]["parameters"], is_count=True),
        Column("accuracy_before", "before fine-tuning (%)", lambda run: run["before_fine_tuning"]["test_accuracy"]),
        Column("test_accuracy", accuracy_title(head["arguments"]), lambda run: run["pruned"]["test_accuracy"]),
        Column("drop", "drop (points)", lambda run: run.get("drop")),
        Column("drop_from_baseline", "drop from dense (points)", lambda run: run["drop_from_baseline"]),
        Column("macs_reduction", "times fewer MACs", lambda run: run["dense"]["macs"] / run["pruned"]["macs"]),
        Column("speed_up_1", "speedup, batch 1", faster("batch 1")),
        Column("speed_up_256", "speedup, batch 256", faster("batch 256")),
        Column("longer_accuracy", "dense, fine-tuned (%)", lambda run: run.get("longer", {}).get("test_accuracy")),
        Column("scratch_accuracy", "from scratch (%)", lambda run: run.get("scratch", {}).get("test_accuracy")),
    ]
    report = make(head, runs, ("method", cutoff), columns)
    text = summary_table(report, lambda point: f"{point['method']}, {cutoff} {point[cutoff]:,}", columns)
    if len(runs) == 1:
        layers = runs[0]["layers"]
        rows = [[layer["layer"], str(layer["filters"]), str(layer["kept"])] for layer in layers]
        text += "\n\n" + table(["layer", "filters", "kept"], rows)
        if all(layer["kept"] == layer["filters"] for layer in layers):
            text += "\nnothing was pruned: no filter is below the cutoff, or --round_to keeps all that are"
        kept = {layer["layer"]: layer["kept"] for layer in layers}
        for layer in runs[0]["all_below"]:
            text += f"\n{layer}: every filter is below the cutoff; kept for its importance: {kept[layer]}"
    return report, text


def sensitivity(
    head: dict[str, Any], seed: int, accuracy: float, layers: list[dict[str, Any]]
) -> tuple[dict[str, Any], str]:
    """The same for structured_pruning.py --sensitivity: `accuracy` is the dense network's, without any of `layers`."""
    report = {"schema": SCHEMA, **head, "seed": seed, "test_accuracy": accuracy, "layers": layers}
    header = ["accuracy (filters kept)", "filters", *(f"at {point['threshold']:g}" for point in layers[0]["points"])]
    rows = [
        [
            layer["layer"],
            str(layer["filters"]),
            *(f"{point['test_accuracy']:.2f} ({point['kept']})" for point in layer["points"]),
        ]
        for layer in layers
    ]
    return report, f"{table(header, rows)}\naccuracy of the whole network: {accuracy:.2f}"


def accuracy_title(arguments: dict[str, Any]) -> str:
    """What `test_accuracy` is in a run with these arguments."""
    return "held-out accuracy (%)" if arguments.get("held_out") else "test accuracy (%)"


def make(
    head: dict[str, Any], runs: list[dict[str, Any]], by: Sequence[str], columns: Sequence[Column]
) -> dict[str, Any]:
    """The report on all `runs` of a script, one or several."""
    return {"schema": SCHEMA, **head, "summary": summarize(runs, by, columns), "runs": runs}


def mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and the sample standard deviation (n - 1), which one value alone does not have."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def summarize(runs: list[dict[str, Any]], by: Sequence[str], columns: Sequence[Column]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds: of the dense accuracy, and of each column per values of `by`."""
    dense = {run["seed"]: run["dense"]["test_accuracy"] for run in runs}
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in by), []).append(run)
    return {
        "dense": mean_and_std(dense.values()),
        "pruned": [
            {
                **dict(zip(by, values, strict=True)),
                **{
                    column.name: mean_and_std(measured)
                    for column in columns
                    if None not in (measured := [column.of(run) for run in group])
                },
            }
            for values, group in groups.items()
        ],
    }


def speed_up(dense: dict[str, Any], pruned: dict[str, Any], batch: str) -> float:
    """How many times as fast as the dense network the pruned one is, by the latencies of their records."""
    return dense["latency_ms"][batch] / pruned["latency_ms"][batch]


def summary_table(report: dict[str, Any], label: Callable[[dict[str, Any]], str], columns: Sequence[Column]) -> str:
    """The summary as text: a row for the dense network, then one for each point, which `label` names.

    Columns that were measured nowhere are left out.
    """
    points = report["summary"]["pruned"]
    shown = [column for column in columns if any(column.name in point for point in points)]
    dense = {"test_accuracy": report["summary"]["dense"]}
    rows = [["dense", *(cell(column, dense.get(column.name)) for column in shown)]]
    rows += [[label(point), *(cell(column, point.get(column.name)) for column in shown)] for point in points]
    return table(["", *(column.title for column in shown)], rows)


def cell(column: Column, value: dict[str, float | None] | None) -> str:
    """A mean with its standard deviation, or of a count the mean alone."""
    return f"{value['mean']:,.0f}" if value and column.is_count else with_std(value)


def with_std(value: dict[str, float | None] | None) -> str:
    """ "99.41 ± 0.03", or "99.41" of a single value, or nothing of what was not measured."""
    if value is None:
        return ""
    return f"{value['mean']:.2f}" + ("" if value["std"] is None else f" ± {value['std']:.2f}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first flush left, the others flush right."""
    columns = zip(header, *rows, strict=True)
    aligned = []
    for column, cells in enumerate(columns):
        width = max(map(len, cells))
        aligned.append([cell.rjust(width) if column else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(row) for row in zip(*aligned, strict=True))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware behind the numbers of a run."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a plain str, which a checkpoint may hold
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
    }


def processor_name() -> str:
    """The CPU's name as Linux tells it, or what Python knows elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
