"""`1-samples` -> latents and conditioning of drawn samples, through files that the workers of a node share."""

# A row group of the Parquet files is decoded once per node, and its values are written as records of fixed size, which
# are then read in any order by their number. The byte of a row group in the file of flags is set after its records.

import contextlib
import fcntl
import functools
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.errors import StoreError
from cdpo_ray.models.family import Rows
from cdpo_ray.records import CONDITIONING
from cdpo_ray.store import (
    ANOTHER_TMPDIR,
    FILES_MANIFEST,
    MANIFEST,
    NodeFolder,
    describe,
    exists,
    fingerprint_of,
    read_row_group,
    read_untrusted,
    refuse_full_disk,
    storage_errors,
    table_metadata,
)
from cdpo_ray.store.lock import HELD

FOLDER = "samples"
FLAGS = "flags"
MAX_FETCHERS = 4
FETCHED_BYTES = 64 * 2**20
"""Size of the row groups that are decoded at once; one larger than this is decoded alone."""
WAIT_SECONDS = 0.02


@dataclass(frozen=True)
class SampleBank:
    """Latents and conditioning of all samples, in memory or, after `open`, on disk.

    Attributes:
        latents: ``[prompt, sample, channel, height, width]``; of encoded images, the posterior's mean.
        conditioning: one row per prompt.
        row_of_prompt: ``[largest prompt index + 1]``, row of each prompt index; -1: no such prompt.
        latents_std: shape of ``latents``; standard deviation of the posterior that each draw samples; ``None``: the
            images were generated.
        cache: files of ``latents``, ``conditioning`` and ``latents_std``; ``None``: they are in memory.
    """

    latents: Rows
    conditioning: Mapping[str, Rows]
    row_of_prompt: NDArray[np.int64]
    latents_std: Rows | None = None
    cache: "SampleCache | None" = None

    @classmethod
    def open(cls, samples_dir: Path) -> Self:
        """Bank of a finished `1-samples`; reads the prompt indices, and samples when they are indexed.

        Raises:
            StoreError: the storage or the node's disk fails, the files differ in shape, or the folder for temporary
                files belongs to others.
        """
        cache = SampleCache(samples_dir)
        columns = {name: StoredRows(cache, name) for name in cache.types}
        row_of_prompt = np.full(cache.prompt_index.max() + 1, -1)
        row_of_prompt[cache.prompt_index] = np.arange(len(cache.prompt_index))
        latents, spread = columns.pop("latents"), columns.pop("latents_std", None)
        return cls(latents, columns, row_of_prompt, spread, cache)

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Check that the disk has space for the samples of these prompts; raises StoreError."""
        if self.cache:
            self.cache.refuse_full_disk(rows)

    def prefetch(self, rows: NDArray[np.int64]) -> None:
        """Begin to read the samples of these prompts on other threads, in this order."""
        if self.cache:
            self.cache.prefetch(rows)

    def delete_cache(self) -> None:
        """Delete the files on disk, unless another process uses them; the bank cannot be used after it."""
        if self.cache:
            self.cache.delete()

    def latents_at(
        self, rows: NDArray[np.int64], samples: NDArray[np.int64], draws: Sequence[torch.Generator]
    ) -> Tensor:
        """Latents ``[sample, channel, height, width]``; of encoded images, drawn from the posterior.

        Args:
            draws: one generator per sample.
        """
        latents = self.latents[rows, samples]
        if self.latents_std is None:
            return latents
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in draws])
        return (latents + self.latents_std[rows, samples] * noise).to(latents.dtype)


class StoredRows:
    """A column of a cache, indexed like a tensor; the selected rows are read into a new one.

    Attributes:
        shape: ``[prompt, ...]``.
    """

    def __init__(self, cache: "SampleCache", column: str) -> None:
        kind = cache.types[column]
        self.shape = (len(cache.prompt_index), *kind.shape)
        self._cache, self._column = cache, column
        self._dtype = np.dtype(kind.value_type.to_pandas_dtype())

    def __getitem__(self, index: Any) -> Tensor:
        """Rows by index or array of indices; or by two of these, which are broadcast: samples of rows."""
        numbers = rows = np.asarray(index[0] if isinstance(index, tuple) else index)
        shape = self.shape[1:]
        if isinstance(index, tuple):
            rows, samples = np.broadcast_arrays(rows, index[1])
            numbers, shape = rows * self.shape[1] + samples, self.shape[2:]
        found = np.empty((numbers.size, *shape), self._dtype)
        self._cache.read(self._column, rows.ravel(), numbers.ravel(), found)
        return torch.from_numpy(found.reshape(*numbers.shape, *shape))


class SampleCache:
    """Records of the tensors of `1-samples`, written as they are needed, in files that a node's workers share.

    Attributes:
        types: column -> type of its tensors.
        prompt_index: ``[row]``.
        folder: one file per column, and one with a byte per row group.
    """

    def __init__(self, samples_dir: Path) -> None:
        self.samples_dir = samples_dir
        self.shards = sorted(samples_dir.glob("*.parquet"))
        self._metadata = functools.lru_cache(64)(table_metadata)
        with ThreadPoolExecutor(2 * MAX_FETCHERS) as pool:
            found = list(pool.map(_index_of, self.shards))
        self.types = found[0][0]
        for shard, (types, _) in zip(self.shards, found, strict=True):
            if types != self.types:
                raise StoreError(
                    f"{shard}: its tensors differ from those of {self.shards[0].name} in name, shape or type; delete"
                    f" {samples_dir} to regenerate it"
                )
        indices = [index for _, groups in found for index in groups]
        self._groups = [(number, group) for number, (_, groups) in enumerate(found) for group in range(len(groups))]
        self._ends = np.cumsum([len(index) for index in indices])
        self.prompt_index = np.concatenate(indices)
        self._present = np.zeros(len(indices), bool)
        self._row_bytes = {
            name: math.prod(kind.shape) * kind.value_type.bit_width // 8 for name, kind in self.types.items()
        }
        self.folder = NodeFolder(FOLDER, _fingerprint(samples_dir))
        with storage_errors(self.folder.path):
            self._files = {name: _open(self.folder.path / name) for name in (*self.types, FLAGS)}
        largest = max(map(len, indices)) * sum(self._row_bytes.values())
        self._pool = ThreadPoolExecutor(max(1, min(MAX_FETCHERS, FETCHED_BYTES // max(1, largest))))
        self._guard = threading.Lock()
        self._fetches: dict[int, Future[None]] = {}

    def refuse_full_disk(self, rows: NDArray[np.int64]) -> None:
        """Raise StoreError if the disk has no space for the records of rows that are not there yet."""
        self.folder.touch()
        absent = np.array([group for group in self._groups_of(np.unique(rows)) if not self._has(group)], np.int64)
        num_rows = np.diff(self._ends, prepend=0)[absent].sum()
        refuse_full_disk(self.folder.path, int(num_rows) * sum(self._row_bytes.values()), remedy=ANOTHER_TMPDIR)

    def prefetch(self, rows: NDArray[np.int64]) -> list[Future[None]]:
        """Fetch the row groups of these rows on other threads, in this order; returns what is not done yet."""
        found = []
        for group in self._groups_of(rows):
            if not self._has(group):
                with self._guard:
                    if group not in self._fetches:
                        self._fetches[group] = self._pool.submit(self._fetch, group)
                    found.append(self._fetches[group])
        return found

    def read(self, column: str, rows: NDArray[np.int64], numbers: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Read records.

        Args:
            rows: ``[record]``, rows that hold the records.
            numbers: ``[record]``, positions in the file, in records of the size of those of ``out``.
            out: ``[record, ...]``.

        Raises:
            StoreError: the storage or the node's disk fails.
        """
        for fetch in self.prefetch(rows):
            fetch.result()
        with storage_errors(self.folder.path, "read"):
            for record, number in zip(out, numbers, strict=True):
                if os.preadv(self._files[column].fileno(), [record], int(number) * record.nbytes) != record.nbytes:
                    raise StoreError(f"{self.folder.path}: was altered; delete it, and run the same command again")

    def delete(self) -> None:
        """Delete the files, unless another process uses them."""
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()
        self.folder.delete()

    def _groups_of(self, rows: NDArray[np.int64]) -> Sequence[int]:
        """Row groups of rows, each once, in this order."""
        return [*dict.fromkeys(np.searchsorted(self._ends, rows, "right").tolist())]

    def _has(self, group: int) -> bool:
        if not self._present[group]:
            self._present[group] = os.pread(self._files[FLAGS].fileno(), 1, group) == b"\1"
        return bool(self._present[group])

    def _fetch(self, group: int) -> None:
        with self._locked(group):
            if not self._has(group):
                self._write(group)
        with self._guard:
            del self._fetches[group]

    def _write(self, group: int) -> None:
        """Decode a row group and write its records, then its flag."""
        number, group_of_shard = self._groups[group]
        shard, end = self.shards[number], int(self._ends[group])
        columns = ["prompt_index", *self.types]
        table = read_row_group(shard, group_of_shard, columns, self._metadata(shard)[0])
        first = end - table.num_rows
        if not np.array_equal(table["prompt_index"].to_numpy(), self.prompt_index[first:end]):
            raise StoreError(
                f"{shard}: its rows are not in the order of their prompts; delete {self.samples_dir} to regenerate it"
            )
        try:
            for name in self.types:
                offset = first * self._row_bytes[name]
                for chunk in table[name].chunks:
                    offset += _write_all(self._files[name], np.ascontiguousarray(chunk.to_numpy_ndarray()), offset)
            _write_all(self._files[FLAGS], np.ones(1, np.uint8), group)
        except OSError as error:
            raise StoreError(
                f"{self.folder.path}: samples cannot be kept here: {error.strerror}; free disk space, or"
                f" {ANOTHER_TMPDIR}, and run the same command again"
            ) from None

    @contextlib.contextmanager
    def _locked(self, group: int) -> Iterator[None]:
        """Wait until no other process fetches the row group; only to save work, as all would write the same bytes."""
        flags = self._files[FLAGS]
        while not self._has(group):
            try:
                fcntl.lockf(flags, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, group)
                break
            except OSError as error:
                if error.errno not in HELD:  # a disk without locks
                    break
                time.sleep(WAIT_SECONDS)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.lockf(flags, fcntl.LOCK_UN, 1, group)


