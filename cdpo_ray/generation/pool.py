"""Ray Data: prompts stream through a pool of generators, and a pool of judges, into shards."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Dataset

from cdpo_ray.config import Pool
from cdpo_ray.dataflow.parts import find_parts, join_quarantined
from cdpo_ray.dataflow.quarantine import Quarantine
from cdpo_ray.dataflow.streams import in_pool, write_shards
from cdpo_ray.generation.generator import Generator, MakeScores, Sampling
from cdpo_ray.progress import Progress
from cdpo_ray.records import prompt_id


def prompt_rows(prompts: Sequence[str], rows_per_call: int, done: Set[int] = frozenset()) -> Dataset | None:
    """One row per prompt, in blocks of one actor call each; `None`: all prompts are done.

    Blocks depend neither on the number of actors nor, except that done rows are left out, on earlier attempts.

    Args:
        rows_per_call: number of prompts per call.
        done: indices of prompts that need no row.
    """
    table = pa.table(
        {
            "prompt_index": pa.array(range(len(prompts)), pa.int64()),
            "prompt_id": [prompt_id(prompt) for prompt in prompts],
            "prompt": list(prompts),
        }
    )
    calls = [range(start, start + rows_per_call) for start in range(0, len(prompts), rows_per_call)]
    missing = [[row for row in call if row < len(prompts) and row not in done] for call in calls]
    blocks = [table.take(rows) for rows in missing if rows]
    return ray.data.from_arrow(blocks) if blocks else None


def generate_samples(
    prompts: Sequence[str],
    output_dir: Path,
    *,
    family: str,
    model: Mapping[str, Any],
    sampling: Sampling,
    tuned_dir: str | None,
    keep_images: bool,
    generators: Pool,
    make_scores: MakeScores | None,
    then: Callable[[Dataset], Dataset] | None,
    max_bad_fraction: float,
    progress: Progress,
) -> Counter[int]:
    """Write `1-samples`: all images of each prompt, with the judges' scores.

    Finished parts of an interrupted attempt are reused. Prompts that raise inside the model go to `set_aside.jsonl`.

    Args:
        output_dir: folder of the step.
        family, model: name in `FAMILIES` and arguments of its ``load``.
        tuned_dir: `4-training` of an earlier round, whose model is sampled instead of the base model.
        keep_images: write each image as PNG.
        generators: size of the pool.
        make_scores: builds the judges inside each generator (fused).
        then: adds stages after the generators, such as a separate pool of judges; drops the pixels unless
            ``keep_images``.
        max_bad_fraction: maximum share of quarantined prompts.

    Returns:
        Batch size in images -> number of new prompts generated with it.

    Raises:
        GenerationError: if too many prompts are quarantined.
    """
    output_dir = output_dir.resolve()  # actors on other nodes have another working directory
    quarantine = Quarantine(output_dir, len(prompts), max_bad_fraction)
    parts, finished = find_parts(output_dir, "samples")
    done = finished | quarantine.refuse_too_many()
    makes = (sampling.images_per_prompt, "images")
    progress.begin("generate", total=len(prompts), unit="prompt", done=len(done), makes=makes)
    rows = prompt_rows(prompts, sampling.rows_per_call, done)
    rows = rows and in_pool(
        rows,
        Generator,
        generators,
        rows_per_call=None,
        family=family,
        model=dict(model),
        sampling=sampling,
        tuned_dir=tuned_dir,
        make_scores=make_scores,
        keep_pixels=keep_images or then is not None,
        quarantine=quarantine,
    )
    if rows and then is not None:
        rows = then(rows)
    made_with = write_shards(rows, output_dir, "samples", progress, parts)
    join_quarantined(output_dir)
    return made_with
