"""Runs a script on the first images of the test set and without measuring latencies: in seconds, but otherwise whole.

    python -m benchmarks.short unstructured_pruning.py --train_size 500 --epochs 2

For the fault campaign, which needs hundreds of runs, and for tests.
"""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

from experiment import cli

TEST_SIZE = 500


def main() -> None:
    del sys.argv[0]  # the script's own flags are left, after its name
    from experiment import data, measure

    for name in ("load_mnist", "load_cifar10"):
        setattr(data, name, small(getattr(data, name)))
    measure.latency_ms = lambda models, batch: dict.fromkeys(models, 1.0)
    importlib.import_module(Path(sys.argv[0]).stem).main()


def small(load):  # noqa: ANN001, ANN201  (a function from a folder to ImageData, and such a function)
    def load_small(data_dir: Path) -> object:
        whole = load(data_dir)
        few = {"test_images": whole.test_images[:TEST_SIZE], "test_labels": whole.test_labels[:TEST_SIZE]}
        return replace(whole, **few)

    return load_small


if __name__ == "__main__":
    cli.run(main)
