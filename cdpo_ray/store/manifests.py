"""What a manifest must be: it lies in a folder that somebody else may have made."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import TypedDict

from cdpo_ray.store.places import MANIFEST
from cdpo_ray.store.untrusted import Count, Predicted, Seconds, Timestamp, other_keys_allowed

SETTINGS = "settings.json"
"""Beside unfinished work: what it was begun with."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def fingerprint_of(files: Mapping[str, Any]) -> str:
    """What tells these files, as `describe` does each, from others."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


class FileFacts(TypedDict):
    bytes: Count
    sha256: Sha256


@other_keys_allowed
class FilesManifest(TypedDict):
    """What every manifest has: of a step, or of a checkpoint."""

    files: dict[str, FileFacts]
    fingerprint: Sha256


@other_keys_allowed
class Details(TypedDict):
    predicted: NotRequired[Predicted]


@other_keys_allowed
class StepManifest(FilesManifest):
    """Of a finished step."""

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


class BegunWith(TypedDict):
    """Content of `SETTINGS`."""

    settings: dict[str, Any]
    inputs: dict[str, str]
    changes: NotRequired[list[str]]


def _is_consistent(manifest: FilesManifest) -> FilesManifest:
    """The fingerprint names a cached copy and stands for the files: a false one would pass them off as others."""
    if reserved := {MANIFEST, SETTINGS} & set(manifest["files"]):
        raise ValueError(f"`files` must not name {', '.join(reserved)}")
    if manifest["fingerprint"] != fingerprint_of(manifest["files"]):
        raise ValueError("`fingerprint` is not that of `files`")
    return manifest


FILES_MANIFEST: TypeAdapter[FilesManifest] = TypeAdapter(Annotated[FilesManifest, AfterValidator(_is_consistent)])
STEP_MANIFEST: TypeAdapter[StepManifest] = TypeAdapter(Annotated[StepManifest, AfterValidator(_is_consistent)])
BEGUN_WITH: TypeAdapter[BegunWith] = TypeAdapter(BegunWith)
