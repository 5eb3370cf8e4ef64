"""Held-out prompts -> images of base and fine-tuned model from the same noise, with scores; in one process."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cdpo_ray.evaluation.statistics import pairwise_rms_distance
from cdpo_ray.generation.generator import MakeScores, Sampling, list_column, sample_batches
from cdpo_ray.generation.images import encode_png
from cdpo_ray.models import load_model
from cdpo_ray.records import score_column

ARMS = ("base", "tuned")


class Comparer:
    """Rows of prompts -> rows with, for ``base`` and ``tuned``: a list of images, scores a judge, and the diversity."""

    def __init__(
        self, family: str, model: dict[str, Any], sampling: Sampling, *, training_dir: Path, make_scores: MakeScores
    ) -> None:
        self.model = load_model(family, **model)
        self.model.load_tuned(training_dir)
        self.sampling = sampling
        self.scores = make_scores()
        self.encoders = ThreadPoolExecutor(2)  # PNG encoding off the sampler's path

    def __call__(self, rows: pa.Table) -> pa.Table:
        prompts = rows["prompt"].to_pylist()
        conditioning, _ = self.model.encode_prompts(prompts)
        num_images = self.sampling.images_per_prompt
        for arm in ARMS:
            self.model.use_tuned(arm == "tuned")
            batches, scores = [], []
            pngs: list[Future[bytes]] = []
            for batch in sample_batches(self.model, prompts, conditioning, self.sampling):
                scores.append(self.scores(batch.images, batch.prompts))
                batches.append(batch.images.cpu().numpy())
                pngs.extend(self.encoders.submit(encode_png, image) for image in batches[-1])
            images = np.concatenate(batches)
            encoded = list_column([png.result() for png in pngs], num_images, pa.binary())
            rows = rows.append_column(f"{arm}_image", encoded)
            for judge in scores[0]:
                values = np.concatenate([batch[judge] for batch in scores])
                rows = rows.append_column(f"{arm}_{score_column(judge)}", list_column(values, num_images, pa.float64()))
            per_prompt = images.reshape(len(prompts), num_images, *images.shape[1:])
            diversity = [pairwise_rms_distance(few) if num_images > 1 else None for few in per_prompt]
            rows = rows.append_column(f"{arm}_diversity", pa.array(diversity, pa.float64()))
        return rows
