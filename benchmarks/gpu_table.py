"""Markdown table of a result of `gpu_check.py`: speed, comparison with the stock implementation, and peak memory.

python benchmarks/gpu_table.py benchmarks/gpu/nvidia-h200-2026-11-27.json
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER = ("measurement", "per second", "to stock", "TFLOP/s", "share of matmul", "peak GiB", "first call, s")
ITEMS = ("pairs", "images")


def calls_of(path: Path) -> list[dict[str, Any]]:
    """Results of each call: a file holds one, or several under ``calls``."""
    found = json.loads(path.read_text())
    calls: list[dict[str, Any]] = found.get("calls", [found])
    return calls


def speed_of(result: dict[str, Any]) -> tuple[float, str] | None:
    """Items per second and the name of the items; `None`: another kind of measurement."""
    return next(((result[f"{item}_per_second"], item) for item in ITEMS if f"{item}_per_second" in result), None)


def rows(call: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row per measured speed of one call, compared with the stock implementation of the same call."""
    for name, result in call.items():
        if not isinstance(result, dict) or not (speed := speed_of(result)):
            continue
        what, _, variant = name.rpartition(", ")
        stock = speed_of(call.get(f"{what}, stock", {}))
        yield (
            name,
            f"{speed[0]:.3g} {speed[1]}",
            f"{speed[0] / stock[0]:.2f}" if stock and variant != "stock" else "",
            f"{result['teraflops_per_second']:.0f}" if "teraflops_per_second" in result else "",
            f"{result['share_of_matmul']:.0%}" if "share_of_matmul" in result else "",
            f"{result['peak_gib']:.1f}",
            f"{result['first_seconds']:.1f}",
        )


def main() -> None:
    for row in (HEADER, ("---",) * len(HEADER), *(row for call in calls_of(Path(sys.argv[1])) for row in rows(call))):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
