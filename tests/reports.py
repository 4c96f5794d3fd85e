"""What makes the reports of two runs comparable."""

from typing import Any


def comparable(value: Any) -> Any:
    """A report without what differs from run to run: times and where it was written."""
    if isinstance(value, dict):
        differs = ("seconds", "latency", "speed_up", "compacted_speed_up", "peak", "results_dir")
        return {key: comparable(inner) for key, inner in value.items() if not key.startswith(differs)}
    return [comparable(inner) for inner in value] if isinstance(value, list) else value
