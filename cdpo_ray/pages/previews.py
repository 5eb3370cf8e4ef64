"""Preview images of a training -> rows of prompts, columns of stages, for a page."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from cdpo_ray.pages.page import inline_png
from cdpo_ray.records import PREVIEW_PROMPTS, PREVIEWS, preview_file
from cdpo_ray.store import files_within, path_within, read_untrusted
from cdpo_ray.store.untrusted import read_untrusted_bytes

MAX_COLUMNS = 7
"""Number of columns shown, the base model's included; of more stages, evenly spaced ones."""
RUN_AGAIN = "delete the folder of the step and run `cdpo run CONFIG` to regenerate it"
_PROMPTS = TypeAdapter(Annotated[list[str], Field(max_length=100)])


@dataclass(frozen=True)
class PreviewRow:
    """A prompt and its images as `inline_png`, with their ``name``; without those that were not sampled."""

    prompt: str
    images: list[dict[str, Any]]


def preview_rows(training_dir: Path) -> list[PreviewRow]:
    """One row per preview prompt, from the base model's image to that of the last stage; empty without previews.

    Args:
        training_dir: finished or unfinished folder of `4-training`.

    Raises:
        StoreError: a file is damaged.
    """
    try:
        prompts = read_untrusted(path_within(training_dir, PREVIEW_PROMPTS), _PROMPTS, remedy=RUN_AGAIN)
    except FileNotFoundError:
        return []
    files = files_within(training_dir / PREVIEWS)
    found = {int(match[1]) for name in files if (match := re.match(r"stage-(\d{1,6})/", name))}
    rows = []
    for prompt in prompts:
        images = []
        for stage in spread(sorted(found), MAX_COLUMNS):
            path = path_within(training_dir, preview_file(stage, prompt))
            if str(path.relative_to(training_dir / PREVIEWS)) in files:
                png = read_untrusted_bytes(path, remedy=RUN_AGAIN)
                name = f"after stage {stage}" if stage else "base model"
                images.append(inline_png(png, str(path)) | {"name": name})
        rows.append(PreviewRow(prompt, images))
    return rows


def spread(values: list[int], count: int) -> list[int]:
    """At most ``count`` of the values, 2 or more, evenly spaced, with the first and the last."""
    if len(values) <= count:
        return values
    return [values[round(place * (len(values) - 1) / (count - 1))] for place in range(count)]
