"""Half of the filters of a network of each of timm's families, beside the network with those filters masked.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.families

Of each module of timm the first network of fewer than 30 million parameters, in float64, with every number drawn anew,
on images of 64 by 64 where it takes them. Writes families.json.
"""

import argparse
import json
import statistics
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.networks import forward, half_of_groups, said, size, trains
from experiment import report
from pruning.surgery import FIXED, Channels, find_channels
from tests.pruning.oracle import difference_from_masked, largest_difference, randomize

LARGEST = 30_000_000  # parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", help="these alone (default: one of each family)")
    parser.add_argument("--results_dir", type=Path, default=Path("benchmarks/results"), help="folder for families.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of timm's networks, of no use here
    torch.set_num_threads(1)
    rows = {name: compared(name) for name in tqdm(args.networks or smaller_ones(), disable=None)}
    environment = report.environment(torch.device("cpu")) | {"timm": version("timm")}
    args.results_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n"
    (args.results_dir / "families.json").write_text(text)
    print(report.table(["network", "left", "difference", "fixed"], [cells(name, row) for name, row in rows.items()]))
    cut = [row for row in rows.values() if "error" not in row]
    print(
        f"{len(cut)} of {len(rows)} cut, at most {max(row['difference'] for row in cut):.1e} from the masked network;"
    )
    print(f"left: {statistics.median(row['left'] for row in cut):.3f} of the parameters, the median")


def cells(name: str, row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [name, "–", "–", row["error"]]
    return [name, f"{row['left']:.3f}", f"{row['difference']:.0e}", row["fixed"] or ""]


def smaller_ones() -> list[str]:
    """Of each module of timm the first network, by its name, that is small enough."""
    found = []
    for module in tqdm(timm.list_modules(), disable=None):
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                try:
                    parameters = size(timm.create_model(name))
                except (NotImplementedError, RuntimeError):  # computes with numbers while it is built
                    continue
            if parameters < LARGEST:
                found.append(name)
                break
    return found


def compared(name: str) -> dict[str, Any]:
    """Parameters, the part of them that is left, the difference from masking, and from the dense network, and why most
    of the fixed are fixed."""
    try:
        model, example = network(name)
        channels = find_channels(model, example)
        narrow = half_of_groups(model, channels)
        return {
            "parameters": size(model),
            "left": size(narrow) / size(model),
            "difference": difference_from_masked(model, narrow.eval(), example),
            "change": largest_difference(model, narrow, example),
            "trains": trains(narrow, example),
            "fixed": most_fixed(channels),
        }
    except Exception as error:
        return {"error": said(error)}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network of timm in eval mode and two images for it, of its own size if it takes no smaller ones."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    small, own = (torch.randn(2, *size, dtype=torch.double) for size in ((3, 64, 64), model.default_cfg["input_size"]))
    try:
        forward(randomize(model, small).eval(), small)
    except Exception:  # whatever it raises on images of another size
        return randomize(model, own).eval(), own
    return model, small


def most_fixed(channels: Channels) -> str | None:
    """The reason why the most filters are fixed, other than that they are outputs."""
    fixed = Counter()
    for layer, ids in channels.filters.items():
        fixed.update(dict.fromkeys(channels.reasons[layer], int((ids == FIXED).sum())))
    reasons = [reason for reason, _ in fixed.most_common() if "output" not in reason]
    return reasons[0] if reasons else None


if __name__ == "__main__":
    main()
