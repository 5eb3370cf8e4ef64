"""A finished run with distinct images, and people who rate them, for tests."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from finished_runs import judged

from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.dataflow.images import encode_png
from cdpo_ray.evaluation.votes import RatedImages, Vote, digest_of
from cdpo_ray.records import EVALUATION, SAMPLES
from cdpo_ray.store import RunFolder, write_table

NUM_PROMPTS, NUM_IMAGES, NUM_SAMPLES = 12, 2, 5
HOSTILE = "<img src=x onerror=alert(1)>"


def image(*place: int) -> bytes:
    return encode_png(np.random.default_rng(place).integers(0, 256, size=(3, 8, 8), dtype=np.uint8))


def rated_run(folder: Path, *, keep_images: bool = True) -> Path:
    """Write samples and an evaluation into a run's folder.

    By `oracle` the fine-tuned model is better on even prompts, by `clip` on all but the first, which is equal.
    """
    rows = [
        {
            "prompt_index": prompt,
            "prompt_id": f"{prompt:016x}",
            "prompt": HOSTILE if prompt == 3 else f"prompt number {prompt}",
            "sample_index": sample,
            "base_image": image(0, prompt, sample),
            "tuned_image": image(1, prompt, sample),
            "base_score_clip": 1.0,
            "tuned_score_clip": 1.0 + (prompt > 0),
            "base_score_oracle": 1.0,
            "tuned_score_oracle": 2.0 if prompt % 2 == 0 else 0.0,
        }
        for prompt in range(NUM_PROMPTS)
        for sample in range(NUM_IMAGES)
    ]
    metrics = {"num_prompts": NUM_PROMPTS, "images_per_prompt": NUM_IMAGES}
    metrics |= {"judges": {"clip": judged(0.8, 0.9), "oracle": judged(0.8, 0.8)}}
    latents = np.zeros((NUM_PROMPTS * NUM_SAMPLES, 1, 2, 2), np.float32)
    samples = pa.table({"prompt_index": range(NUM_PROMPTS), "prompt": [f"train {n}" for n in range(NUM_PROMPTS)]})
    samples = samples.append_column("latents", tensor_column(latents, NUM_SAMPLES))
    if keep_images:
        images = [[image(2, prompt, sample) for sample in range(NUM_SAMPLES)] for prompt in range(NUM_PROMPTS)]
        samples = samples.append_column("images", pa.array(images, pa.list_(pa.binary())))
    with RunFolder(folder).writing(SAMPLES, {}, {}, seed=7, resumable=False) as (output_dir, _):
        write_table(samples, output_dir / "samples.parquet")
    with RunFolder(folder).writing(EVALUATION, {}, {}, seed=7, resumable=False) as (output_dir, _):
        write_table(pa.Table.from_pylist(rows[::-1]), output_dir / "comparison.parquet")
        (output_dir / "metrics.json").write_text(json.dumps(metrics))
    return folder


def vote_on(images: RatedImages, number: int, better: str, *, voter: str = "ana") -> Vote:
    """A vote of a voter on one of the pairs, for the image whose name begins with ``better``, or a ``tie``."""
    pair = images.pairs[number]
    left, right = pair.images[::-1] if images.swapped(pair, voter) else pair.images
    pngs = images.pngs([pair.prompt_index])
    return {
        "prompt_index": pair.prompt_index,
        "left": left,
        "right": right,
        "left_digest": digest_of(pngs[pair.prompt_index, left]),
        "right_digest": digest_of(pngs[pair.prompt_index, right]),
        "choice": "tie" if better == "tie" else "left" if left.startswith(better) else "right",
        "time": "2026-01-01T00:00:00+00:00",
    }
