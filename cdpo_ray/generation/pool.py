"""Ray Data: prompts stream through a pool of generators (and of judges) into shards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, Dataset
from ray.data.datasource import FilenameProvider

from cdpo_ray.generation.generator import Generator, MakeScores, Sampling
from cdpo_ray.records import prompt_id

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


def prompt_rows(prompts: Sequence[str], rows_per_call: int) -> Dataset:
    """A row a prompt, in blocks of what one call of an actor takes; blocks do not depend on the number of actors."""
    table = pa.table(
        {
            "prompt_index": pa.array(range(len(prompts)), pa.int64()),
            "prompt_id": [prompt_id(prompt) for prompt in prompts],
            "prompt": list(prompts),
        }
    )
    starts = range(0, len(prompts), rows_per_call)
    return ray.data.from_arrow([table.slice(start, rows_per_call) for start in starts])


def generate_samples(
    prompts: Sequence[str],
    output_dir: Path,
    *,
    family: str,
    model: Mapping[str, Any],
    sampling: Sampling,
    tuned_dir: str | None,
    keep_images: bool,
    generators: PoolSize,
    make_scores: MakeScores | None,
    score_in_pool: Callable[[Dataset], Dataset] | None,
) -> None:
    """Write `1-samples`: for each prompt all its images, with the scores of the judges that were asked for.

    Args:
        tuned_dir: `4-training` of an earlier round, whose model is sampled in place of the base.
        make_scores: judges built inside each generator (fused).
        score_in_pool: judges in a pool of their own, behind the generators.
    """
    rows_per_call = max(1, sampling.images_per_batch // sampling.images_per_prompt)
    rows = in_pool(
        prompt_rows(prompts, rows_per_call),
        Generator,
        generators,
        rows_per_call=rows_per_call,
        family=family,
        model=dict(model),
        sampling=sampling,
        tuned_dir=tuned_dir,
        make_scores=make_scores,
        keep_images=keep_images,
        keep_pixels=score_in_pool is not None,
    )
    if score_in_pool is not None:
        rows = score_in_pool(rows)
    write_shards(rows, output_dir, "samples")


def write_shards(rows: Dataset, output_dir: Path, stem: str) -> None:
    """Write rows in their order as Parquet shards of at least `MIN_SHARD_BYTES` (the last may be smaller).

    Names are counted through, so that the same run gives the same files.
    """
    rows.set_name(stem)  # what its progress bar is called
    rows.write_parquet(str(output_dir), filename_provider=OrderedNames(stem), min_bytes_per_file=MIN_SHARD_BYTES)
    for number, path in enumerate(sorted(output_dir.glob(f"{stem}-*.parquet"))):
        path.rename(output_dir / f"{stem}-{number:06d}.parquet")
