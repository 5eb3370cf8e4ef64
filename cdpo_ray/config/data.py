"""Training data: prompts whose images are generated, or a preference data set."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cdpo_ray.config.benchmarks import BENCHMARKS
from cdpo_ray.config.section import COMMIT, HUB_ID, WHERE_COMMITS_ARE, LocalPath, Section

PreferenceFormat = Literal[
    "pickapic", "pairs", "winner", "hpdv2", "hpdv3", "image_list", "imagerewarddb", "ranked_folders"
]
RANKINGS = ("hpdv2", "image_list", "imagerewarddb", "ranked_folders")
"""Formats whose rows may have more than two images."""


class PromptSource(Section):
    """Where prompts come from: a built-in set, a benchmark, a file, or a `file` of a hub data set at a `revision`."""

    source: LocalPath | None = None
    """Built-in set, benchmark, path of a file, or hub id of a data set. Built-in: `scenes` (of the embedded world),
    `animals` (the paper's 45 animals x 3 activities), `animal_photos` ("a photo of a ..."). Benchmarks, which are
    downloaded from the hub: `drawbench`, `parti`, `hpdv2`, `geneval2`, `pickapic_test`. Files: `.txt` (one prompt per
    line), `.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`."""

    path: LocalPath | None = None
    """Local copy of a benchmark's file, used instead of the hub; for `hpdv2`, the folder that holds its four files."""

    file: str | None = None
    """Path of the file within the hub data set."""

    revision: str | None = None
    """Full commit (40 hex digits) of the hub data set, so that its prompts cannot change. Benchmarks have a default if
    their commit is known."""

    column: str = "prompt"
    """Column of a table that holds the prompts; benchmarks have their own defaults."""

    category_column: str | None = None
    """Column of a table that holds the prompts' categories, by which the report breaks down the results; `null`: the
    benchmark's column, or `category` if the file has it."""

    count: Annotated[int, Field(ge=1)] | None = None
    """Number of prompts, taken from the start; `null`: all prompts, or 128 for `scenes`."""

    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training source to use, instead of `source`; only for `heldout` and `validation`. A hash of the
    prompt's words decides, so a prompt stays in its set when the file grows."""

    @model_validator(mode="before")
    @classmethod
    def _benchmark_has_defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("source") not in BENCHMARKS:
            return given
        benchmark = BENCHMARKS[given["source"]]
        defaults = {"column": benchmark.column, "category_column": benchmark.category_column}
        if given.get("path") is None:
            defaults["revision"] = benchmark.revision
        return given | {key: value for key, value in defaults.items() if given.get(key) is None}

    @model_validator(mode="after")
    def _hub_file_is_pinned(self) -> "PromptSource":
        if benchmark := BENCHMARKS.get(self.source or ""):
            if self.file is not None or (self.path is not None and self.revision is not None):
                raise ValueError(f"`{self.source}` takes either `path` or `revision`, and no `file`")
            if self.path is None and (self.revision is None or not COMMIT.match(self.revision)):
                copy = f", or set `path` to a copy of {Path(benchmark.files[0]).name}"
                raise ValueError(
                    f"`revision` must be a commit of 40 hex digits of the data set {benchmark.hub_id}, got"
                    f" {self.revision!r}; {WHERE_COMMITS_ARE}{copy}{benchmark.original and f' ({benchmark.original})'}"
                )
            return self
        if self.path is not None:
            raise ValueError(
                f"`path` is for benchmarks ({', '.join(BENCHMARKS)}); the path of any other file is `source`, which is"
                f" {self.source!r}"
            )
        if self.file is None and self.revision is None:
            return self
        if self.source is None or not HUB_ID.match(self.source):
            raise ValueError(
                f"`file` and `revision` belong to a hub data set, but `source` is not a hub id: {self.source!r}"
            )
        if self.file is None or ".." in Path(self.file).parts:
            raise ValueError(f"`file` must name a file within the hub data set, got {self.file!r}")
        if self.revision is None or not COMMIT.match(self.revision):
            raise ValueError(f"`revision` must be a commit of 40 hex digits for a hub id, got {self.revision!r}")
        return self


class PromptsSection(Section):
    """Prompts for training, evaluation and search. No prompt may be in more than one of these sets."""

    train: PromptSource | None = None
    """Prompts whose generated images are used in training. Required unless `preferences` is given, which replaces
    it."""

    heldout: PromptSource
    """Prompts for the final comparison of base and fine-tuned model; never trained on."""

    validation: PromptSource | None = None
    """Prompts on which a search judges its trials; required with `search`. Separate from `heldout`, because a schedule
    cannot be judged on the prompts that were used to choose it."""

    @model_validator(mode="after")
    def _sources_are_given(self) -> "PromptsSection":
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
    """A preference data set to train on, instead of generated images; see `docs/guides/preferences.md`."""

    path: LocalPath
    """A file, a folder with all its files, or a pattern such as `data/**/train-*.parquet`; for `ranked_folders`, the
    parent folder. Files: Parquet, Arrow (folders written by `save_to_disk` of `datasets`), `.jsonl`, `.json`, `.csv`,
    `.tsv` (text files also as `.gz`), and WebDataset `.tar`."""

    format: PreferenceFormat
    """Columns of the files. `pickapic`: `caption`, `jpg_0`, `jpg_1`, `label_0`, `label_1`. `pairs`: `prompt`, `chosen`,
    `rejected`. `winner`: `prompt`, `image_a`, `image_b`, `winner`. `hpdv2`: lists `image_path` and `human_preference`.
    `hpdv3`: `path1` (preferred), `path2`. `image_list`: lists `images` and `ratings` or `ranks`. `imagerewarddb`: one
    image per row, with `prompt_id`, `rank`. `ranked_folders`: one folder per prompt, with `prompt.txt` and images whose
    names start with their rank; 0 is best. Higher labels and ratings, and lower ranks, are better."""

    columns: Annotated[dict[str, str], Field(default_factory=dict)]
    """Mapping from the format's column names to those in the files, where they differ."""

    difficulty: Literal["label", "score", "rank"] = "label"
    """What orders pairs from easy to hard. `label`: the score gap of the ranking reward; pairs whose label contradicts
    the reward are left out. `score`, `rank`: the files' own columns, with `rewards.names: [preference]`."""

    max_image_bytes: Annotated[int, Field(ge=1)] = 50_000_000
    """Maximum file size of an image in bytes, checked before decoding; larger images are quarantined."""

    max_image_pixels: Annotated[int, Field(ge=1)] = 50_000_000
    """Maximum width x height that an image's header may declare, checked before decoding; larger images are
    quarantined."""

    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Maximum share of rows that cannot be used; above it, the import fails. Ties and unlabelled rows do not count."""

    @model_validator(mode="after")
    def _columns_are_known(self) -> "PreferencesSection":
        if self.format == "ranked_folders" and (self.columns or self.difficulty != "label"):
            raise ValueError("`columns` and `difficulty` belong to tables; folders are ranked by their images' names")
        return self

    @property
    def has_pairs_only(self) -> bool:
        """Whether every row has two images, whose rank gap is 1."""
        return self.format not in RANKINGS
