"""Quarantine of prompts that fail inside the model and of images without a score, up to a maximum fraction."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from cdpo_ray.dataflow.memory import is_out_of_memory
from cdpo_ray.dataflow.parts import images_of, read_quarantined, write_quarantined
from cdpo_ray.errors import CdpoError, GenerationError, ModelError

IMAGES = "images"
"""Key of an entry whose prompt has a row: its images that have no score."""


class Quarantine:
    """Quarantined prompts of a step, one file per prompt in its folder, shared by all actors and later attempts.

    A quarantined prompt is not retried, so that an interrupted step gives the same result as an uninterrupted one. A
    prompt with only some bad images keeps its row and counts by the fraction of bad images.

    Args:
        output_dir: folder of the step.
        num_prompts: total number of prompts of the step.
        max_bad_fraction: maximum fraction of prompts that may be quarantined.
    """

    def __init__(self, output_dir: Path, num_prompts: int, max_bad_fraction: float) -> None:
        self.output_dir = output_dir
        self.num_prompts = num_prompts
        self.max_bad_fraction = max_bad_fraction

    def apply(self, make: Callable[[pa.Table], pa.Table], rows: pa.Table) -> pa.Table:
        """Apply ``make`` to rows of prompts; if it raises, apply it to each row and quarantine the rows that fail.

        Returns:
            Rows that ``make`` returned, without those of quarantined prompts.

        Raises:
            CdpoError: raised by ``make``; not caused by a prompt.
            ModelError: the device failed, which no prompt has caused, or is out of memory with one prompt.
            GenerationError: too many prompts are quarantined.
        """
        try:
            return make(rows)
        except CdpoError:
            raise
        except Exception as error:  # the model's code and the driver may raise any type
            if isinstance(error, torch.AcceleratorError) or (rows.num_rows == 1 and is_out_of_memory(error)):
                raise ModelError(
                    f"the device failed: {_one_line(error)}; run the same command again to resume"
                ) from None
            if rows.num_rows == 1:
                self._add(rows, _one_line(error))
                return rows.slice(0, 0)
        made = [self.apply(make, rows.slice(row, 1)) for row in range(rows.num_rows)]
        made = [row for row in made if row.num_rows]
        return pa.concat_tables(made) if made else rows.slice(0, 0)

    def refuse_too_many(self) -> set[int]:
        """Indices of the prompts that are quarantined and have no row.

        Raises:
            GenerationError: too many prompts, or all, are quarantined, counting images without a score.
        """
        found = sorted(read_quarantined(self.output_dir), key=lambda entry: entry["prompt_index"])
        failed = {entry["prompt_index"] for entry in found if IMAGES not in entry}
        num_bad = len(failed) + sum(len(entry[IMAGES]) / entry["num_images"] for entry in found if IMAGES in entry)
        if num_bad > self.max_bad_fraction * self.num_prompts or num_bad >= self.num_prompts > 0:
            first = found[0]
            what = [f"{len(failed)} of {self.num_prompts} prompts cannot be made into images"] * bool(failed)
            num_black = num_images_without_score(found)
            what += [f"{num_black} images have no score"] * bool(num_black)
            raise GenerationError(
                f"{' and '.join(what)};"
                f" `generation.max_bad_fraction` = {self.max_bad_fraction} allows fewer; the first,"
                f" {first['prompt'][:80]!r}: {first['reason']}; raise `generation.max_bad_fraction`, or fix the cause"
                f" and delete {self.output_dir}"
            )
        return failed

    def add_images(self, rows: pa.Table, black: NDArray[np.bool_], names: Sequence[Any], num_images: int) -> None:
        """Quarantine the images that have no score.

        Args:
            rows: rows of the prompts, or a piece of one.
            black: ``[row, ...]`` with one value per image, see `is_black`.
            names: names of the images of a row.
            num_images: number of images of a whole prompt.

        Raises:
            GenerationError: too many prompts and images are quarantined.
        """
        for row, mask in enumerate(black.reshape(-1, len(names))):
            if mask.any():
                bad = [name for name, is_bad in zip(names, mask, strict=True) if is_bad]
                reason = (
                    f"images {', '.join(map(str, bad))} of {num_images} are black: the model or its VAE returned"
                    " non-finite values (try another `model.dtype`), or a safety checker blacked them out"
                )
                self._add(rows.slice(row, 1), reason, **{IMAGES: bad}, num_images=num_images)

    def _add(self, row: pa.Table, reason: str, **more: Any) -> None:
        (entry,) = row.select(["prompt_index", "prompt"]).to_pylist()
        write_quarantined(self.output_dir, entry["prompt_index"], {**entry, **more, "reason": reason}, images_of(row))
        self.refuse_too_many()


def num_images_without_score(quarantined: Sequence[Mapping[str, Any]]) -> int:
    """Number of images without a score in these entries; images of prompts without a row are not counted."""
    return sum(len(entry.get(IMAGES, ())) for entry in quarantined)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
