"""A run's folder, with one folder per step: written to a temporary folder, manifest last, then renamed."""

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
from cdpo_ray.records import SAMPLES, STEP_FOLDERS
from cdpo_ray.resources import usable_cpus
from cdpo_ray.store.copies import delete, find_damage, flush_and_describe, move
from cdpo_ray.store.failures import storage_errors, storage_errors_within
from cdpo_ray.store.lock import LOCK, file_lock, renewed_lock
from cdpo_ray.store.manifests import (
    CONFIG,
    CONFIG_FACTS,
    OBSOLETE_SETTINGS,
    SETTINGS,
    STEP_MANIFEST,
    STEP_SETTINGS,
    contradictions,
    fingerprint_of,
    flat,
    upgraded,
)
from cdpo_ray.store.paths import MANIFEST, exists, files_within, is_local, make_folder, write_json
from cdpo_ray.store.untrusted import (
    damage_message,
    path_within,
    paths_within,
    read_untrusted,
    read_untrusted_bytes,
    refuse_links_out,
)
from cdpo_ray.version import __version__

log = logging.getLogger(__name__)
PARTS = "parts"
"""Folder within an unfinished step from which `cdpo_ray.dataflow.parts` resumes."""
FAULTS_SHOWN = 5
SETTINGS_REMEDY = "delete the folder, restore the value, or choose another `run.name`"
VERSIONS_KEPT = (
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
    """What a step adds to its manifest besides its files.

    Attributes:
        parts: names of the settings to work on: all, or those added to a finished step that ``grows``.
        counts: numbers by name, such as of prompts or images.
        warnings: sentences for the user.
        details: further JSON values by name.
    """

    parts: Sequence[str] = ()
    counts: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


class RunFolder:
    """Folder ``runs/<name>``: reads finished steps and writes one step at a time.

    Args:
        foreign: the run may be somebody else's; a step must not be a symbolic link that leads out of it. In one's own
            run, a finished step may be a link to another run's step.
    """

    def __init__(self, path: Path, *, foreign: bool = False) -> None:
        self.path = path
        self._verified: dict[str, str] = {}  # folder -> fingerprint of the files that this process wrote or verified
        self.foreign = foreign

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process.

        Raises:
            StoreError: the folder cannot be created or written, or another process holds the lock.
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
        """Folder of a finished step.

        Raises:
            StoreError: the step is not finished; and as `has`.
        """
        path = self.path / folder
        if not self.has(folder):
            raise StoreError(f"{path}: is missing or not finished; run the step that makes it first")
        return path

    def manifest(self, folder: str) -> dict[str, Any]:
        """Manifest of a finished step, see `manifests.StepManifest`.

        Raises:
            StoreError: the step is not finished, or its manifest is damaged.
        """
        path = self.step(folder)
        manifest: dict[str, Any] = read_untrusted(
            path / MANIFEST, STEP_MANIFEST, remedy=f"delete {path} to regenerate it"
        )
        return manifest

    def is_complete(
        self, folder: str, settings: Mapping[str, Any], inputs: Mapping[str, str], *, grows: bool = False
    ) -> bool:
        """Whether the step is finished, undamaged, and made from these settings and inputs.

        Args:
            settings: everything that decides the step's outcome.
            inputs: fingerprints of earlier steps, by name.
            grows: the step may hold more than these settings require, and is incomplete if it holds less.

        Raises:
            StoreError: the step was made with other settings or inputs, or a file is missing or altered.
        """
        if not self.has(folder):
            return False
        made = self.manifest(folder)["settings"]
        present = {name: value for name, value in settings.items() if not grows or name in made}
        self.refuse_difference(folder, present, inputs, grows=grows)
        self.refuse_damage(folder)
        return len(present) == len(settings)

    def refuse_difference(
        self, folder: str, settings: Mapping[str, Any], inputs: Mapping[str, str], *, grows: bool = False
    ) -> None:
        """Compare the settings and inputs that a finished step was made with; reads only its manifest.

        Args:
            settings, inputs: see `is_complete`.
            grows: the step may hold more than these settings require.

        Raises:
            StoreError: the step is not finished, or was made with other settings or inputs.
        """
        path, manifest = self.path / folder, self.manifest(folder)
        made = {name: value for name, value in manifest["settings"].items() if not grows or name in settings}
        if changed := differences(made, settings):
            raise StoreError(f"{path} was made with {changed}; {SETTINGS_REMEDY}{self._samples_remedy(folder)}")
        for name, fingerprint in inputs.items():
            if manifest["inputs"].get(name) != fingerprint:
                raise StoreError(f"{path} was made from another {name}; delete {path} to regenerate it")

    def refuse_other_attempt(self, folder: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Compare the settings and inputs that an interrupted attempt of a resumable step was started with.

        Raises:
            StoreError: it was started with other settings or inputs, as `writing` would find.
        """
        partial = self._unfinished(folder)
        if exists(partial / SETTINGS):
            self._changes_since(partial, {"settings": settings, "inputs": inputs}, folder, allow_change=False)

    def _unfinished(self, folder: str) -> Path:
        """Folder that an unfinished step is written into."""
        return path_within(self.path, f"{folder}.partial") if is_local(self.path) else path_within(self.path, folder)

    def _samples_remedy(self, folder: str) -> str:
        """How to try other settings of a step after generation without generating again."""
        return "" if folder == SAMPLES else f", where `run.samples_from={self.path}` reuses the images of this run"

    def refuse_damage(
        self, folder: str, files: Sequence[str] | None = None, *, once: bool = False, read_up_to: float = math.inf
    ) -> None:
        """Read the files of a finished step and compare them with its manifest.

        Args:
            files: names in the manifest of the files to read; ``None``: all, and a table that the manifest does not
                name is a fault too, because steps read every table of a folder.
            once: do nothing if this object has written or verified the whole step before.
            read_up_to: size limit in bytes; of larger files only the size is compared.

        Raises:
            StoreError: the step is not finished, or a file is missing, altered or added.
        """
        path, manifest = self.path / folder, self.manifest(folder)
        if once and self._verified.get(folder) == manifest["fingerprint"]:
            return
        expected = manifest["files"]
        named = {file: expected[name] for name, file in paths_within(path, files or expected).items()}
        num_bytes = {file: entry["bytes"] for file, entry in named.items()}
        sha256 = {file: entry["sha256"] for file, entry in named.items()}
        faults = find_damage(sha256, folder=path, num_bytes=num_bytes, read_up_to=read_up_to)
        if files is None:
            faults |= dict.fromkeys(self._added_tables(folder, expected), "is not in the manifest")
        if faults:
            shown = [f"{file}: {fault}" for file, fault in faults.items()]
            more = f"; and {len(shown) - FAULTS_SHOWN} more" if len(shown) > FAULTS_SHOWN else ""
            raise StoreError(f"{'; '.join(shown[:FAULTS_SHOWN])}{more}; delete {path} to regenerate it")
        if files is None and max(num_bytes.values(), default=0) <= read_up_to:
            self._verified[folder] = manifest["fingerprint"]

    def config(self) -> dict[str, Any]:
        """Values of `config.yaml`, checked against the settings of the finished steps.

        Raises:
            FileNotFoundError: there is no such file.
            ConfigError: the file is not YAML.
            StoreError: the file is not a configuration, or contradicts the settings of a finished step.
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
        if exists(self.path / f"{folder}.partial"):  # files are being added; their manifest is written last
            return []
        return [
            path
            for name, path in files_within(self.path / folder).items()
            if name.endswith(".parquet") and name not in expected and not name.startswith(f"{PARTS}/")
        ]

    def fingerprint(self, folder: str, files: Sequence[str] | None = None) -> str:
        """Fingerprint of a finished step's files, or of some of them.

        Raises:
            StoreError: the step is not finished, or has no such file.
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
        """Context manager that yields a temporary folder to write a step into, and commits it if the block succeeds.

        A commit writes the manifest, which describes every file, and renames the folder. Object stores cannot rename:
        there the step is written in place and counts once its manifest exists. Files of an earlier attempt are deleted,
        unless the step is ``resumable`` and has the same settings and inputs. Files written for a finished step that
        ``grows`` are added to it; its existing files never change.

        Args:
            settings, inputs: see `is_complete`; recorded in the manifest.
            seed: seed of the run, recorded in the manifest.
            resumable: whether an interrupted attempt can be resumed.
            grows: whether files may be added to the finished step.
            allow_change: resume an attempt that has other settings; the manifest records the difference.
            scratch: names of folders that an interrupted step is resumed from; they are not part of the step and are
                deleted after the commit.

        Yields:
            Absolute path of the folder to write into, and the `StepOutput` to fill in.

        Raises:
            StoreError: the step's folder exists without a manifest, an interrupted attempt has other settings or
                inputs, or the storage fails.
        """
        final = path_within(self.path, folder)
        finished = self.manifest(folder) if grows and self.has(folder) else None
        partial = self._unfinished(folder) if not finished else path_within(self.path, f"{folder}.partial")
        if not finished and exists(final) and (partial != final or not exists(final / SETTINGS)):
            raise StoreError(f"{final}: has no {MANIFEST}; delete the folder to regenerate it")
        made_from: dict[str, Any] = {"settings": dict(settings), "inputs": dict(inputs)}
        changes: list[str] = []
        if exists(partial):
            if resumable and exists(partial / SETTINGS):
                refuse_links_out(partial, self.path)
                changes = self._changes_since(partial, made_from, folder, allow_change=allow_change)
            else:
                delete(partial)
        with storage_errors_within(partial):
            make_folder(partial)
            write_json(partial / SETTINGS, made_from | {"changes": changes})
            started = time.monotonic()
            output = StepOutput(parts=[name for name in settings if not finished or name not in finished["settings"]])
            yield partial.absolute(), output  # workers have other working folders
            files = flush_and_describe(_products(partial, scratch), folder=partial)
            manifest = {
                "step": folder,
                **made_from,
                "files": files,
                "fingerprint": fingerprint_of(files),
                "counts": output.counts,
                "warnings": output.warnings,
                "details": output.details | ({"settings_changed": changes} if changes else {}),
                "versions": {"cdpo_ray": __version__, **{name: metadata.version(name) for name in VERSIONS_KEPT}},
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
                self._add(folder, partial, finished, manifest)
                return
            write_json(partial / MANIFEST, manifest)
            if partial != final:
                with storage_errors(final):
                    partial.rename(final)
            self._verified[folder] = manifest["fingerprint"]
        self.delete_leftovers(folder, scratch)

    def _changes_since(self, partial: Path, now: Mapping[str, Any], folder: str, *, allow_change: bool) -> list[str]:
        """Changes of the settings at each resume of an unfinished step."""
        started = read_untrusted(partial / SETTINGS, STEP_SETTINGS, remedy=f"delete {partial} to start over")
        if started["inputs"] != now["inputs"]:
            raise StoreError(f"{partial} was started with other inputs; delete it to start over")
        changes: list[str] = started.get("changes", [])
        changed = differences(started["settings"], now["settings"])
        if changed and not allow_change:
            raise StoreError(f"{partial} was started with {changed}; {SETTINGS_REMEDY}{self._samples_remedy(folder)}")
        return [*changes, changed] if changed else changes

    def delete_leftovers(self, folder: str, scratch: Sequence[str]) -> None:
        """Delete files that a finished step no longer needs, including those that an earlier, killed call left.

        A failure is only logged: the step is complete, and the next run tries again.

        Args:
            scratch: see `writing`.
        """
        try:
            delete(self.path / f"{folder}.partial")  # of added files, which the manifest names by now
            if exists(self.path / folder / SETTINGS):
                for name in (*scratch, PARTS, SETTINGS):  # the settings last: they mark that leftovers may exist
                    delete(self.path / folder / name)
        except StoreError as error:
            log.warning("%s; the step is complete, only leftovers remain", error)

    def _add(self, folder: str, partial: Path, finished: dict[str, Any], added: dict[str, Any]) -> None:
        """Move files into a finished step; they count once the manifest, written last, names them."""
        assert not set(added["files"]) & set(finished["files"]), "a file of a finished step never changes"
        for name in added["files"]:
            move(partial / name, self.path / folder / name)
        whole = finished | {key: finished[key] | added[key] for key in ("settings", "files", "details")}
        whole["fingerprint"] = fingerprint_of(whole["files"])
        whole["warnings"] = finished["warnings"] + added["warnings"]
        counts, more = finished["counts"], added["counts"]
        whole["counts"] = {name: counts.get(name, 0) + more.get(name, 0) for name in counts | more}
        whole["seconds"] = finished["seconds"] + added["seconds"]
        write_json(self.path / folder / MANIFEST, whole)
        self._verified.pop(folder, None)
        delete(partial)


def _products(partial: Path, scratch: Sequence[str]) -> dict[str, Path]:
    """Files that the step made; temporary files of an interrupted write are deleted."""
    others = {SETTINGS, MANIFEST, PARTS, *scratch}
    found = {name: path for name, path in files_within(partial).items() if name.partition("/")[0] not in others}
    for name in [name for name in found if name.endswith(".tmp")]:
        delete(found.pop(name))
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Differences between recorded settings and those of a config, as text; empty if there are none."""
    before, after = upgraded(flat(then)), flat(now)
    keys = sorted({*before, *after} - (OBSOLETE_SETTINGS - {*after}))
    changed = [key for key in keys if before.get(key) != after.get(key)]
    return "; ".join(f"`{key}` = {before.get(key)}, config says {after.get(key)}" for key in changed)
