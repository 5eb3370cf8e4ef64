"""Ray Data: prompts stream through a pool of generators, and a pool of judges, into shards."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Dataset

from cdpo_ray.config import Pool
from cdpo_ray.dataflow.parts import IMAGE_START, IMAGE_STOP, address_of, find_parts, join_quarantined
from cdpo_ray.dataflow.quarantine import Quarantine
from cdpo_ray.dataflow.streams import in_pool, write_shards
from cdpo_ray.generation.generator import Generator, MakeScores, Sampling
from cdpo_ray.progress import Progress
from cdpo_ray.records import prompt_id


def calls_of(
    prompts: Sequence[str], sampling: Sampling, held: Mapping[int, Set[int]], done: Set[int]
) -> list[pa.Table]:
    """One table per actor call: some whole prompts, or a piece of one prompt that exceeds a batch.

    Calls depend neither on the number of actors nor, except that finished ones are left out, on earlier attempts. So
    one prompt keeps many actors busy, and an image is the same however many there are.

    Args:
        held: images that exist already, by prompt index.
        done: indices of prompts that need no call.
    """
    columns = {
        "prompt_index": pa.array(range(len(prompts)), pa.int64()),
        "prompt_id": [prompt_id(prompt) for prompt in prompts],
        "prompt": list(prompts),
    }
    table, size = pa.table(columns), sampling.rows_per_call
    if len(sampling.pieces) == 1:
        calls = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
        missing = [[row for row in call if row not in done and row not in held] for call in calls]
        return [table.take(rows) for rows in missing if rows]
    return [
        table.slice(row, 1)
        .append_column(IMAGE_START, pa.array([piece[0]], pa.int64()))
        .append_column(IMAGE_STOP, pa.array([piece[-1] + 1], pa.int64()))
        for row in range(len(prompts))
        if row not in done
        for piece in _missing(sampling.pieces, held.get(row, frozenset()))
    ]


def _missing(pieces: Sequence[range], held: Set[int]) -> Iterator[list[int]]:
    """Runs of neighbouring images of each piece that are not held; part of a piece only if the batch size changed."""
    for piece in pieces:
        numbered = enumerate(image for image in piece if image not in held)
        for _, run in itertools.groupby(numbered, lambda pair: pair[1] - pair[0]):
            yield [image for _, image in run]


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
    then_in: Pool | None = None,
    complete: Callable[[pa.Table], pa.Table] | None = None,
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
        then_in: pool of those stages, if they have one.
        complete: computes columns that need all images of a prompt, for prompts that several calls made.
        max_bad_fraction: maximum share of quarantined prompts.

    Returns:
        Batch size in images -> number of new prompts generated with it.

    Raises:
        GenerationError: if too many prompts are quarantined.
    """
    output_dir = output_dir.resolve()  # actors on other nodes have another working directory
    quarantine = Quarantine(output_dir, len(prompts), max_bad_fraction)
    num_images = sampling.images_per_prompt
    parts, held = find_parts(output_dir, "samples", num_images)
    done = quarantine.refuse_too_many() | {row for row, images in held.items() if len(images) == num_images}
    progress.begin("generate", total=len(prompts), unit="prompt", done=len(done), makes=(num_images, "images"))
    calls = calls_of(prompts, sampling, held, done)
    rows = ray.data.from_blocks(calls) if calls else None
    rows = rows and in_pool(
        rows,
        Generator,
        generators,
        rows_per_call=None,
        num_calls=len(calls),
        beside=then_in,
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
    made_with = write_shards(
        rows,
        output_dir,
        "samples",
        progress,
        parts,
        expected=list(map(address_of, calls)),
        images_per_prompt=num_images,
        images_held=sum(len(images) for row, images in held.items() if row not in done),
        complete=complete,
    )
    join_quarantined(output_dir)
    return made_with
