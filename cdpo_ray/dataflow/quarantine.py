"""Prompts that raise inside the model, and images without a score, are named with their reason, until too many."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from cdpo_ray.dataflow.memory import is_out_of_memory
from cdpo_ray.dataflow.parts import read_quarantined, write_quarantined
from cdpo_ray.errors import CdpoError, GenerationError, ModelError

IMAGES = "images"
"""Key of an entry whose prompt has a row: the images of it that have no score."""


class Quarantine:
    """A file per prompt in the step's folder, where every actor and a later attempt find it.

    A prompt that was set aside is not tried again, so that a step interrupted anywhere ends as one that was not. A
    prompt of which only some images are bad keeps its row; it counts by the share of them.

    Args:
        output_dir: of the step.
        num_prompts: of the step, all in all.
        max_bad_fraction: of them, that may be set aside.
    """

    def __init__(self, output_dir: Path, num_prompts: int, max_bad_fraction: float) -> None:
        self.output_dir = output_dir
        self.num_prompts = num_prompts
        self.max_bad_fraction = max_bad_fraction

    def apply(self, make: Callable[[pa.Table], pa.Table], rows: pa.Table) -> pa.Table:
        """What ``make`` makes of some prompts; of one by one where it raises, without those that do.

        Raises:
            CdpoError: as ``make`` raised it: no prompt is to blame.
            ModelError: the device failed, which would blame every prompt to come, or its memory is full.
            GenerationError: too many have been set aside.
        """
        try:
            return make(rows)
        except CdpoError:
            raise
        except Exception as error:  # the model's code, or the driver's: whatever it raises
            if isinstance(error, torch.AcceleratorError) or (rows.num_rows == 1 and is_out_of_memory(error)):
                raise ModelError(f"the device failed: {_line(error)}; the same command goes on from here") from None
            if rows.num_rows == 1:
                self._put(rows, _line(error))
                return rows.slice(0, 0)
        made = [self.apply(make, rows.slice(row, 1)) for row in range(rows.num_rows)]
        made = [row for row in made if row.num_rows]
        return pa.concat_tables(made) if made else rows.slice(0, 0)

    def refuse_too_many(self) -> set[int]:
        """Indices of the prompts that have been set aside whole.

        Raises:
            GenerationError: they are too many, or all, together with the images without a score.
        """
        found = sorted(read_quarantined(self.output_dir), key=lambda entry: entry["prompt_index"])
        whole = [entry for entry in found if IMAGES not in entry]
        num_bad = len(whole) + sum(len(entry[IMAGES]) / entry["num_images"] for entry in found if IMAGES in entry)
        if num_bad > self.max_bad_fraction * self.num_prompts or num_bad >= self.num_prompts > 0:
            first = found[0]
            what = [f"{len(whole)} of {self.num_prompts} prompts cannot be made into images"] * bool(whole)
            what += [f"{num_images_without_score(found)} images have no score"] * (len(whole) < len(found))
            raise GenerationError(
                f"{' and '.join(what)};"
                f" `generation.max_bad_fraction` = {self.max_bad_fraction} allows fewer; the first,"
                f" {first['prompt'][:80]!r}: {first['reason']}; raise it, or mend the cause and delete"
                f" {self.output_dir}"
            )
        return {entry["prompt_index"] for entry in whole}

    def add_images(self, rows: pa.Table, black: NDArray[np.bool_], names: Sequence[Any]) -> None:
        """Name the images that have no score.

        Args:
            black: ``[row, ...]``, see `is_black`; of as many images per row as there are names.
            names: of the images of a row.

        Raises:
            GenerationError: too many have been set aside.
        """
        for row, of_row in enumerate(black.reshape(-1, len(names))):
            if of_row.any():
                bad = [name for name, is_bad in zip(names, of_row, strict=True) if is_bad]
                reason = (
                    f"images {', '.join(map(str, bad))} of {len(names)} are black everywhere: the model or its VAE gave"
                    " values that are not finite (try another `model.dtype`), or a safety checker was at work"
                )
                self._put(rows.slice(row, 1), reason, **{IMAGES: bad}, num_images=len(names))

    def _put(self, row: pa.Table, reason: str, **more: Any) -> None:
        (entry,) = row.select(["prompt_index", "prompt"]).to_pylist()
        write_quarantined(self.output_dir, entry["prompt_index"], {**entry, **more, "reason": reason})
        self.refuse_too_many()


def num_images_without_score(set_aside: Sequence[Mapping[str, Any]]) -> int:
    """Of these entries; images of prompts that have no row are not counted."""
    return sum(len(entry.get(IMAGES, ())) for entry in set_aside)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
