"""Schemas of a run's manifests and `config.yaml`, which somebody else may have written."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import TypedDict

from cdpo_ray.config.rewards import JUDGE_NO_IMAGE, PAIRWISE, REWARDS
from cdpo_ray.errors import printable
from cdpo_ray.records import PERTURBATION
from cdpo_ray.store.paths import MANIFEST
from cdpo_ray.store.untrusted import Count, Predicted, Seconds, Timestamp, other_keys_allowed

SETTINGS = "settings.json"
"""File in the folder of an unfinished step: the settings and inputs that it was started with."""
CONFIG = "config.yaml"
"""File beside the steps: the configuration that they were made with."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def fingerprint_of(files: Mapping[str, Any]) -> str:
    """SHA-256 of the names and `describe` entries of files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


class FileFacts(TypedDict):
    bytes: Count
    sha256: Sha256


@other_keys_allowed
class FilesManifest(TypedDict):
    """Common part of the manifests of steps and checkpoints."""

    files: dict[str, FileFacts]
    fingerprint: Sha256


@other_keys_allowed
class HealthFacts(TypedDict):
    """Bound of the alarm that training ran with, the highest rise of the error, and the alarms in words."""

    max_error_rise: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    window: Count
    highest_error_rise: Annotated[float, Field(allow_inf_nan=False)] | None
    alarm: NotRequired[str]


@other_keys_allowed
class Details(TypedDict):
    predicted: NotRequired[Predicted]
    health: NotRequired[HealthFacts]
    rewards: NotRequired[dict[str, Any]]


@other_keys_allowed
class StepManifest(FilesManifest):
    """Manifest of a finished step."""

    settings: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, Count]
    warnings: list[str]
    details: Details
    versions: dict[str, str]
    machine: dict[str, str]
    seed: int
    seconds: Seconds
    created: Timestamp


class StepSettings(TypedDict):
    """Content of `SETTINGS`."""

    settings: dict[str, Any]
    inputs: dict[str, str]
    changes: NotRequired[list[str]]


@other_keys_allowed
class RewardFacts(TypedDict):
    names: Annotated[list[str], Field(min_length=1)]
    rank_by: str | None


@other_keys_allowed
class EvaluationFacts(TypedDict):
    judges: NotRequired[list[str]]
    grid_prompts: NotRequired[Annotated[int, Field(ge=0, le=10_000)]]


@other_keys_allowed
class ConfigFacts(TypedDict):
    """Keys of `config.yaml` that are used; the others are only shown."""

    rewards: RewardFacts
    evaluation: NotRequired[EvaluationFacts]
    preferences: NotRequired[dict[str, Any] | None]


def _is_consistent(manifest: FilesManifest) -> FilesManifest:
    """Check the fingerprint, which identifies the files and names their cached copy."""
    if reserved := {MANIFEST, SETTINGS} & set(manifest["files"]):
        raise ValueError(f"`files` must not name {', '.join(reserved)}")
    if manifest["fingerprint"] != fingerprint_of(manifest["files"]):
        raise ValueError("`fingerprint` is not that of `files`")
    return manifest


FILES_MANIFEST: TypeAdapter[FilesManifest] = TypeAdapter(Annotated[FilesManifest, AfterValidator(_is_consistent)])
STEP_MANIFEST: TypeAdapter[StepManifest] = TypeAdapter(Annotated[StepManifest, AfterValidator(_is_consistent)])
STEP_SETTINGS: TypeAdapter[StepSettings] = TypeAdapter(StepSettings)
CONFIG_FACTS: TypeAdapter[ConfigFacts] = TypeAdapter(ConfigFacts)


OBSOLETE_SETTINGS = {"evaluation.grid_prompts"}
"""Settings that manifests of versions up to 0.2 contain, although they decide no outcome; not compared."""


def upgraded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings of any version, with the keys of this one.

    Up to 0.2 the learning rate was constant without a warm-up, a loss had its options beside it, and a LoRA had no
    variants.
    """
    values = dict(settings)
    if "training.learning_rate" in values:
        values = {"training.schedule.warmup_updates": 0, "training.schedule.decay": "constant"} | values
    if "training.lora.rank" in values:
        values = {"training.lora.use_rslora": False, "training.lora.use_dora": False} | values
    options = {key: values.pop(f"training.{key}", None) for key in ("sft_weight", "label_smoothing")}
    loss = values.get("training.loss")
    defaults = {"sft_weight": 0.0} | ({"label_smoothing": 0.1} if loss == "robust" else {})
    if loss is None or all(options[key] in (None, value) for key, value in defaults.items()):
        return values
    del values["training.loss"]
    return values | {"training.loss.name": loss} | {f"training.loss.{key}": options[key] for key in defaults}


def contradictions(config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Differences between a configuration and the settings that a step was made with, as text; empty if none.

    Args:
        config: plain values that are valid by `CONFIG_FACTS`.
        settings: settings of the step's manifest.
    """
    stated, rewards = flat(config), config["rewards"]
    stated["rewards.rank_by"] = rewards["rank_by"] or rewards["names"][0]
    judges = [*dict.fromkeys([*rewards["names"], *config.get("evaluation", {}).get("judges", [])])]
    if "evaluation.judges" in stated:
        stated["evaluation.judges"] = [
            name for name in judges if name not in JUDGE_NO_IMAGE and stated.get(f"rewards.{name}.mode") != PAIRWISE
        ]
    # Settings of rewards that this config does not use may come from an earlier one.
    rewards_unused = [name for name in (*REWARDS, PERTURBATION) if name not in judges]
    unused = tuple(f"rewards.{name}." for name in rewards_unused)
    made = {
        key: value
        for key, value in flat(settings).items()
        if key in stated and key not in OBSOLETE_SETTINGS and not key.startswith(unused)
    }
    return "; ".join(
        f"`{printable(key)}` was {printable(value)}, the file says {printable(stated[key])}"
        for key, value in made.items()
        if value != stated[key]
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings; keys are dotted as on the command line: ``training.lora.rank``."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result
