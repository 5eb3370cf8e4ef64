"""Preference sets of the embedded world in published formats: the scene of the prompt is preferred to another."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cdpo_ray.testbed.scenes import caption, render, sample_scene


@dataclass(frozen=True)
class Judged:
    """A prompt with an image that matches it and one that does not."""

    prompt: str
    right: np.ndarray
    wrong: np.ndarray


def judged_scenes(count: int, seed: int = 0) -> Iterator[Judged]:
    """Pairs of images, uint8 ``[3, 32, 32]``."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        scene, other = sample_scene(rng), sample_scene(rng)
        yield Judged(caption(scene), render(scene, rng), render(other, rng))


def encoded(pixels: np.ndarray, kind: str = "png", **options: Any) -> bytes:
    """Bytes of a file of an image ``[3, height, width]``."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, format=kind, **options)
    return buffer.getvalue()


def pickapic_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with the columns of Pick-a-Pic; the right image is alternately first and second."""
    rows = []
    for index, judged in enumerate(judged_scenes(count, seed)):
        first = index % 2 == 0
        images = (judged.right, judged.wrong) if first else (judged.wrong, judged.right)
        rows.append(
            {
                "caption": judged.prompt,
                "jpg_0": encoded(images[0]),
                "jpg_1": encoded(images[1]),
                "label_0": float(first),
                "label_1": float(not first),
                "has_label": True,
                "model_0": "a column that is not read",
            }
        )
    return rows


def write_parquet(rows: list[dict[str, Any]], path: Path, rows_per_group: int = 8) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=rows_per_group)
    return path
