"""Ray Data: rows through pools of plain classes, and into files; what every step's own Ray module builds on."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, Dataset

from cdpo_ray.dataflow.parts import Part, join_parts, shards_of, write_part
from cdpo_ray.progress import Progress
from cdpo_ray.store import PARTS, arrow_path, make_folder

MIN_SHARD_BYTES = 128 * 2**20


@dataclass(frozen=True)
class PoolSize:
    """Actors of one role and what each needs."""

    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float


def in_pool(
    rows: Dataset, plain_class: Callable[..., Any], pool: PoolSize, *, rows_per_call: int | None, **arguments: Any
) -> Dataset:
    """Run a plain class (Arrow rows in, Arrow rows out) in a pool of actors, with bounded retries.

    Args:
        rows_per_call: none: a block, as it is.
    """
    # The public `map_batches` refuses a whole block (no batch size) with GPUs; this is the same without that check.
    return rows.map_batches_internal(
        plain_class,
        fn_constructor_kwargs=arguments,
        batch_size=rows_per_call,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ActorPoolStrategy(min_size=1, max_size=pool.num_actors, max_tasks_in_flight_per_actor=2),
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor,
        # Spot machines leave many times a night; an actor that its call, or its start, kills must not be for ever.
        max_restarts=30,
        max_task_retries=-1,  # restarts bound them: until a lost node counts as dead, a handful would be used up
    )


def read_rows(folder: Path, columns: Sequence[str]) -> Dataset:
    """Rows of all Parquet shards of a folder."""
    where = arrow_path(folder)
    return ray.data.read_parquet(
        where["path"], filesystem=where["filesystem"], columns=list(columns), file_extensions=["parquet"]
    )


def write_parts(rows: Dataset | None, output_dir: Path, stem: str, progress: Progress) -> Iterator[Part]:
    """Write each block, what one call made, as a part; each is told, in order, once a restart would not make it again.

    Args:
        rows: none: everything is there.
        stem: what Ray calls the work.
    """
    if rows is None:
        return
    parts_dir = output_dir / PARTS
    make_folder(parts_dir)
    written = rows.map_batches(
        write_part,
        fn_kwargs={"parts_dir": parts_dir},
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        max_retries=3,
    )
    written.set_name(stem)
    for row in written.iter_rows():
        progress.advance(row["num_rows"])
        yield Part(path=parts_dir / row.pop("name"), **row)


def write_shards(
    rows: Dataset | None, output_dir: Path, stem: str, progress: Progress, there: Sequence[Part] = ()
) -> Counter[int]:
    """Write rows, in prompt order, as Parquet shards of at least `MIN_SHARD_BYTES` (the last may be smaller).

    Parts are joined as soon as there are enough of them, so that few small files lie about at any time. Shards are
    named by their first prompt index: the same run gives the same files, however often it was interrupted.

    Args:
        rows: what is not there yet; none: nothing.
        there: what an interrupted attempt left.

    Returns:
        How many of the rows were made with how many images at once.
    """
    made_with: Counter[int] = Counter()

    def counted() -> Iterator[Part]:
        for part in write_parts(rows, output_dir, stem, progress):
            made_with[part.images_per_batch or 0] += part.num_rows
            yield part

    join = ray.remote(num_cpus=0.1, max_retries=3)(join_parts)
    joining = [
        join.remote([part.path for part in parts], output_dir / f"{stem}-{parts[0].first:012d}.parquet")
        for parts in shards_of(heapq.merge(there, counted()), MIN_SHARD_BYTES)
    ]
    ray.get(joining)
    return made_with
