"""Ray Data: held-out prompts -> pool of model actors -> the table that the report reads."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import Dataset

from cdpo_ray.config import Pool
from cdpo_ray.dataflow.parts import find_parts, join_quarantined
from cdpo_ray.dataflow.quarantine import Quarantine
from cdpo_ray.dataflow.streams import in_pool, read_rows, write_parts
from cdpo_ray.evaluation.appearance_columns import add_appearance
from cdpo_ray.evaluation.comparison import Comparer
from cdpo_ray.evaluation.joining import join_comparison
from cdpo_ray.evaluation.labelled import ImplicitValueModel, LabelledSamples, label_accuracy, only_held_out
from cdpo_ray.evaluation.metrics import measure
from cdpo_ray.generation.generator import MakeScores, Sampling
from cdpo_ray.generation.pool import calls_of
from cdpo_ray.progress import Progress
from cdpo_ray.records import ARMS, CONDITIONING, IMPLICIT_VALUE, LABEL, score_column
from cdpo_ray.store import shard_schema, write_json


def evaluate_adapter(
    prompts: Sequence[str],
    output_dir: Path,
    *,
    categories: Mapping[str, str],
    training_dir: Path,
    family: str,
    model: Mapping[str, Any],
    sampling: Sampling,
    judges: Sequence[str],
    make_scores: MakeScores,
    num_margin_draws: int,
    generators: Pool,
    num_resamples: int,
    seed: int,
    max_bad_fraction: float,
    progress: Progress,
    labelled: LabelledSamples | None = None,
) -> dict[str, Any]:
    """Write `5-evaluation`: images and scores of both models, and `metrics.json`.

    Reuses the finished parts of an interrupted attempt. Prompts that raise inside the model are quarantined in
    `set_aside.jsonl`.

    Args:
        categories: by prompt, of those that have one.
        max_bad_fraction: maximum share of prompts in quarantine.
        labelled: images with human preferences, if given; those of held-out prompts are used.

    Returns:
        Content of `metrics.json`.

    Raises:
        GenerationError: more than ``max_bad_fraction`` of the prompts are in quarantine.
    """
    output_dir = output_dir.resolve()  # actors on other nodes have another working directory
    quarantine = Quarantine(output_dir, len(prompts), max_bad_fraction)
    num_images = sampling.images_per_prompt
    parts, held = find_parts(output_dir, "comparison", num_images)
    done = quarantine.refuse_too_many() | {row for row, images in held.items() if len(images) == num_images}
    makes = (len(ARMS) * num_images, "images")
    progress.begin("evaluate", total=len(prompts), unit="prompt", done=len(done), makes=makes)
    calls = calls_of(prompts, sampling, held, done)
    rows = ray.data.from_blocks(calls) if calls else None
    compared = rows and in_pool(
        rows,
        Comparer,
        generators,
        rows_per_call=None,
        num_calls=len(calls),
        family=family,
        model=dict(model),
        sampling=sampling,
        training_dir=training_dir,
        make_scores=make_scores,
        num_margin_draws=num_margin_draws,
        quarantine=quarantine,
    )
    compared = compared and _mapped(compared, add_appearance)
    made = write_parts(
        compared,
        output_dir,
        "evaluate",
        progress,
        images_per_prompt=num_images,
        images_held=sum(len(images) for row, images in held.items() if row not in done),
    )
    # The driver reads no images: a task joins them.
    join = ray.remote(num_cpus=1, max_retries=3)(join_comparison)
    table = ray.get(join.remote(sorted([*parts, *made]), output_dir / "comparison.parquet", categories, num_images))
    metrics = measure(table, judges, num_resamples=num_resamples, seed=seed)
    metrics |= {"num_prompts": table.num_rows, "images_per_prompt": sampling.images_per_prompt}
    if labelled and num_margin_draws:
        valued = _valued(
            labelled,
            generators,
            family=family,
            model=dict(model),
            training_dir=training_dir,
            num_margin_draws=num_margin_draws,
            seed=sampling.seed,
        )
        metrics["labels"] = label_accuracy(valued, labelled.rewards, num_resamples=num_resamples, seed=seed)
    write_json(output_dir / "metrics.json", metrics)
    join_quarantined(output_dir)
    return metrics


def with_appearance(rows: Dataset) -> Dataset:
    """Rows of samples with pixels -> rows for `cdpo judge`: with appearance, without what only training reads."""
    return _mapped(rows, _appearance_only)


def _appearance_only(rows: pa.Table) -> pa.Table:
    unused = [name for name in ("latents", *CONDITIONING) if name in rows.column_names]
    return add_appearance(rows.drop_columns(unused))


def _mapped(rows: Dataset, function: Callable[[pa.Table], pa.Table]) -> Dataset:
    return rows.map_batches(function, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, max_retries=3)


def _valued(labelled: LabelledSamples, generators: Pool, **arguments: Any) -> pa.Table:
    schema = shard_schema(labelled.samples_dir)
    kept = [name for name in map(score_column, (LABEL, *labelled.rewards)) if name in schema.names]
    read = ["prompt", "latents", *(name for name in CONDITIONING if name in schema.names), *kept]
    rows = read_rows(labelled.samples_dir, read)
    rows = rows.map_batches(
        only_held_out, fn_kwargs={"fraction": labelled.heldout_fraction}, batch_size=None, batch_format="pyarrow"
    )
    rows_per_call = max(1, labelled.samples_per_launch // schema.field("latents").type.shape[0])
    valued = in_pool(
        rows,
        ImplicitValueModel,
        generators,
        rows_per_call=rows_per_call,
        samples_per_launch=labelled.samples_per_launch,
        **arguments,
    )
    valued.set_name("evaluate labels")
    return pa.concat_tables(ray.get(valued.select_columns(["prompt", *kept, IMPLICIT_VALUE]).to_arrow_refs()))
