"""Folder of images that were made elsewhere -> rows of held-out prompts with pixels."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.dataflow.images import MAX_PNG_BYTES, MAX_PNG_PIXELS
from cdpo_ray.errors import EvaluationError, PromptError, StoreError, printable
from cdpo_ray.preferences.images import open_upright
from cdpo_ray.prompts.files import read_file
from cdpo_ray.prompts.rows import Columns
from cdpo_ray.records import prompt_id
from cdpo_ray.store import path_within

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of the file that gives the prompt of each image, as in folders that Hugging Face's `datasets` loads."""
FILE, PROMPT = "file_name", "prompt"
"""Its columns."""
NUM_SHOWN = 3


@dataclass(frozen=True)
class ImageFolder:
    """Images of the held-out prompts in a folder.

    Attributes:
        prompts: held-out prompts, in order.
        paths: ``[prompt][image]``.
        num_others: number of images of other prompts, which are not used.
    """

    prompts: Sequence[str]
    paths: Sequence[Sequence[Path]]
    num_others: int


def find_images(folder: Path, prompts: Sequence[str], images_per_prompt: int, *, key: str) -> ImageFolder:
    """Find the images of the held-out prompts; no image is opened.

    Args:
        folder: of somebody else; files outside it are not read.
        prompts: held-out prompts.
        images_per_prompt: number of images that each must have.
        key: config key of the folder, for errors.

    Raises:
        EvaluationError: the metadata are missing or faulty, an image is missing or lies outside the folder, or a prompt
            has another number of images.
    """
    where = f"`{key}` {folder}"
    if not folder.is_dir():
        raise EvaluationError(f"{where}: no such folder; give a folder of images with {METADATA[0]} in it")
    present = [name for name in METADATA if (folder / name).is_file()]
    if not present:
        raise EvaluationError(
            f"{where}: has none of {', '.join(METADATA)}; write one with one row per image, with the columns `{FILE}`"
            f" and `{PROMPT}`"
        )
    found: dict[str, list[Path]] = {prompt: [] for prompt in prompts}
    try:
        path = path_within(folder, present[0])
        names, given = ([row.prompt.strip() for row in read_file(path, Columns(column))] for column in (FILE, PROMPT))
        for name, prompt in zip(names, given, strict=True):
            if prompt in found:
                found[prompt].append(path_within(folder, name))
    except (PromptError, StoreError, OSError) as error:
        raise EvaluationError(f"`{key}` {error}") from None
    _refuse_other_counts(where, found, images_per_prompt)
    paths = [*found.values()]
    every = [image for group in paths for image in group]
    if doubled := [str(image) for image, count in Counter(every).items() if count > 1]:
        raise EvaluationError(f"{where}: {path.name} names {printable(doubled[0])} more than once; name each file once")
    if missing := [str(image) for image in every if not image.is_file()]:
        raise EvaluationError(
            f"{where}: {len(missing):,} of {len(every):,} images do not exist, the first {printable(missing[0])}; copy"
            f" them, or correct {path.name}"
        )
    return ImageFolder(prompts, paths, len(names) - len(every))


def _refuse_other_counts(where: str, found: Mapping[str, Sequence[Path]], images_per_prompt: int) -> None:
    other = {prompt: len(paths) for prompt, paths in found.items() if len(paths) != images_per_prompt}
    if other:
        shown = ", ".join(f"{printable(repr(prompt))} has {count}" for prompt, count in [*other.items()][:NUM_SHOWN])
        more = f", and {len(other) - NUM_SHOWN:,} more" if len(other) > NUM_SHOWN else ""
        raise EvaluationError(
            f"{where}: each held-out prompt must have {images_per_prompt} images (`evaluation.images_per_prompt`), but"
            f" {shown}{more}; add or remove images"
        )


def rows_of_images(images: ImageFolder, height: int, width: int, *, key: str) -> Iterator[pa.Table]:
    """Yield one table per prompt with its row, as a generator of images returns it.

    Args:
        height, width: size that the images must have, in pixels.
        key: config key of the folder, for errors.

    Raises:
        EvaluationError: an image is damaged, too large, or of another size.
    """
    for index, (prompt, paths) in enumerate(zip(images.prompts, images.paths, strict=True)):
        yield pa.table(
            {
                "prompt_index": pa.array([index], pa.int64()),
                "prompt_id": [prompt_id(prompt)],
                "prompt": [prompt],
                "pixels": tensor_column(np.stack([_pixels(path, height, width, key=key) for path in paths])[None]),
            }
        )


def _pixels(path: Path, height: int, width: int, *, key: str) -> NDArray[np.uint8]:
    try:
        image = open_upright(str(path), max_bytes=MAX_PNG_BYTES, max_pixels=MAX_PNG_PIXELS)
        if image.size != (width, height):
            raise ValueError(f"has {image.width} x {image.height} pixels, not {width} x {height}; scale it")
    except ValueError as error:
        raise EvaluationError(f"`{key}` {printable(path)}: {error}") from None
    return np.asarray(image).transpose(2, 0, 1)
