"""A run's folder: a folder a step, written aside, manifest last, then put in place."""

import contextlib
import logging
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cdpo_ray.config.reading import parse_yaml
from cdpo_ray.errors import StoreError
from cdpo_ray.records import STEP_FOLDERS
from cdpo_ray.resources import usable_cpus
from cdpo_ray.store.copies import delete, find_damage, flush_and_describe, move
from cdpo_ray.store.failures import storage_errors, storage_errors_within
from cdpo_ray.store.lock import LOCK, file_lock, renewed_lock
from cdpo_ray.store.manifests import (
    CONFIG,
    CONFIG_FACTS,
    SETTINGS,
    STEP_MANIFEST,
    STEP_SETTINGS,
    contradictions,
    fingerprint_of,
    flat,
)
from cdpo_ray.store.paths import MANIFEST, exists, files_within, is_local, make_folder, write_json
from cdpo_ray.store.untrusted import damage_message, path_within, read_untrusted, read_untrusted_bytes, refuse_links_out

log = logging.getLogger(__name__)
PARTS = "parts"
"""Folder beside unfinished work from which `cdpo_ray.dataflow.parts` resumes."""
FAULTS_SHOWN = 5
SETTINGS_REMEDY = "delete the folder, restore the value, or choose another `run.name`"
VERSIONS_KEPT = (
    "cdpo_ray",
    "torch",
    "ray",
    "deepspeed",
    "diffusers",
    "transformers",
    "peft",
    "open_clip_torch",
    "numpy",
)


@dataclass
class StepOutput:
    """What a step hands to its manifest beside its files.

    Attributes:
        parts: which of its settings it is to work for: all, or those that were added to a step that grows.
    """

    parts: Sequence[str] = ()
    counts: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