def _fingerprint(samples_dir: Path) -> str:
    """What the content is determined by; a folder without a manifest is read in full."""
    if exists(samples_dir / MANIFEST):
        remedy = f"delete {samples_dir} to regenerate it"
        return str(read_untrusted(samples_dir / MANIFEST, FILES_MANIFEST, remedy=remedy)["fingerprint"])
    return fingerprint_of({path.name: describe(path) for path in sorted(samples_dir.glob("*.parquet"))})


def _index_of(shard: Path) -> tuple[dict[str, Any], list[NDArray[np.int64]]]:
    """Types of a shard's tensors, and the prompt indices of each row group.

    The indices are those of the metadata if they have no gap; `SampleCache` checks them when it reads the rows.
    """
    metadata, schema = table_metadata(shard)
    types = {
        name: schema.field(name).type for name in ("latents", "latents_std", *CONDITIONING) if name in schema.names
    }
    names = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    place, found = names.index("prompt_index"), []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        limits = group.column(place).statistics
        if limits and limits.has_min_max and limits.max - limits.min + 1 == group.num_rows:
            found.append(np.arange(limits.min, limits.max + 1))
        else:
            found.append(read_row_group(shard, number, ["prompt_index"], metadata)["prompt_index"].to_numpy())
    return types, found


def _open(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)


def _write_all(file: BinaryIO, values: NDArray[Any], offset: int) -> int:
    """Write an array at an offset; returns its size in bytes."""
    content = values.data.cast("B")
    written = 0
    while written < len(content):
        written += os.pwrite(file.fileno(), content[written:], offset + written)
    return written
