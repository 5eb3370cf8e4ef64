"""Prompts that raise inside the model are set aside with their reason, until there are too many."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import torch

from cdpo_ray.errors import CdpoError, GenerationError, ModelError
from cdpo_ray.generation.memory import is_out_of_memory
from cdpo_ray.parts import read_set_aside, write_set_aside


class SetAside:
    """A file a prompt in the step's folder, where every actor and a later attempt find it.

    A prompt that was set aside is not tried again, so that a step interrupted anywhere ends as one that was not.

    Args:
        output_dir: of the step.
        num_prompts: of the step, all in all.
        max_bad_fraction: of them, that may be set aside.
    """

    def __init__(self, output_dir: Path, num_prompts: int, max_bad_fraction: float) -> None:
        self.output_dir = output_dir
        self.num_prompts = num_prompts
        self.max_bad_fraction = max_bad_fraction

    def sparing(self, make: Callable[[pa.Table], pa.Table], rows: pa.Table) -> pa.Table:
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
        made = [self.sparing(make, rows.slice(row, 1)) for row in range(rows.num_rows)]
        made = [row for row in made if row.num_rows]
        return pa.concat_tables(made) if made else rows.slice(0, 0)

    def refuse_too_many(self) -> set[int]:
        """Indices of the prompts that have been set aside.

        Raises:
            GenerationError: they are too many, or all.
        """
        found = sorted(read_set_aside(self.output_dir), key=lambda entry: entry["prompt_index"])
        if len(found) > self.max_bad_fraction * self.num_prompts or 0 < self.num_prompts == len(found):
            first = found[0]
            raise GenerationError(
                f"{len(found)} of {self.num_prompts} prompts cannot be made into images;"
                f" `generation.max_bad_fraction` = {self.max_bad_fraction} allows fewer; the first,"
                f" {first['prompt'][:80]!r}: {first['reason']}; raise it, or mend the cause and delete"
                f" {self.output_dir}"
            )
        return {entry["prompt_index"] for entry in found}

    def _put(self, row: pa.Table, reason: str) -> None:
        (entry,) = row.select(["prompt_index", "prompt"]).to_pylist()
        write_set_aside(self.output_dir, entry["prompt_index"], entry | {"reason": reason})
        self.refuse_too_many()


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
