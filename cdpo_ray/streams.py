"""Ray Data: rows through pools of plain classes, and into shards; what every step's own Ray module builds on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy, Dataset
from ray.data.datasource import FilenameProvider

from cdpo_ray.store import arrow_place

MIN_SHARD_BYTES = 128 * 2**20


@dataclass(frozen=True)
class PoolSize:
    """Actors of one role and what each needs."""

    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float


class OrderedNames(FilenameProvider):
    """Shards named by their place; Ray wants its id of the write in the name."""

    def __init__(self, stem: str) -> None:
        self.stem = stem

    def get_filename_for_task(self, write_uuid: str, task_index: int, *args: Any, **kwargs: Any) -> str:
        return f"{self.stem}-{task_index:06d}-{write_uuid}.parquet"


def in_pool(
    rows: Dataset, plain_class: Callable[..., Any], pool: PoolSize, *, rows_per_call: int, **arguments: Any
) -> Dataset:
    """Run a plain class (Arrow rows in, Arrow rows out) in a pool of actors, with bounded retries."""
    return rows.map_batches(
        plain_class,  # type: ignore[arg-type]
        fn_constructor_kwargs=arguments,
        batch_size=rows_per_call,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ActorPoolStrategy(min_size=1, max_size=pool.num_actors, max_tasks_in_flight_per_actor=2),
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor,
        max_restarts=-1,
        max_task_retries=3,  # a call that kills its actor is repeated, but not for ever (Ray Data's default)
    )


def read_rows(folder: Path, columns: Sequence[str]) -> Dataset:
    """Rows of all Parquet shards of a folder."""
    where = arrow_place(folder)
    return ray.data.read_parquet(
        where["path"], filesystem=where["filesystem"], columns=list(columns), file_extensions=["parquet"]
    )


def write_shards(rows: Dataset, output_dir: Path, stem: str) -> None:
    """Write rows in their order as Parquet shards of at least `MIN_SHARD_BYTES` (the last may be smaller).

    Names are counted through, so that the same run gives the same files.
    """
    rows.set_name(stem)  # what its progress bar is called
    where = arrow_place(output_dir)
    rows.write_parquet(
        where["path"],
        filesystem=where["filesystem"],
        filename_provider=OrderedNames(stem),
        min_bytes_per_file=MIN_SHARD_BYTES,
    )
    for number, path in enumerate(sorted(output_dir.glob(f"{stem}-*.parquet"))):
        path.rename(output_dir / f"{stem}-{number:06d}.parquet")
