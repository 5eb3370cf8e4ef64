"""Training's state <-> commits: folders that hold all of it, a share a worker, each whole or not counted."""

import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from cdpo_ray.errors import StoreError, TrainingError
from cdpo_ray.store import (
    FILES_MANIFEST,
    MANIFEST,
    copy,
    delete,
    describe,
    exists,
    files_within,
    fingerprint_of,
    is_local,
    local_copy,
    make_folder,
    path_within,
    read_json,
    read_untrusted,
    refuse_full_disk,
    storage_errors_within,
    write_json,
)

log = logging.getLogger(__name__)

STATE = "state.json"
MESSAGE_BYTES = 4096


class Commits:
    """The commits of one training, ``update-000050`` and so on; all workers use theirs together.

    A commit does not depend on the number of workers or on ZeRO: any other number takes it up.

    Args:
        folder: local and seen by all workers, or in an object store.
        keep_last: so many stay, the older ones are deleted.
        device: that messages between workers travel on.
    """

    def __init__(self, folder: Path, *, keep_last: int, device: torch.device) -> None:
        self.folder, self.keep_last, self.device = folder, keep_last, device
        self.worker_rank, self.num_workers = dist.get_rank(), dist.get_world_size()

    def write(self, num_updates: int, state: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write one: every worker its share of the tensors, then the manifest, then all is put in place.

        Args:
            num_updates: done so far; the commit's name.
            state: JSON of what is not a tensor.
            tensors: by name, the same on all workers.

        Raises:
            StoreError: a worker could not write, on all of them; the commits before stay.
        """
        name = f"update-{num_updates:06d}"
        # In an object store a file is there whole or not at all, so only the manifest comes last.
        aside = self.folder / (f"{name}.tmp" if is_local(self.folder) else name)
        mine = {
            key: value.detach().cpu().contiguous()
            for number, (key, value) in enumerate(tensors)
            if number % self.num_workers == self.worker_rank
        }
        self._together(lambda: self._begin(aside))
        written = self._together(lambda: self._write_share(aside, mine))
        self._together(lambda: self._put_in_place(aside, name, num_updates, state, written))

    def newest(self, tell: Callable[[str], Any]) -> Path | None:
        """The newest commit that is whole, by its manifest alone, for all workers; none if there is no commit.

        Args:
            tell: given a line for each that is passed over, on the first worker.

        Raises:
            TrainingError: there are commits, and all of them are damaged: never a silent fresh start.
        """
        chosen, faults = newest_of(self.folder) if self.worker_rank == 0 else (None, [])
        for fault in faults:
            tell(f"{fault}; going on from {chosen.name}" if chosen else fault)
        damaged = {"damaged": "; ".join(faults)[: MESSAGE_BYTES // 4]} if faults else {}
        answer = {"chosen": chosen.name} if chosen else damaged
        answer = json.loads(self._exchange(json.dumps(answer))[0])
        if "damaged" in answer:
            raise TrainingError(f"{answer['damaged']}; no commit is whole: delete {self.folder.parent} to start over")
        return self.folder / answer["chosen"] if answer else None

    def _begin(self, aside: Path) -> None:
        if self.worker_rank == 0:
            delete(aside)
            make_folder(aside)

    def _write_share(self, aside: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        name = f"share-{self.worker_rank}-of-{self.num_workers}.safetensors"
        num_bytes = sum(value.nbytes for value in tensors.values())
        refuse_full_disk(aside, num_bytes * self.num_workers)
        with tempfile.TemporaryDirectory(dir=aside if is_local(aside) else None) as folder:
            save_file(dict(tensors), Path(folder) / name)
            copy(Path(folder) / name, aside / name)
        return {"name": name, **describe(aside / name)}

    def _put_in_place(
        self, aside: Path, name: str, num_updates: int, state: Mapping[str, Any], written: list[Any]
    ) -> None:
        if self.worker_rank > 0:
            return
        files = {share.pop("name"): share for share in written}
        write_json(aside / STATE, state)
        files[STATE] = describe(aside / STATE)
        manifest = {"num_updates": num_updates, "files": files, "fingerprint": fingerprint_of(files)}
        write_json(aside / MANIFEST, manifest)
        if is_local(aside):
            delete(self.folder / name)  # a damaged one, which was passed over
            aside.rename(self.folder / name)
        for old in names_of(self.folder)[self.keep_last :]:
            delete(self.folder / old)

    def _together(self, part: Callable[[], Any]) -> list[Any]:
        """Run a part of a commit; returns what it returned on each worker, by rank.

        Raises:
            StoreError: it failed on a worker, on all of them: none waits for one that is gone.
        """
        try:
            with storage_errors_within(self.folder):
                message = json.dumps({"result": part()})
        except StoreError as error:
            message = json.dumps({"error": str(error)[: MESSAGE_BYTES // 8]})
        heard = [json.loads(said) for said in self._exchange(message)]
        if faults := [said["error"] for said in heard if "error" in said]:
            raise StoreError("; ".join(faults))
        return [said["result"] for said in heard]

    def _exchange(self, message: str) -> list[str]:
        """What each worker says, by rank; all wait for each other."""
        said = message.encode()
        assert len(said) <= MESSAGE_BYTES, "a message has a length that all know"
        mine = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        mine[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else 0
        heard = [torch.zeros_like(mine, device=self.device) for _ in range(self.num_workers)]
        dist.all_gather(heard, mine.to(self.device))
        return [bytes(each.tolist()).rstrip(b"\0").decode() for each in heard]


def names_of(folder: Path) -> list[str]:
    """Of the commits that are there, newest first; which of them are whole is not asked.

    In an object store, where a commit is written in place, it is there once its manifest is.
    """
    files = [name for name in files_within(folder) if is_local(folder) or name.endswith(f"/{MANIFEST}")]
    found = {name.partition("/")[0] for name in files}
    return sorted((name for name in found if re.fullmatch(r"update-\d+", name)), reverse=True)


def newest_of(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest commit that is whole, by its manifest alone; and what is wrong with those that are newer."""
    faults: list[str] = []
    for name in names_of(folder):
        fault = fault_of(folder / name)
        if fault is None:
            return folder / name, faults
        faults.append(fault)
    return None, faults


def fault_of(commit: Path) -> str | None:
    """What is wrong with a commit; none if all that its manifest names is there and as it was written."""
    try:
        files = _manifest_of(commit)["files"]
        paths = {name: path_within(commit, name) for name in files}
    except FileNotFoundError:
        return f"{commit}: has no {MANIFEST}"
    except StoreError as error:
        return str(error)
    for name, expected in files.items():
        if not exists(paths[name]):
            return f"{commit / name}: is missing"
        if describe(commit / name) != expected:
            return f"{commit / name}: was altered or cut short (its SHA-256 differs)"
    return None


def _manifest_of(commit: Path) -> Any:
    return read_untrusted(commit / MANIFEST, FILES_MANIFEST, remedy="it is passed over")


def state_of(commit: Path) -> dict[str, Any]:
    """What `Commits.write` was given as state."""
    state: dict[str, Any] = read_json(commit / STATE)
    return state


def tensors_of(commit: Path) -> Callable[[str], Tensor]:
    """A commit's tensors by name, each read when asked for."""
    folder = local_copy(commit)
    shares = [path_within(folder, name) for name in _manifest_of(commit)["files"] if name.endswith(".safetensors")]
    opened = [safe_open(path, framework="pt") for path in shares]
    where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
    return lambda name: where[name].get_tensor(name)