class RunFolder:
    """``runs/<name>``: reads finished steps, writes one at a time.

    Args:
        foreign: it may be somebody else's, so that no step may be a symbolic link that leads out of it. In a run of
            one's own a finished step may be a link to another run's.
    """

    def __init__(self, path: Path, *, foreign: bool = False) -> None:
        self.path = path
        self._verified: dict[str, str] = {}  # folder -> fingerprint of the files that this process wrote or verified
        self.foreign = foreign

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            StoreError: the folder cannot be made or written, or another process holds it.
        """
        with file_lock(self.path) if is_local(self.path) else renewed_lock(self.path / LOCK):
            yield

    def has(self, folder: str) -> bool:
        """Whether the step is finished.

        Raises:
            StoreError: a symbolic link on the way leads out of the step, or a foreign run's step out of the run.
        """
        path = path_within(self.path, folder) if self.foreign else self.path / folder
        return exists(path_within(path, MANIFEST))

    def step(self, folder: str) -> Path:
        """The folder of a finished step.

        Raises:
            StoreError: the step has not been done, or as of `has`.
        """
        path = self.path / folder
        if not self.has(folder):
            raise StoreError(f"{path}: not there, or not finished; run the step that makes it first")
        return path

    def manifest(self, folder: str) -> dict[str, Any]:
        """What a finished step says of itself, see `manifests.StepManifest`.

        Raises:
            StoreError: the step has not been done, or its manifest is damaged.
        """
        path = self.step(folder)
        manifest: dict[str, Any] = read_untrusted(
            path / MANIFEST, STEP_MANIFEST, remedy=f"delete {path} to make it again"
        )
        return manifest

    def is_complete(
        self, folder: str, settings: Mapping[str, Any], inputs: Mapping[str, str], *, grows: bool = False
    ) -> bool:
        """Whether the step is there, whole, and made from these settings and inputs.

        Args:
            grows: it may hold more than these settings ask for, and is not complete if it holds less.

        Raises:
            StoreError: it is there but was made with other settings or inputs, or a file is missing or altered.
        """
        if not self.has(folder):
            return False
        made = self.manifest(folder)["settings"]
        there = {name: value for name, value in settings.items() if not grows or name in made}
        self.refuse_difference(folder, there, inputs, grows=grows)
        self.refuse_damage(folder)
        return len(there) == len(settings)

    def refuse_difference(
        self, folder: str, settings: Mapping[str, Any], inputs: Mapping[str, str], *, grows: bool = False
    ) -> None:
        """Compare what a finished step was made from; reads its manifest alone.

        Args:
            grows: it may hold more than these settings ask for.

        Raises:
            StoreError: the step has not been done, or was made with other settings or inputs.
        """
        path, manifest = self.path / folder, self.manifest(folder)
        made = {name: value for name, value in manifest["settings"].items() if not grows or name in settings}
        if changed := differences(made, settings):
            raise StoreError(f"{path} was made with {changed}; {SETTINGS_REMEDY}")
        for name, fingerprint in inputs.items():
            if manifest["inputs"].get(name) != fingerprint:
                raise StoreError(f"{path} was made from another {name}; delete {path} to make it again")

    def refuse_damage(
        self, folder: str, files: Sequence[str] | None = None, *, once: bool = False, read_up_to: float = math.inf
    ) -> None:
        """Read the files of a finished step and compare them with its manifest.

        Args:
            files: of the manifest, those to read; ``None``: all. Then a table that the manifest does not name is a
                fault too, for steps read every table of a folder.
            once: do nothing if this object wrote or verified the whole step before.
            read_up_to: bytes; of larger files only the size is compared.

        Raises:
            StoreError: the step has not been done, or a file is missing, altered or added.
        """
        path, manifest = self.path / folder, self.manifest(folder)
        if once and self._verified.get(folder) == manifest["fingerprint"]:
            return
        expected = manifest["files"]
        named = {path_within(path, name): expected[name] for name in files or expected}
        read = {file: entry["sha256"] for file, entry in named.items() if entry["bytes"] <= read_up_to}
        faults = find_damage(read, folder=path)
        faults |= {
            file: fault
            for file, entry in named.items()
            if file not in read and (fault := _size_fault(file, entry["bytes"]))
        }
        if files is None:
            faults |= dict.fromkeys(self._added_tables(folder, expected), "is not in the manifest")
        if faults:
            shown = [f"{file}: {fault}" for file, fault in faults.items()]
            more = f"; and {len(shown) - FAULTS_SHOWN} more" if len(shown) > FAULTS_SHOWN else ""
            raise StoreError(f"{'; '.join(shown[:FAULTS_SHOWN])}{more}; delete {path} to make it again")
        if files is None and len(read) == len(named):
            self._verified[folder] = manifest["fingerprint"]

    def config(self) -> dict[str, Any]:
        """What `config.yaml` says, as plain values; checked against what the finished steps were made with.

        Raises:
            FileNotFoundError: it is not there.
            ConfigError: it is not YAML.
            StoreError: it is no configuration, or says something else than a step was made with.
        """
        path = path_within(self.path, CONFIG)
        remedy = "`cdpo run CONFIG` with the run's configuration rewrites it"
        values = parse_yaml(read_untrusted_bytes(path, remedy=remedy).decode("utf-8", "replace"), where=str(path))
        try:
            CONFIG_FACTS.validate_python(values, strict=True)
        except ValidationError as error:
            raise StoreError(damage_message(error, where=str(path), remedy=remedy)) from None
        for folder in STEP_FOLDERS:
            if self.has(folder) and (edited := contradictions(values, self.manifest(folder)["settings"])):
                raise StoreError(f"{path}: is not the configuration that {folder} was made with: {edited}; {remedy}")
        return values

    def _added_tables(self, folder: str, expected: Mapping[str, Any]) -> list[Path]:
        if exists(self.path / f"{folder}.partial"):  # files that are being added, whose manifest is still to come
            return []
        return [
            path
            for name, path in files_within(self.path / folder).items()
            if name.endswith(".parquet") and name not in expected and not name.startswith(f"{PARTS}/")
        ]

    def fingerprint(self, folder: str, files: Sequence[str] | None = None) -> str:
        """What tells a finished step's files, or some of them, from others of the same names.

        Raises:
            StoreError: the step has not been done, or has no such file.
        """
        manifest = self.manifest(folder)
        if files is None:
            return str(manifest["fingerprint"])
        if missing := [name for name in files if name not in manifest["files"]]:
            raise StoreError(f"{self.path / folder}: has no {', '.join(missing)}; run the step that makes it first")
        return fingerprint_of({name: manifest["files"][name] for name in files})

    @contextlib.contextmanager
    def writing(
        self,
        folder: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        *,
        seed: int,
        resumable: bool,
        grows: bool = False,
        allow_change: bool = False,
        scratch: Sequence[str] = (),
    ) -> Iterator[tuple[Path, StepOutput]]:
        """Write a step aside; when the block ends well, describe every file in the manifest and put it in place.

        In an object store, which cannot rename, it is written in place: it counts once the manifest is there. What an
        earlier attempt left is thrown away, unless the step is ``resumable`` and was begun alike. What is written of a
        finished step that ``grows`` joins its files, none of which may change.

        Args:
            allow_change: go on with what was begun with other settings; the manifest tells the difference.
            scratch: names of folders in it that an interrupted step is resumed from; they are no part of the step, and
                are deleted only once it is in place.

        Raises:
            StoreError: a folder without manifest is in its place, it was begun with other settings or inputs, or the
                disk or the store fails.
        """
        place = path_within(self.path, folder)
        finished = self.manifest(folder) if grows and self.has(folder) else None
        aside = place if not is_local(place) and not finished else path_within(self.path, f"{folder}.partial")
        if not finished and exists(place) and (aside != place or not exists(place / SETTINGS)):
            raise StoreError(f"{place}: is there without its {MANIFEST}; delete it to make it again")
        begun_with: dict[str, Any] = {"settings": dict(settings), "inputs": dict(inputs)}
        changes: list[str] = []
        if exists(aside):
            if resumable and exists(aside / SETTINGS):
                refuse_links_out(aside, self.path)
                changes = _changes_since(aside, begun_with, allow_change=allow_change)
            else:
                delete(aside)
        with storage_errors_within(aside):
            make_folder(aside)
            write_json(aside / SETTINGS, begun_with | {"changes": changes})
            started = time.monotonic()
            output = StepOutput(parts=[name for name in settings if not finished or name not in finished["settings"]])
            yield aside.absolute(), output  # workers have folders of their own to be in
            files = {name: flush_and_describe(path) for name, path in _products(aside, scratch).items()}
            manifest = {
                "step": folder,
                **begun_with,
                "files": files,
                "fingerprint": fingerprint_of(files),
                "counts": output.counts,
                "warnings": output.warnings,
                "details": output.details | ({"settings_changed": changes} if changes else {}),
                "versions": {name: metadata.version(name) for name in VERSIONS_KEPT},
                "machine": {
                    "system": platform.platform(),
                    "python": platform.python_version(),
                    "cpus": str(usable_cpus()),
                },
                "seed": seed,
                "seconds": round(time.monotonic() - started, 2),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            if finished:
                self._add(folder, aside, finished, manifest)
                return
            write_json(aside / MANIFEST, manifest)
            if aside != place:
                with storage_errors(place):
                    aside.rename(place)
            self._verified[folder] = manifest["fingerprint"]
        self.delete_leftovers(folder, scratch)

    def delete_leftovers(self, folder: str, scratch: Sequence[str]) -> None:
        """Delete what a finished step was written with and no longer needs; also after a kill in the midst of that.

        A failure is only logged: the step is complete, and the next run tries again.

        Args:
            scratch: as `writing` was given.
        """
        try:
            delete(self.path / f"{folder}.partial")  # of files that were added, which the manifest names by now
            if exists(self.path / folder / SETTINGS):
                for name in (*scratch, PARTS, SETTINGS):  # the settings last: they tell that there may be more
                    delete(self.path / folder / name)
        except StoreError as error:
            log.warning("%s; the step is complete, only leftovers remain", error)

    def _add(self, folder: str, aside: Path, finished: dict[str, Any], added: dict[str, Any]) -> None:
        """Move files into a finished step; they count once the manifest, written last, names them."""
        assert not set(added["files"]) & set(finished["files"]), "a file of a finished step never changes"
        for name in added["files"]:
            move(aside / name, self.path / folder / name)
        whole = finished | {key: finished[key] | added[key] for key in ("settings", "files", "details")}
        whole["fingerprint"] = fingerprint_of(whole["files"])
        whole["warnings"] = finished["warnings"] + added["warnings"]
        counts, more = finished["counts"], added["counts"]
        whole["counts"] = {name: counts.get(name, 0) + more.get(name, 0) for name in counts | more}
        whole["seconds"] = finished["seconds"] + added["seconds"]
        write_json(self.path / folder / MANIFEST, whole)
        self._verified.pop(folder, None)
        delete(aside)


def _size_fault(file: Path, num_bytes: int) -> str | None:
    if not exists(file):
        return "is missing"
    return None if file.stat().st_size == num_bytes else "was altered (its size differs)"


def _products(aside: Path, scratch: Sequence[str]) -> dict[str, Path]:
    """What the step made, once what a broken-off write left is gone."""
    others = {SETTINGS, MANIFEST, PARTS, *scratch}
    found = {name: path for name, path in files_within(aside).items() if name.partition("/")[0] not in others}
    for name in [name for name in found if name.endswith(".tmp")]:
        delete(found.pop(name))
    return found


def _changes_since(aside: Path, now: Mapping[str, Any], *, allow_change: bool) -> list[str]:
    """What changed, each time that a step was gone on with, since it was begun."""
    begun = read_untrusted(aside / SETTINGS, STEP_SETTINGS, remedy=f"delete {aside} to start over")
    if begun["inputs"] != now["inputs"]:
        raise StoreError(f"{aside} was begun from other inputs; delete it to start over")
    changes: list[str] = begun.get("changes", [])
    changed = differences(begun["settings"], now["settings"])
    if changed and not allow_change:
        raise StoreError(f"{aside} was begun with {changed}; {SETTINGS_REMEDY}")
    return [*changes, changed] if changed else changes


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between the settings that something was made with and those of a config; empty if nothing does."""
    before, after = flat(then), flat(now)
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    return "; ".join(f"`{key}` = {before.get(key)}, config says {after.get(key)}" for key in changed)
