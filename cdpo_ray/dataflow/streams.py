"""Ray Data: streams of rows through actor pools and into files, for the Ray module of each step."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, Dataset

from cdpo_ray.config import Pool
from cdpo_ray.dataflow.parts import Part, join_parts, shards_of, write_part
from cdpo_ray.progress import Progress
from cdpo_ray.store import PARTS, arrow_path, make_folder, with_tensors

MIN_SHARD_BYTES = 128 * 2**20


def in_pool(
    rows: Dataset, plain_class: Callable[..., Any], pool: Pool, *, rows_per_call: int | None, **arguments: Any
) -> Dataset:
    """Run a plain class (Arrow rows in, Arrow rows out) in a pool of actors, with bounded retries.

    Args:
        plain_class: callable class.
        rows_per_call: number of rows per call; ``None``: one block.
        arguments: arguments of the class's constructor.
    """
    # The public `map_batches` refuses to pass whole blocks with GPUs; this is the same without that check.
    return rows.map_batches_internal(
        plain_class,
        fn_constructor_kwargs=arguments,
        batch_size=rows_per_call,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ActorPoolStrategy(min_size=1, max_size=pool.num_actors, max_tasks_in_flight_per_actor=2),
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor,
        label_selector=dict(pool.node_labels),
        # Spot machines are preempted many times a night, but an actor that always crashes must not restart forever.
        max_restarts=30,
        max_task_retries=-1,  # bounded by restarts: a small number is used up before Ray declares a lost node dead
    )


def read_rows(folder: Path, columns: Sequence[str]) -> Dataset:
    """Stream the rows of all Parquet shards of a folder."""
    where = arrow_path(folder)
    rows = ray.data.read_parquet(
        where["path"], filesystem=where["filesystem"], columns=list(columns), file_extensions=["parquet"]
    )
    return rows.map_batches(with_tensors, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)


def write_parts(rows: Dataset | None, output_dir: Path, stem: str, progress: Progress) -> Iterator[Part]:
    """Write each block, the output of one call, as a part; yields parts, in order, once they are durable.

    Args:
        rows: rows to write; ``None``: none.
        stem: name of the operator in Ray.
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
    rows: Dataset | None, output_dir: Path, stem: str, progress: Progress, existing: Sequence[Part] = ()
) -> Counter[int]:
    """Write rows, in prompt order, as Parquet shards of at least `MIN_SHARD_BYTES` (the last may be smaller).

    Parts are joined as soon as they suffice for a shard, so that few small files exist at any time. Shards are named by
    their first prompt index: the same run gives the same files, regardless of interruptions.

    Args:
        rows: rows that are still missing; ``None``: none.
        output_dir: folder to write to.
        stem: beginning of the shards' names.
        existing: parts and shards of an interrupted attempt, see `find_parts`.

    Returns:
        Number of rows by number of images per forward pass; 0: unknown.
    """
    made_with: Counter[int] = Counter()

    def counted() -> Iterator[Part]:
        for part in write_parts(rows, output_dir, stem, progress):
            made_with[part.images_per_batch or 0] += part.num_rows
            yield part

    join = ray.remote(num_cpus=0.1, max_retries=3)(join_parts)
    joining = [
        join.remote([part.path for part in parts], output_dir / f"{stem}-{parts[0].first:012d}.parquet")
        for parts in shards_of(heapq.merge(existing, counted()), MIN_SHARD_BYTES)
    ]
    ray.get(joining)
    return made_with
