"""Ray Data: preference files stream through readers and a pool of encoders into shards."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from ray.data import Dataset

from cdpo_ray.config import Pool
from cdpo_ray.dataflow.parts import QUARANTINE, join_quarantined
from cdpo_ray.dataflow.streams import in_pool, write_shards
from cdpo_ray.preferences.encoder import Encoder
from cdpo_ray.preferences.images import Frame
from cdpo_ray.preferences.pixels import faults_of, read_chunks
from cdpo_ray.preferences.reader import Chunk, blocks_of, row_at
from cdpo_ray.preferences.rows import PreferenceSource
from cdpo_ray.progress import Progress
from cdpo_ray.store import make_folder

if TYPE_CHECKING:
    from cdpo_ray.generation.generator import MakeScores


def import_samples(
    chunks: Sequence[Chunk],
    output_dir: Path,
    *,
    source: PreferenceSource,
    frame: Frame,
    num_samples: int,
    family: str,
    model: Mapping[str, Any],
    images_per_batch: int,
    keep_images: bool,
    make_scores: "MakeScores | None",
    encoders: Pool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Write `1-samples` from existing images; unusable rows and images go to `set_aside.jsonl`.

    Readers and encoders process a few rows at a time, so memory does not grow with the files.

    Args:
        chunks: chunks of a `Scan`.
        output_dir: folder of the step.
        num_samples: number of images per row, padded.
        family, model: name in `FAMILIES` and arguments of its ``load``.
        images_per_batch: number of images per VAE forward pass.
        keep_images: write each image as PNG.
        make_scores: builds the judges inside each encoder; `None`: no score columns.
        encoders: size of the pool.

    Returns:
        Quarantined rows and images, with reasons.
    """
    output_dir = output_dir.resolve()  # readers on other nodes have another working directory
    quarantine_dir = output_dir / QUARANTINE
    make_folder(quarantine_dir)
    rows_per_call = max(1, images_per_batch // num_samples)
    rows = _chunk_rows(chunks).map_batches(
        read_chunks,
        fn_kwargs={
            "source": source,
            "frame": frame,
            "num_samples": num_samples,
            "rows_per_table": rows_per_call,
            "quarantine_dir": quarantine_dir,
        },
        batch_size=None,
        batch_format="pyarrow",
    )
    rows = in_pool(
        rows,
        Encoder,
        encoders,
        rows_per_call=rows_per_call,
        family=family,
        model=dict(model),
        images_per_batch=images_per_batch,
        make_scores=make_scores,
        keep_images=keep_images,
        quarantine_dir=quarantine_dir,
        row_at=functools.partial(row_at, chunks),
    )
    write_shards(rows, output_dir, "samples", progress, images_per_prompt=num_samples)
    return join_quarantined(output_dir)


def find_faults(chunks: Sequence[Chunk], *, source: PreferenceSource, frame: Frame) -> list[str]:
    """Faults of all rows and their images, in the order of the files."""
    found = _chunk_rows(chunks).map_batches(
        faults_of, fn_kwargs={"source": source, "frame": frame}, batch_size=None, batch_format="pyarrow"
    )
    found.set_name("check")
    faults: list[str] = pa.concat_tables(ray.get(found.to_arrow_refs()))["fault"].to_pylist()
    return faults


def _chunk_rows(chunks: Sequence[Chunk]) -> Dataset:
    return ray.data.from_blocks([pa.Table.from_pylist(list(map(asdict, block))) for block in blocks_of(chunks)])
