"""Thousands of random networks without filters, beside the same networks with those filters zeroed, in float64.

    python -m benchmarks.fuzz

Writes fuzz.json. The exit status is 1 if any network computed something else; its source is printed.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm import tqdm

from tests.pruning import fuzz


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=2000, help="how many of each kind (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first network (default %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="most operations of a network (default %(default)s)")
    parser.add_argument("--results_dir", type=Path, default=Path("benchmarks/results"), help="folder for fuzz.json")
    args = parser.parse_args()
    seeds = range(args.seed, args.seed + args.networks)
    kinds = {"remove_filters": fuzz.removal, "compact": fuzz.compaction}
    record = {
        "environment": {"torch": torch.__version__},
        "seeds": [seeds.start, seeds.stop],
        "steps": args.steps,
        **{kind: campaign(kind, run, seeds, args.steps) for kind, run in kinds.items()},
    }
    args.results_dir.mkdir(parents=True, exist_ok=True)
    (args.results_dir / "fuzz.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({kind: {**record[kind], "failures": len(record[kind]["failures"])} for kind in kinds}, indent=2))
    sys.exit(any(record[kind]["failures"] for kind in kinds))


def campaign(kind: str, run: Callable[[Random, int], fuzz.Case], seeds: range, steps: int) -> dict[str, Any]:
    """What became of one network per seed."""
    cases, failures = [], []
    for seed in tqdm(seeds, desc=kind, disable=None):
        try:
            cases.append(run(Random(seed), steps))
        except AssertionError as error:
            failures.append({"seed": seed, "error": str(error).splitlines()[0]})
            tqdm.write(f"seed {seed}: {error}", file=sys.stderr)
    of_marked = [case.removed / case.marked for case in cases if case.marked]
    total = {key: sum(getattr(case, key) for case in cases) for key in ("filters", "fixed", "marked", "removed")}
    return {
        "networks": len(seeds),
        **total,
        "mean_removed_of_marked": statistics.fmean(of_marked) if of_marked else None,
        "largest_difference": max((case.difference for case in cases), default=None),
        "failures": failures,
    }


if __name__ == "__main__":
    main()
