"""Where benchmarks write, and how they name a machine there."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def hardware_slug(device: str) -> str:
    """A device's name as a part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
