"""Ray Data: prompts stream through a pool of generators (and of judges) into shards."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Dataset

from cdpo_ray.generation.generator import Generator, MakeScores, Sampling
from cdpo_ray.records import prompt_id
from cdpo_ray.streams import PoolSize, in_pool, write_shards


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
