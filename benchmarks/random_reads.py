"""Random reads of drawn pairs from a set of samples, by layout of the files: latents per second and bytes read.

The set has the shapes of Stable Diffusion 1.5; a draw reads two latents and the embedding of their prompt, in random
order. Cold: the files are dropped from the page cache before.
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.store import read_shards, with_tensors, write_table

LATENT, EMBEDDING = (4, 64, 64), (77, 768)
PROMPTS_PER_SHARD = 256
COLUMNS = ["latents", "prompt_embedding"]
Read = Callable[[NDArray[np.int64], NDArray[np.int64]], object]
"""Prompts ``[draw]`` and samples ``[draw, 2]`` -> their latents and embeddings."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--images", type=int, default=16, help="number of samples per prompt")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/random_reads"), help="working folder, emptied before and after"
    )
    options = parser.parse_args()
    shutil.rmtree(options.dir, ignore_errors=True)
    write_set(options.dir, options.prompts, options.images)
    print(
        f"{'layout':22} {'GB':>5} {'cold/s':>8} {'kB/draw':>8} {'warm/s':>8}   (latents; median of {options.repeats})"
    )
    for name, (folder, opened, max_draws) in LAYOUTS.items():
        num_draws = min(options.draws, max_draws)
        files = list((options.dir / folder).iterdir())
        figures = []
        for repeat in range(options.repeats):
            rng = np.random.default_rng(repeat)
            draws = rng.integers(0, options.prompts, num_draws), rng.integers(0, options.images, (num_draws, 2))
            forget(files)
            before = bytes_read()
            cold = seconds_of(lambda opened=opened, folder=folder, draws=draws: opened(options.dir / folder)(*draws))
            read = bytes_read() - before
            warm = seconds_of(lambda opened=opened, folder=folder, draws=draws: opened(options.dir / folder)(*draws))
            figures.append((2 * num_draws / cold, read / num_draws / 1e3, 2 * num_draws / warm))
        cold, read, warm = np.median(figures, axis=0)
        size = sum(path.stat().st_size for path in files) / 1e9
        print(f"{name:22} {size:5.2f} {cold:8,.0f} {read:8,.0f} {warm:8,.0f}", flush=True)
    shutil.rmtree(options.dir)


def write_set(folder: Path, num_prompts: int, num_images: int) -> None:
    """The same samples in each layout."""
    for layout in ("coarse", "groups", "ipc", "records"):
        (folder / layout).mkdir(parents=True)
    writer = None
    with (folder / "records" / "latents").open("wb") as latents, (folder / "records" / "embeddings").open("wb") as rest:
        for first, table in tables(num_prompts, num_images):
            write_table(table, folder / "groups" / f"samples-{first:012d}.parquet")
            stored = pq.read_table(folder / "groups" / f"samples-{first:012d}.parquet")
            pq.write_table(stored, folder / "coarse" / f"samples-{first:012d}.parquet")  # as of versions up to 0.3
            writer = writer or pa.ipc.new_file(str(folder / "ipc" / "samples.arrow"), stored.schema)
            writer.write_table(stored.combine_chunks())
            latents.write(array_of(table, "latents"))
            rest.write(array_of(table, "prompt_embedding"))
    writer.close()
    os.sync()


def tables(num_prompts: int, num_images: int) -> Iterator[tuple[int, pa.Table]]:
    rng = np.random.default_rng(0)
    for first in range(0, num_prompts, PROMPTS_PER_SHARD):
        count = min(PROMPTS_PER_SHARD, num_prompts - first)
        columns = {
            "prompt_index": np.arange(first, first + count),
            "latents": tensor_column(rng.standard_normal((count, num_images, *LATENT), np.float32).astype(np.float16)),
            "prompt_embedding": tensor_column(rng.standard_normal((count, *EMBEDDING), np.float32).astype(np.float16)),
        }
        yield first, pa.table(columns)


