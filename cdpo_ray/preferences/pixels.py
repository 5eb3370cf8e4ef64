"""Rows of preference files -> rows with pixels; unusable rows and images are quarantined with the reason."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cdpo_ray.dataflow.columns import list_column, tensor_column
from cdpo_ray.preferences.files import read_rows
from cdpo_ray.preferences.images import Frame, load_pixels
from cdpo_ray.preferences.reader import Chunk
from cdpo_ray.preferences.rows import Fault, PreferenceSource, Row
from cdpo_ray.preferences.values import name_of
from cdpo_ray.records import LABEL, PREFERENCE, prompt_id, score_column

MIN_IMAGES = 2


Group = tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64], int]
"""Pixels ``[sample, 3, height, width]``, labels and scores ``[sample]``, and number of cropped images."""

IndexedGroup = tuple[int, str, NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64], int]
"""Index of the row in the set and its prompt, then the fields of `Group`."""


def read_chunks(
    chunks: pa.Table,
    *,
    source: PreferenceSource,
    frame: Frame,
    num_samples: int,
    rows_per_table: int,
    quarantine_dir: Path,
) -> Iterator[pa.Table]:
    """Yield tables of rows with pixels; faults go to one file per chunk in ``quarantine_dir``.

    Reading a chunk again writes an identical file.

    Args:
        chunks: one `Chunk` per row.
        num_samples: number of images per row; padded with black ones without label and score.
        rows_per_table: maximum number of rows per table.
    """
    groups: list[IndexedGroup] = []
    for values in chunks.to_pylist():
        chunk, faults = Chunk(**values), []
        for row in read_rows(chunk, source):
            if isinstance(row, Fault):
                faults.append(row)
                continue
            group, found = prepared(row, frame, num_samples)
            faults += found
            if group is not None:
                groups.append((chunk.first_index + row.number - chunk.first_number, row.prompt, *group))
            if len(groups) == rows_per_table:
                yield _table(groups)
                groups = []
        if faults:
            path = quarantine_dir / f"{chunk.first_index:012d}.jsonl"
            path.write_text("".join(f"{json.dumps(asdict(fault))}\n" for fault in faults))
    if groups:
        yield _table(groups)


def faults_of(chunks: pa.Table, *, source: PreferenceSource, frame: Frame) -> pa.Table:
    """Faults of some chunks, one row each; every image is opened.

    Args:
        chunks: one `Chunk` per row.
    """
    found = []
    for values in chunks.to_pylist():
        for row in read_rows(Chunk(**values), source):
            found += [row] if isinstance(row, Fault) else prepared(row, frame, len(row.images))[1]
    return pa.table({"fault": pa.array(map(str, found), pa.string())})


def prepared(row: Row, frame: Frame, num_samples: int) -> tuple[Group | None, list[Fault]]:
    """Load a row's images.

    Returns:
        The usable images, `None` if fewer than two are left; and the faults of the others.
    """
    pixels = np.zeros((num_samples, 3, frame.height, frame.width), np.uint8)
    labels, scores = np.full((2, num_samples), np.nan)
    faults, num_cut = [], 0
    for index, image in enumerate(row.images):
        try:
            pixels[index], is_cut = load_pixels(image, frame)
        except ValueError as error:
            name = name_of(image) if isinstance(image, str) else f"image {index}"
            faults.append(Fault(row.file, row.number, f"{name} {error}"))
            continue
        labels[index], scores[index] = row.labels[index], row.scores[index]
        num_cut += is_cut
    if len(row.images) - len(faults) < MIN_IMAGES:
        return None, faults
    return (pixels, labels, scores, num_cut), faults


def _table(rows: Sequence[IndexedGroup]) -> pa.Table:
    index, prompts, pixels, labels, scores, num_cut = zip(*rows, strict=True)
    num_samples = len(labels[0])
    return pa.table(
        {
            "prompt_index": pa.array(index, pa.int64()),
            "prompt_id": [prompt_id(prompt) for prompt in prompts],
            "prompt": list(prompts),
            score_column(LABEL): list_column(np.concatenate(labels), num_samples, pa.float64()),
            score_column(PREFERENCE): list_column(np.concatenate(scores), num_samples, pa.float64()),
            "num_images_cut": pa.array(num_cut, pa.int64()),
            "pixels": tensor_column(np.stack(pixels)),
        }
    )
