"""Ray Data: streams of rows through actor pools and into files, for the Ray module of each step."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, Dataset

from cdpo_ray.config import Pool
from cdpo_ray.dataflow.parts import Part, in_order, join_parts, refuse_large_rows, shards_of, write_part
from cdpo_ray.progress import Progress
from cdpo_ray.store import PARTS, arrow_path, make_folder, with_tensors

MIN_SHARD_BYTES = 128 * 2**20


def in_pool(
    rows: Dataset,
    plain_class: Callable[..., Any],
    pool: Pool,
    *,
    rows_per_call: int | None,
    num_calls: int = 1,
    beside: Pool | None = None,
    **arguments: Any,
) -> Dataset:
    """Run a plain class (Arrow rows in, Arrow rows out) in a pool of actors, with bounded retries.

    Args:
        plain_class: callable class.
        rows_per_call: number of rows per call; ``None``: one block.
        num_calls: number of calls, if known: at most this number of actors starts at once. Ray adds others when needed.
        beside: another pool that runs at the same time.
        arguments: arguments of the class's constructor.
    """
    starting = min(num_calls, _fitting(pool, beside))
    # The public `map_batches` refuses to pass whole blocks with GPUs; this is the same without that check.
    return rows.map_batches_internal(
        plain_class,
        fn_constructor_kwargs=arguments,
        batch_size=rows_per_call,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ActorPoolStrategy(
            min_size=1, max_size=pool.num_actors, initial_size=starting, max_tasks_in_flight_per_actor=2
        ),
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


def write_parts(
    rows: Dataset | None,
    output_dir: Path,
    stem: str,
    progress: Progress,
    *,
    images_per_prompt: int,
    images_held: int = 0,
    ordered: bool = False,
) -> Iterator[Part]:
    """Write each block, the output of one call, as a part; yields parts once they are durable.

    Images go from the actor's node to a task that writes them, and only a description of the file to the driver.

    Args:
        rows: rows to write; ``None``: none.
        stem: name of the operator in Ray.
        images_held: number of images of unfinished prompts that existing parts hold.
        ordered: yield parts in the order of the rows; then a slow call holds back the writing of others.
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
    written.context.execution_options.preserve_order = ordered
    num_images = images_held
    for row in written.iter_rows():
        before, num_images = num_images, num_images + (row["num_images"] or row["num_rows"] * images_per_prompt)
        progress.advance(num_images // images_per_prompt - before // images_per_prompt)
        part = Part(path=parts_dir / row.pop("name"), **row)
        refuse_large_rows(part, images_per_prompt)
        yield part


def write_shards(
    rows: Dataset | None,
    output_dir: Path,
    stem: str,
    progress: Progress,
    existing: Sequence[Part] = (),
    *,
    images_per_prompt: int,
    images_held: int = 0,
    expected: Sequence[tuple[int, int]] | None = None,
    complete: Callable[[pa.Table], pa.Table] | None = None,
) -> Counter[int]:
    """Write rows, in prompt order, as Parquet shards of at least `MIN_SHARD_BYTES` (the last may be smaller).

    Parts are joined as soon as they suffice for a shard, so that few small files exist at any time. Shards are named by
    their first prompt index: the same run gives the same files, regardless of interruptions.

    Args:
        rows: rows that are still missing; ``None``: none.
        output_dir: folder to write to.
        stem: beginning of the shards' names.
        existing: parts and shards of an interrupted attempt, see `find_parts`.
        images_held: see `write_parts`.
        expected: addresses of the calls, see `in_order`: they may finish in any order. ``None``: not known, so the rows
            are written in their order.
        complete: see `whole_prompts`.

    Returns:
        Number of prompts by number of images per forward pass; 0: unknown.
    """
    made_with: dict[tuple[int, int], int] = {}

    def counted() -> Iterator[Part]:
        for part in write_parts(
            rows,
            output_dir,
            stem,
            progress,
            images_per_prompt=images_per_prompt,
            images_held=images_held,
            ordered=expected is None,
        ):
            made_with[part.images_per_batch or 0, part.first] = part.num_rows
            yield part

    new = counted() if expected is None else in_order(counted(), expected)
    join = ray.remote(num_cpus=0.1, max_retries=3)(join_parts)
    joining = [
        join.remote(
            [part.path for part in parts],
            output_dir / f"{stem}-{parts[0].first:012d}.parquet",
            images_per_prompt,
            complete,
        )
        for parts in shards_of(heapq.merge(existing, new), MIN_SHARD_BYTES)
    ]
    ray.get(joining)
    found: Counter[int] = Counter()
    for (images_per_batch, _), num_prompts in made_with.items():
        found[images_per_batch] += num_prompts
    return found


def _fitting(pool: Pool, beside: Pool | None) -> int:
    """Number of actors of a pool, at least 1, for which the cluster has room now, beside one of another and one task.

    More would take the CPUs that the others need to start.
    """
    free = ray.available_resources()
    cpus = free.get("CPU", 0.0) - 1 - (beside.cpus_per_actor if beside else 0)
    gpus = free.get("GPU", 0.0) - (beside.gpus_per_actor if beside else 0)
    fitting = [pool.num_actors]
    fitting += [int(cpus / pool.cpus_per_actor)] if pool.cpus_per_actor else []
    fitting += [int(gpus / pool.gpus_per_actor)] if pool.gpus_per_actor else []
    return max(1, min(fitting))
