"""Ray Data: rows of samples stream through a pool of judges."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from cdpo_ray.config import Pool
from cdpo_ray.dataflow.streams import in_pool, read_rows
from cdpo_ray.progress import Progress
from cdpo_ray.records import score_column
from cdpo_ray.rewards.scorer import PixelScorer, SampleScorer
from cdpo_ray.store import count_rows

Rewards = Mapping[str, Mapping[str, Any]]
IMAGES_PER_CALL = 128  # a call has an overhead of 0.1 s


def score_pixels(
    rows: Dataset, *, rewards: Rewards, scorers: Pool, images_per_batch: int, rows_per_call: int, keep_pixels: bool
) -> Dataset:
    """Rows with `pixels` -> rows with one score column per reward.

    Args:
        rewards: name -> keyword arguments.
        scorers: size of the pool.
        images_per_batch: maximum number of images per call of a reward.
        rows_per_call: number of rows per actor call.
        keep_pixels: keep the pixels in the rows.
    """
    return in_pool(
        rows,
        PixelScorer,
        scorers,
        rows_per_call=rows_per_call,
        rewards=rewards,
        images_per_batch=images_per_batch,
        keep_pixels=keep_pixels,
    )


def rescore(
    samples_dir: Path,
    *,
    rewards: Rewards,
    scorers: Pool,
    images_per_batch: int,
    images_per_prompt: int,
    keep_images: bool,
    family: str,
    model: Mapping[str, Any],
    progress: Progress,
    num_prompts: int | None = None,
    mixed: bool = False,
) -> pa.Table:
    """Score existing images; nothing is generated.

    Args:
        samples_dir: `1-samples`.
        rewards: name -> keyword arguments.
        scorers: size of the pool.
        images_per_batch: maximum number of images per call of a reward.
        keep_images: whether the samples have PNGs, which are read; else the latents are decoded.
        family, model: name in `FAMILIES` and arguments of its ``load``, for decoding.
        num_prompts: number of prompts to score, from the first; `None`: all.
        mixed: compose batches differently from scoring in order, see `batches_of`.

    Returns:
        prompt_index, prompt_id and one list column of scores per reward, in prompt order.
    """
    num_stored = count_rows(samples_dir)
    progress.begin("score", total=min(num_stored, num_prompts or num_stored), unit="prompt")
    rows_per_call = max(1, IMAGES_PER_CALL // images_per_prompt)
    columns = ["prompt_index", "prompt_id", "prompt", "images" if keep_images else "latents"]
    rows = read_rows(samples_dir, columns)
    if num_prompts is not None:
        rows = rows.limit(num_prompts)
    rows = rows.repartition(target_num_rows_per_block=rows_per_call)
    scored = in_pool(
        rows,
        SampleScorer,
        scorers,
        rows_per_call=rows_per_call,
        family=family,
        model=dict(model),
        rewards=rewards,
        images_per_batch=images_per_batch,
        mixed=mixed,
    )
    scored.set_name("score")
    wanted = ["prompt_index", "prompt_id", *(score_column(name) for name in rewards)]
    tables = []
    for table in scored.select_columns(wanted).iter_batches(batch_size=None, batch_format="pyarrow"):
        progress.advance(table.num_rows)
        tables.append(table)
    return pa.concat_tables(tables).sort_by("prompt_index")
