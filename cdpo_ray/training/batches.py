"""Drawn pairs and samples -> batches; a batch is a function of its position alone."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.models.family import Conditioning, Times, rows_of
from cdpo_ray.randomness.noise import generator_at
from cdpo_ray.store import read_shards
from cdpo_ray.training.bank import SampleBank

T = TypeVar("T")


@dataclass(frozen=True)
class PairBatch:
    """Model inputs of pairs; chosen and rejected share conditioning, times and noise.

    Attributes:
        latents_w, latents_l: ``[pair, channel, height, width]``, chosen and rejected.
        conditioning: one row per pair.
        times: ``[pair]`` each: the timestep, and the family's other per-pair draws.
        noise: ``[pair, channel, height, width]`` fp32.
    """

    latents_w: Tensor
    latents_l: Tensor
    conditioning: Conditioning
    times: Times
    noise: Tensor

    def to(self, device: str, dtype: torch.dtype) -> Self:
        """Move to the device; latents and conditioning are cast to ``dtype``, times and noise are not."""

        def moved(value: Tensor) -> Tensor:
            return value if device == "cpu" else value.pin_memory().to(device, non_blocking=True)

        return type(self)(
            moved(self.latents_w).to(dtype),
            moved(self.latents_l).to(dtype),
            {name: moved(value).to(dtype) for name, value in self.conditioning.items()},
            {name: moved(value) for name, value in self.times.items()},
            moved(self.noise),
        )


@dataclass(frozen=True)
class StagePairs:
    """Pairs of one stage in training order: ``[draw]`` each, rows and sample indices of a `SampleBank`."""

    stage: int
    prompt_row: NDArray[np.int64]
    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]

    @classmethod
    def read(cls, stages_dir: Path, stage: int, bank: SampleBank) -> Self:
        columns = ["draw", "prompt_index", "chosen", "rejected"]
        table = read_shards(stages_dir / f"stage-{stage}", columns).sort_by("draw")
        return cls(
            stage,
            bank.row_of_prompt[table["prompt_index"].to_numpy()],
            table["chosen"].to_numpy(),
            table["rejected"].to_numpy(),
        )


def make_batch(
    bank: SampleBank,
    pairs: StagePairs,
    draws: range,
    *,
    seed: int,
    draw_times: Callable[[torch.Generator], Times],
    empty_prompt_fraction: float,
    empty_conditioning: Conditioning,
) -> PairBatch:
    """Batch of the pairs at ``draws``, each with its own times and noise.

    Times, noise and the replacement of the prompt are functions of (seed, stage, draw), so the number of workers, the
    batch size and a restart change nothing.

    Args:
        draw_times: the model family's.
        empty_prompt_fraction: fraction of pairs, 0 to 1, trained with the empty prompt in place of their own.
        empty_conditioning: one row, of the empty prompt.
    """
    rows, chosen, rejected = pairs.prompt_row[draws], pairs.chosen[draws], pairs.rejected[draws]
    conditioning = rows_of(bank.conditioning, rows)
    times, noise, generators = [], [], [generator_at(seed, "training", pairs.stage, draw) for draw in draws]
    for place, generator in enumerate(generators):
        times.append(draw_times(generator))
        if torch.rand((), generator=generator) < empty_prompt_fraction:
            for name, value in conditioning.items():
                value[place] = empty_conditioning[name][0]
        noise.append(torch.randn(bank.latents.shape[2:], generator=generator))
    return PairBatch(
        bank.latents_at(rows, chosen, generators),
        bank.latents_at(rows, rejected, generators),
        conditioning,
        {name: torch.stack([drawn[name] for drawn in times]) for name in times[0]},
        torch.stack(noise),
    )


def announced(items: Iterable[T], announce: Callable[[T], Any], *, ahead: int) -> Iterator[T]:
    """The same items; ``announce`` is called with each, ``ahead`` items before it is yielded."""
    waiting = deque[T]()
    for item in items:
        announce(item)
        waiting.append(item)
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def prefetched(items: Iterable[T]) -> Iterator[T]:
    """The same items, each computed on a background thread while the previous one is used."""
    source = iter(items)
    end = object()
    with ThreadPoolExecutor(1) as executor:
        following = executor.submit(next, source, end)
        while (item := following.result()) is not end:
            following = executor.submit(next, source, end)
            yield item  # type: ignore[misc]
