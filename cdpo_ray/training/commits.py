"""Training state <-> checkpoints (`commits`): one folder each, one shard per worker, used only if intact."""

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
    files_within,
    find_damage,
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
    """Checkpoints of one training, ``update-000050`` and so on; every method is collective.

    A checkpoint does not depend on the number of workers or the ZeRO stage: both may change on resume.

    Args:
        folder: local folder that all workers share, or one in an object store.
        keep_last: number of checkpoints to keep.
        device: device for messages between workers.
    """

    def __init__(self, folder: Path, *, keep_last: int, device: torch.device) -> None:
        self.folder, self.keep_last, self.device = folder, keep_last, device
        self.worker_rank, self.num_workers = dist.get_rank(), dist.get_world_size()

    def write(self, num_updates: int, state: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write a checkpoint: each worker its shard of the tensors, then the manifest; then move it into place.

        Args:
            num_updates: number of updates done, which names the checkpoint.
            state: JSON of all state that is not a tensor.
            tensors: tensors by name, the same on all workers.

        Raises:
            StoreError: a worker could not write; raised on all of them. Earlier checkpoints are kept.
        """
        name = f"update-{num_updates:06d}"
        # Object stores write a file completely or not at all, so writing the manifest last suffices there.
        aside = self.folder / (f"{name}.tmp" if is_local(self.folder) else name)
        mine = {
            key: value.detach().cpu().contiguous()
            for number, (key, value) in enumerate(tensors)
            if number % self.num_workers == self.worker_rank
        }
        self._together(lambda: self._begin(aside))
        written = self._together(lambda: self._write_share(aside, mine))
        self._together(lambda: self._put_in_place(aside, name, num_updates, state, written))

    def newest(self, log_line: Callable[[str], Any]) -> Path | None:
        """Newest checkpoint that its manifest proves intact, the same on all workers; ``None``: no checkpoint.

        Args:
            log_line: called on the first worker with one line per damaged checkpoint.

        Raises:
            TrainingError: all checkpoints are damaged; training must not restart silently.
        """
        chosen, faults = newest_of(self.folder) if self.worker_rank == 0 else (None, [])
        for fault in faults:
            log_line(f"{fault}; resuming from {chosen.name}" if chosen else fault)
        damaged = {"damaged": "; ".join(faults)[: MESSAGE_BYTES // 4]} if faults else {}
        answer = {"chosen": chosen.name} if chosen else damaged
        answer = json.loads(self._exchange(json.dumps(answer))[0])
        if "damaged" in answer:
            raise TrainingError(
                f"{answer['damaged']}; no checkpoint is intact; delete {self.folder.parent} to restart training"
            )
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
            delete(self.folder / name)  # a damaged one of the same name
            aside.rename(self.folder / name)
        for old in names_of(self.folder)[self.keep_last :]:
            delete(self.folder / old)

    def _together(self, part: Callable[[], Any]) -> list[Any]:
        """Run a part of `write` on every worker; returns the results by rank.

        Raises:
            StoreError: it failed on a worker; raised on all, so that none waits for a worker that has left.
        """
        try:
            with storage_errors_within(self.folder):
                message = json.dumps({"result": part()})
        except StoreError as error:
            message = json.dumps({"error": str(error)[: MESSAGE_BYTES // 8]})
        answers = [json.loads(answer) for answer in self._exchange(message)]
        if faults := [answer["error"] for answer in answers if "error" in answer]:
            raise StoreError("; ".join(faults))
        return [answer["result"] for answer in answers]

    def _exchange(self, message: str) -> list[str]:
        """Gather one message per worker, by rank; collective."""
        data = message.encode()
        assert len(data) <= MESSAGE_BYTES, "messages are padded to a fixed length"
        mine = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
        gathered = [torch.zeros_like(mine, device=self.device) for _ in range(self.num_workers)]
        dist.all_gather(gathered, mine.to(self.device))
        return [bytes(each.tolist()).rstrip(b"\0").decode() for each in gathered]


def names_of(folder: Path) -> list[str]:
    """Names of all checkpoints, newest first, damaged ones included.

    In an object store, where a checkpoint is written in place, it exists once its manifest does.
    """
    files = [name for name in files_within(folder) if is_local(folder) or name.endswith(f"/{MANIFEST}")]
    found = {name.partition("/")[0] for name in files}
    return sorted((name for name in found if re.fullmatch(r"update-\d+", name)), reverse=True)


def newest_of(folder: Path) -> tuple[Path | None, list[str]]:
    """Newest intact checkpoint, or ``None``, and one line per newer, damaged one."""
    faults: list[str] = []
    for name in names_of(folder):
        fault = fault_of(folder / name)
        if fault is None:
            return folder / name, faults
        faults.append(fault)
    return None, faults


def fault_of(checkpoint: Path) -> str | None:
    """Damage of a checkpoint; ``None``: every file in its manifest exists, unaltered."""
    try:
        files = {path_within(checkpoint, name): entry for name, entry in _manifest_of(checkpoint)["files"].items()}
    except FileNotFoundError:
        return f"{checkpoint}: has no {MANIFEST}"
    except StoreError as error:
        return str(error)
    sha256 = {path: entry["sha256"] for path, entry in files.items()}
    num_bytes = {path: entry["bytes"] for path, entry in files.items()}
    faults = find_damage(sha256, folder=checkpoint, num_bytes=num_bytes)
    return next((f"{path}: {fault}" for path, fault in faults.items()), None)


def _manifest_of(checkpoint: Path) -> Any:
    return read_untrusted(checkpoint / MANIFEST, FILES_MANIFEST, remedy="this checkpoint is skipped")


def state_of(checkpoint: Path) -> dict[str, Any]:
    """``state`` as passed to `Commits.write`."""
    state: dict[str, Any] = read_json(checkpoint / STATE)
    return state


def tensors_of(checkpoint: Path) -> Callable[[str], Tensor]:
    """Function from a tensor's name to the tensor, read on each call."""
    folder = local_copy(checkpoint)
    shares = [path_within(folder, name) for name in _manifest_of(checkpoint)["files"] if name.endswith(".safetensors")]
    opened = [safe_open(path, framework="pt") for path in shares]
    where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
    return lambda name: where[name].get_tensor(name)
