"""Candidates of `cdpo judge`: what is tried besides the base model."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from cdpo_ray.config.model import ConfigSource
from cdpo_ray.config.rewards import RewardName
from cdpo_ray.config.section import LocalPath, Place, Section

BASE = "base"
"""Name of the candidate that is the base model, `model`."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def _checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(
            f"a name must have at most 100 letters, digits, `_`, `.` and `-`, and begin with a letter or digit, got"
            f" {name!r}; it names a folder"
        )
    return name


CandidateName = Annotated[str, AfterValidator(_checked_name)]


class CandidateModel(Section):
    """Another model of the family `model.family`, which is sampled in the same way as the base model."""

    path: LocalPath
    """A folder in diffusers layout, a hub id, or, for `stable_diffusion` and `stable_diffusion_xl`, a single
    `.safetensors` file, as `model.path`."""

    revision: str | None = None
    """Full commit (40 hex digits) of a hub id."""

    config: ConfigSource | None = None


class CandidateSection(Section):
    """A candidate: exactly one of `run`, `adapter`, `model` and `images`."""

    run: Place | None = None
    """Folder of a run with finished training, or of one of its rounds. Its base model must be that of `model`."""

    adapter: LocalPath | None = None
    """LoRA of the base model: a `.safetensors` file, or a folder with one, in the format of diffusers, kohya or peft.
    It must have one rank; it may be on any layers of the denoiser. A DoRA is refused."""

    model: CandidateModel | None = None

    images: LocalPath | None = None
    """Folder of images that were made elsewhere, of the same size as the others. It contains `metadata.jsonl`,
    `metadata.csv` or `metadata.parquet`, with one row per image and the columns `file_name` and `prompt`. Each held-out
    prompt must have `evaluation.images_per_prompt` images; other prompts are ignored. The images come from different
    noise."""

    trained_on: tuple[RewardName, ...] = ()
    """Rewards that the candidate was trained on, if known; those of a `run` are read from its folder. It is a sign of
    reward hacking if a score fell or the appearance changed while one of these rewards rose; if none is given, while
    any judge rose."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> "CandidateSection":
        kinds = ("run", "adapter", "model", "images")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        faults = []
        if len(given) != 1:
            faults.append(f"must have exactly one of {', '.join(kinds)}, got {' and '.join(given) or 'none'}")
        if self.run and self.trained_on:
            faults.append("`trained_on` must not be given with `run`, whose folder says it; leave it out")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def kind(self) -> str:
        """Key that says what the candidate is."""
        return next(kind for kind in ("run", "adapter", "model", "images") if getattr(self, kind) is not None)


class JudgeSection(Section):
    """Candidates that `cdpo judge` compares on the held-out prompts, by the judges of the evaluation. The base model is
    always a candidate, named `base`."""

    candidates: Annotated[dict[CandidateName, CandidateSection], Field(min_length=1)]
    """Candidates besides the base model, by name."""

    reference: str = BASE
    """Name of the candidate that the others are compared with."""

    @model_validator(mode="after")
    def _names_are_known(self) -> "JudgeSection":
        faults, names = [], [BASE, *self.candidates]
        if BASE in self.candidates:
            faults.append(f"`candidates.{BASE}` must have another name: {BASE!r} is the model of `model`")
        folded = [name.casefold() for name in names]
        if doubled := [name for name in self.candidates if folded.count(name.casefold()) > 1 and name != BASE]:
            faults.append(f"`candidates` must differ by more than case, because they name folders, got {doubled}")
        if self.reference not in names:
            faults.append(f"`reference` must be one of {names}, got {self.reference!r}")
        if faults:
            raise ValueError("\n".join(faults))
        return self
