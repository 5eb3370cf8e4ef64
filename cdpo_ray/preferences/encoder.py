"""Rows with pixels -> rows of samples: each image is encoded once, and its posterior stored."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from cdpo_ray.dataflow.columns import list_column, storable, tensor_column
from cdpo_ray.models import load_model
from cdpo_ray.preferences.pixels import MIN_IMAGES
from cdpo_ray.preferences.rows import Fault
from cdpo_ray.records import LABEL, PREFERENCE, score_column

if TYPE_CHECKING:
    from cdpo_ray.generation.generator import MakeScores


class Encoder:
    """Rows with pixels -> rows of samples (`records`: 1-samples); a plain class that an actor pool wraps.

    Args:
        family, model: name in `FAMILIES` and arguments of its ``load``.
        images_per_batch: number of images per VAE forward pass.
        make_scores: builds the judges that score the images; `None`: no score columns.
        keep_images: keep the pixels used in training; the writing task encodes them as PNG.
        quarantine_dir: folder that lists images with non-finite latents; a row with fewer than two others is dropped.
        row_at: index of a row -> its file, and its number there.
    """

    def __init__(
        self,
        family: str,
        model: Mapping[str, Any],
        *,
        images_per_batch: int,
        make_scores: "MakeScores | None",
        keep_images: bool,
        quarantine_dir: Path,
        row_at: Callable[[int], tuple[str, int]],
    ) -> None:
        self.model = load_model(family, **model)
        self.images_per_batch = images_per_batch
        self.scores = make_scores() if make_scores else None
        self.keep_images = keep_images
        self.quarantine_dir = quarantine_dir
        self.row_at = row_at

    def __call__(self, rows: pa.Table) -> pa.Table:
        column = rows["pixels"]
        pixels = column.combine_chunks().to_numpy_ndarray()
        num_samples = pixels.shape[1]
        images = torch.from_numpy(pixels.reshape(-1, *pixels.shape[2:]).copy())
        prompts = rows["prompt"].to_pylist()
        conditioning, num_tokens_cut = self.model.encode_prompts(prompts)
        encoded = [self.model.encode(batch) for batch in images.split(self.images_per_batch)]
        rows = rows.drop_columns("pixels")
        finite = np.ones(len(images), bool)
        for name, moments in zip(("latents", "latents_std"), zip(*encoded, strict=True), strict=True):
            values = storable(torch.cat(moments).cpu())
            finite &= np.isfinite(values).all(axis=(1, 2, 3))
            rows = rows.append_column(name, tensor_column(values, num_samples))
        for name, value in conditioning.items():
            rows = rows.append_column(name, tensor_column(storable(value.cpu())))
        rows = rows.append_column("num_tokens_cut", pa.array(num_tokens_cut, pa.int64()))
        if self.keep_images:
            rows = rows.append_column("pixels", column)
        if self.scores:
            repeated = [prompt for prompt in prompts for _ in range(num_samples)]
            batches = [
                self.scores(batch, repeated[start : start + len(batch)])
                for start, batch in zip(
                    range(0, len(images), self.images_per_batch), images.split(self.images_per_batch), strict=True
                )
            ]
            for name in batches[0]:
                values = np.concatenate([batch[name] for batch in batches])
                rows = rows.append_column(score_column(name), list_column(values, num_samples, pa.float64()))
        return rows if finite.all() else self._quarantined(rows, finite.reshape(-1, num_samples))

    def _quarantined(self, rows: pa.Table, finite: NDArray[np.bool_]) -> pa.Table:
        """Quarantine images with non-finite latents, and remove their labels and scores, so that they form no pair.

        Args:
            finite: ``[row, sample]``.
        """
        for row, is_finite in zip(rows["prompt_index"].to_pylist(), finite, strict=True):
            faults = [
                Fault(*self.row_at(row), f"image {index}: latents are not finite; try another `model.dtype`")
                for index in np.flatnonzero(~is_finite).tolist()
            ]
            if faults:
                path = self.quarantine_dir / f"{row:012d}.latents.jsonl"
                path.write_text("".join(f"{json.dumps(asdict(fault))}\n" for fault in faults))
        for name in map(score_column, (LABEL, PREFERENCE)):
            values = np.where(finite, np.array(rows[name].to_pylist()), np.nan)
            column = list_column(values.ravel(), finite.shape[1], pa.float64())
            rows = rows.set_column(rows.column_names.index(name), name, column)
        num_left = np.isfinite(np.array(rows[score_column(LABEL)].to_pylist())).sum(axis=1)
        return rows.filter(num_left >= MIN_IMAGES)