def array_of(table: pa.Table, column: str) -> NDArray[np.float16]:
    return np.ascontiguousarray(table[column].combine_chunks().to_numpy_ndarray())


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """Bytes that this process has read from disks, also by page faults."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# Layouts: a folder -> function that reads draws


def whole_parquet(folder: Path) -> Read:
    """All rows in memory, then indexing."""
    table = read_shards(folder, COLUMNS)
    latents, embeddings = (array_of(table, column) for column in COLUMNS)
    return lambda prompts, samples: (latents[prompts[:, None], samples], embeddings[prompts])


def parquet_per_access(folder: Path) -> Read:
    """The row group of each draw's prompt."""
    files = [pq.ParquetFile(path) for path in sorted(folder.iterdir())]

    def one(prompt: int, samples: NDArray[np.int64]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        file, row = files[prompt // PROMPTS_PER_SHARD], prompt % PROMPTS_PER_SHARD
        group, row = divmod(row, file.metadata.row_group(0).num_rows)
        table = with_tensors(file.read_row_group(group, COLUMNS))
        return array_of(table, "latents")[row, samples], array_of(table, "prompt_embedding")[row]

    return lambda prompts, samples: [one(*draw) for draw in zip(prompts, samples, strict=True)]


def arrow_ipc(folder: Path) -> Read:
    """Memory-mapped record batches."""
    reader = pa.ipc.open_file(pa.memory_map(str(folder / "samples.arrow")))
    batches = [with_tensors(pa.Table.from_batches([reader.get_batch(n)])) for n in range(reader.num_record_batches)]
    columns = [[batch[column].chunk(0).to_numpy_ndarray() for batch in batches] for column in COLUMNS]

    def one(prompt: int, samples: NDArray[np.int64]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        shard, row = divmod(prompt, PROMPTS_PER_SHARD)
        return columns[0][shard][row, samples], columns[1][shard][row].copy()

    return lambda prompts, samples: [one(*draw) for draw in zip(prompts, samples, strict=True)]


def mapped_records(folder: Path) -> Read:
    """Records of fixed size through a memory map."""
    embeddings = np.memmap(folder / "embeddings", np.float16, "r").reshape(-1, *EMBEDDING)
    latents = np.memmap(folder / "latents", np.float16, "r").reshape(len(embeddings), -1, *LATENT)
    return lambda prompts, samples: (latents[prompts[:, None], samples], embeddings[prompts])


def read_records(folder: Path) -> Read:
    """Records of fixed size by `preadv` into the result."""
    latents, embeddings = (os.open(folder / name, os.O_RDONLY) for name in ("latents", "embeddings"))
    num_images = round(
        os.fstat(latents).st_size * np.prod(EMBEDDING) / (os.fstat(embeddings).st_size * np.prod(LATENT))
    )

    def read(file: int, numbers: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.float16]:
        found = np.empty((len(numbers), *shape), np.float16)
        for record, number in zip(found, numbers, strict=True):
            os.preadv(file, [record], int(number) * record.nbytes)
        return found

    return lambda prompts, samples: (
        read(latents, (prompts[:, None] * num_images + samples).ravel(), LATENT),
        read(embeddings, prompts, EMBEDDING),
    )


LAYOUTS: dict[str, tuple[str, Callable[[Path], Read], int]] = {
    "Parquet, whole": ("coarse", whole_parquet, 10**9),
    "Parquet, coarse groups": ("coarse", parquet_per_access, 1),
    "Parquet, small groups": ("groups", parquet_per_access, 100),
    "Arrow IPC, mapped": ("ipc", arrow_ipc, 10**9),
    "records, mapped": ("records", mapped_records, 10**9),
    "records, preadv": ("records", read_records, 10**9),
}
"""Layout -> its folder, how it is opened, and the largest number of draws, because some take seconds for one."""


if __name__ == "__main__":
    main()
