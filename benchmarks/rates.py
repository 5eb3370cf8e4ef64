"""Alternating timings of several routes to the same result -> items per second of each, and their ratio."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Rates = dict[str, list[float]]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` counts the processor time of this process's threads: for a machine under other load."""


def rates_in_turns(
    routes: Mapping[str, Callable[[], object]], *, num_items: int, repeats: int, device: str, clock: str = "wall"
) -> Rates:
    """Items per second of each repetition of each route, after one warm-up repetition.

    The routes alternate, and so does their order, so that slow phases of the machine affect all of them.

    Args:
        routes: by name, a function that processes ``num_items`` items.
        num_items: number of items of one call.
        repeats: number of timed repetitions.
        device: `cpu` or `cuda`.
        clock: key of `CLOCKS`.
    """
    rates: Rates = {name: [] for name in routes}
    for repetition in range(repeats + 1):
        for name in list(routes)[:: 1 if repetition % 2 else -1]:
            seconds = seconds_of(routes[name], device, clock)
            if repetition:
                rates[name].append(num_items / seconds)
    return rates


def seconds_of(work: Callable[[], object], device: str, clock: str) -> float:
    """Time until the work is done, including the GPU's part."""
    _wait_for(device)
    start = CLOCKS[clock]()
    work()
    _wait_for(device)
    return CLOCKS[clock]() - start


def print_rates(rates: Rates, unit: str) -> None:
    """Print one line per route, and the ratio of the first to the second."""
    print(f"{'route':8} {unit + '/s':>12} {'lowest':>9} {'highest':>9}   (median of {len(next(iter(rates.values())))})")
    for name, values in rates.items():
        print(f"{name:8} {statistics.median(values):12.3f} {min(values):9.3f} {max(values):9.3f}")
    ours, stock = rates.values()
    pairwise = [mine / theirs for mine, theirs in zip(ours, stock, strict=True)]
    ratio = statistics.median(ours) / statistics.median(stock)
    print(f"{'ratio':8} {ratio:12.2f} {min(pairwise):9.2f} {max(pairwise):9.2f}")


def machine(device: str) -> str:
    """Description of the device for the output."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
