"""What makes the results of two runs comparable."""

import json
from pathlib import Path
from typing import Any

import torch


def comparable(value: Any) -> Any:
    """A report without what differs from run to run: times, memory and where it was written."""
    if isinstance(value, dict):
        differs = ("seconds", "latency", "speed_up", "compacted_speed_up", "peak", "results_dir")
        return {key: comparable(inner) for key, inner in value.items() if not key.startswith(differs)}
    return [comparable(inner) for inner in value] if isinstance(value, list) else value


def results_of(folder: Path | str, images: torch.Tensor | None = None) -> dict[str, Any]:
    """The files of a finished run by name, as far as two runs must agree on them.

    Of JSON what is comparable, of networks every tensor, of exported programs the outputs for normalised `images` (or
    every byte, without). Figures show times.
    """

    def program(path: Path) -> Any:
        return path.read_bytes() if images is None else torch.export.load(path).module()(images).tolist()

    read = {
        ".json": lambda path: comparable(json.loads(path.read_text())),
        ".pt": Path.read_bytes,
        ".pt2": program,
        ".png": lambda path: None,
    }
    return {path.name: read[path.suffix](path) for path in Path(folder).iterdir()}
