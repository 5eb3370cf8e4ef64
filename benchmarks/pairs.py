"""Time and memory to rank, admit and draw the pairs of every stage, against a table of all pairs.

Both routes draw the paper's schedule from the same pairs; the table's are sorted by rank gap once, so that a stage is a
prefix of it. Other schedules follow, by arithmetic only. Time and memory are measured in separate passes, because
tracing allocations costs time. Memory is the peak beyond the scores.
"""

import argparse
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.schedule import Curriculum, Schedule
from cdpo_ray.curriculum.stages import admitted_gaps

Route = Callable[[NDArray[np.float64], int, int], list[int]]


OTHERS = {
    "equal count": {"boundaries": "equal_count"},
    "score gap": {"measure": "score_gap"},
    "score gap, equal count": {"measure": "score_gap", "boundaries": "equal_count"},
    "drawn by rank gap": {"draws": "by_measure"},
    "random order": {"order": "random"},
    "shuffled order": {"order": "shuffled"},
    "at most 50 a prompt": {"max_pairs_per_prompt": 50},
}


def by_arithmetic(scores: NDArray[np.float64], num_stages: int, num_draws: int, **changes: str | int) -> list[int]:
    """Draw every stage with the package; returns the number of admitted pairs per stage."""
    curriculum = Curriculum(rank_samples(scores), Schedule(num_stages=num_stages, **changes), seed=0)
    num_pairs = []
    for stage in range(1, num_stages + 1):
        drawn, admitted = curriculum.plan(stage, num_draws)
        assert len(drawn) == num_draws
        num_pairs.append(admitted.num_pairs)
    return num_pairs


def by_table(scores: NDArray[np.float64], num_stages: int, num_draws: int) -> list[int]:
    """Draw every stage from a table of all pairs, sorted by rank gap; returns the admitted pairs per stage."""
    num_prompts, num_samples = scores.shape
    order = np.argsort(-scores, axis=1, kind="stable").astype(np.int32)
    rank_w, rank_l = (ranks.astype(np.int32) for ranks in np.triu_indices(num_samples, 1))
    easy_first = np.argsort(rank_w - rank_l, kind="stable")
    rank_w, rank_l = rank_w[easy_first], rank_l[easy_first]
    # One sort for all prompts: by gap, then by pair of ranks, then by prompt.
    prompt = np.tile(np.arange(num_prompts, dtype=np.int32), len(rank_w))
    rank_gap = np.repeat(rank_l - rank_w, num_prompts)
    chosen, rejected = order[:, rank_w].T.ravel(), order[:, rank_l].T.ravel()
    score_gap = scores[prompt, chosen] - scores[prompt, rejected]
    differ = score_gap > 0
    prompt, chosen, rejected = prompt[differ], chosen[differ], rejected[differ]
    rank_gap, score_gap = rank_gap[differ], score_gap[differ]
    generator = np.random.default_rng(0)
    num_pairs = []
    for stage in range(1, num_stages + 1):
        min_gap, _ = admitted_gaps(num_samples, num_stages, 1, stage)
        num_pairs.append(int(np.searchsorted(-rank_gap, -min_gap, side="right")))
        drawn = generator.integers(num_pairs[-1], size=num_draws)
        columns = [column[drawn] for column in (prompt, chosen, rejected, rank_gap, score_gap)]
        assert all(len(column) == num_draws for column in columns)
    return num_pairs


def measure(
    route: Route, scores: NDArray[np.float64], num_stages: int, num_draws: int
) -> tuple[float, float, list[int]]:
    """Seconds (best of three), peak MB and number of pairs per stage."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        num_pairs = route(scores, num_stages, num_draws)
        seconds.append(time.perf_counter() - start)
    tracemalloc.start()
    route(scores, num_stages, num_draws)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return min(seconds), peak_bytes / 1e6, num_pairs


def main() -> None:
    """Measure both routes and print them with their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=135)
    parser.add_argument("--images", type=int, default=500, help="images per prompt")
    parser.add_argument("--stages", type=int, default=5)
    parser.add_argument("--draws", type=int, default=64_000, help="pairs drawn per stage")
    options = parser.parse_args()
    scores = np.random.default_rng(0).normal(size=(options.prompts, options.images))
    seconds, peak, num_pairs = measure(by_arithmetic, scores, options.stages, options.draws)
    table_seconds, table_peak, table_pairs = measure(by_table, scores, options.stages, options.draws)
    assert num_pairs == table_pairs
    print(f"{options.prompts} prompts x {options.images} images, {options.stages} stages x {options.draws:,} draws")
    print("pairs admitted per stage: " + ", ".join(f"{count:,}" for count in num_pairs))
    print(f"{'route':24} {'seconds':>9} {'peak MB':>9}")
    print(f"{'arithmetic':24} {seconds:9.3f} {peak:9.1f}")
    print(f"{'table':24} {table_seconds:9.3f} {table_peak:9.1f}")
    print(f"{'ratio':24} {table_seconds / seconds:9.1f} {table_peak / peak:9.1f}")
    for name, changes in OTHERS.items():
        route = partial(by_arithmetic, **changes)
        seconds, peak, _ = measure(route, scores, options.stages, options.draws)
        print(f"{name:24} {seconds:9.3f} {peak:9.1f}")


if __name__ == "__main__":
    main()
