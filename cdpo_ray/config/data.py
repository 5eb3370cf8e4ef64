"""What is trained on: prompts whose images are generated, or preferences that people have."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cdpo_ray.config.section import COMMIT, HUB_ID, LocalPath, Section


class PromptSource(Section):
    """A built-in set, a file by its ending, or a ``file`` of a hub data set at its ``revision``.

    Built-in are `scenes`, `animals` and `animal_photos`. Files are text with one prompt a line, a JSON list, or CSV,
    TSV, JSON, JSONL and Parquet with a ``column`` of prompts.
    """

    source: LocalPath | None = None
    file: str | None = None
    revision: str | None = None
    column: str = "prompt"
    count: Annotated[int, Field(ge=1)] | None = None
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _hub_file_is_pinned(self) -> "PromptSource":
        if self.file is None and self.revision is None:
            return self
        if self.source is None or not HUB_ID.match(self.source):
            raise ValueError(f"`file` and `revision` are of a hub data set, but `source` is no hub id: {self.source!r}")
        if self.file is None or ".." in Path(self.file).parts:
            raise ValueError(f"`file` must name a file within the hub data set, got {self.file!r}")
        if self.revision is None or not COMMIT.match(self.revision):
            raise ValueError(f"`revision` must be a commit of 40 hex digits for a hub id, got {self.revision!r}")
        return self


class PromptsSection(Section):
    """What is trained on, what an evaluation judges, and what a search judges its trials by, each apart."""

    train: PromptSource | None = None
    heldout: PromptSource
    validation: PromptSource | None = None

    @model_validator(mode="after")
    def _sides_are_named(self) -> "PromptsSection":
        if self.train and self.train.source is None:
            raise ValueError("`train.source` must name a prompt set, a file or a hub data set")
        if self.train and self.train.fraction is not None:
            raise ValueError("`fraction` belongs to `heldout` and `validation`: their share of the training source")
        if (self.heldout.source is None) == (self.heldout.fraction is None):
            raise ValueError("`heldout` must have either `source` or `fraction` (of the training source)")
        if self.validation:
            if (self.validation.source is None) == (self.validation.fraction is None):
                raise ValueError("`validation` must have either `source` or `fraction` (of the training source)")
            taken = (self.heldout.fraction or 0) + (self.validation.fraction or 0)
            if taken >= 1:
                raise ValueError(
                    f"`fraction` of `heldout` and `validation` must be below 1 together, got {taken:g}, which leaves"
                    " nothing to train on"
                )
        return self


class PreferencesSection(Section):
    """Preferences that people have, trained on in place of generated images; see `preferences/files.py` for formats."""

    path: LocalPath
    format: Literal["pickapic", "pairs", "ranked_folders"]
    columns: Annotated[dict[str, str], Field(default_factory=dict)]
    difficulty: Literal["label", "score", "rank"] = "label"
    max_image_bytes: Annotated[int, Field(ge=1)] = 50_000_000
    max_image_pixels: Annotated[int, Field(ge=1)] = 50_000_000
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01

    @model_validator(mode="after")
    def _columns_are_known(self) -> "PreferencesSection":
        if self.format == "ranked_folders" and (self.columns or self.difficulty != "label"):
            raise ValueError("`columns` and `difficulty` belong to tables; folders are ranked by their images' names")
        return self
