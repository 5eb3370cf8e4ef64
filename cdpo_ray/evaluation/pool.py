"""Ray Data: held-out prompts stream through a pool of comparers into the table that the report reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cdpo_ray.evaluation.comparison import Comparer
from cdpo_ray.evaluation.metrics import measure
from cdpo_ray.generation.generator import MakeScores, Sampling
from cdpo_ray.generation.pool import PoolSize, in_pool, prompt_rows
from cdpo_ray.store import write_json


def evaluate_adapter(
    prompts: Sequence[str],
    output_dir: Path,
    *,
    training_dir: Path,
    family: str,
    model: Mapping[str, Any],
    sampling: Sampling,
    judges: Sequence[str],
    make_scores: MakeScores,
    num_margin_draws: int,
    guidance_range: tuple[float, float] | None,
    generators: PoolSize,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Write `5-evaluation`: the images and scores of both models, and what follows from them; returns the latter."""
    rows_per_call = max(1, sampling.images_per_batch // sampling.images_per_prompt)
    compared = in_pool(
        prompt_rows(prompts, rows_per_call),
        Comparer,
        generators,
        rows_per_call=rows_per_call,
        family=family,
        model=dict(model),
        sampling=sampling,
        training_dir=training_dir,
        make_scores=make_scores,
        num_margin_draws=num_margin_draws,
        guidance_range=guidance_range,
    )
    compared.set_name("evaluate")
    rows = pa.concat_tables(ray.get(compared.to_arrow_refs())).sort_by("prompt_index")
    pq.write_table(_row_per_image(rows, sampling.images_per_prompt), output_dir / "comparison.parquet")
    metrics = measure(rows, judges, num_resamples=num_resamples, seed=seed)
    metrics |= {"num_prompts": len(prompts), "images_per_prompt": sampling.images_per_prompt}
    write_json(output_dir / "metrics.json", metrics)
    return metrics


def _row_per_image(rows: pa.Table, num_images: int) -> pa.Table:
    lists = [name for name in rows.column_names if pa.types.is_list(rows.schema.field(name).type)]
    repeated = rows.select(["prompt_index", "prompt_id", "prompt"]).take(
        np.repeat(np.arange(rows.num_rows), num_images)
    )
    repeated = repeated.append_column("sample_index", pa.array(np.tile(np.arange(num_images), rows.num_rows)))
    for name in lists:
        repeated = repeated.append_column(name, rows[name].combine_chunks().flatten())
    return repeated
