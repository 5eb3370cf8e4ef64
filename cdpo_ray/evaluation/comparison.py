"""Held-out prompts -> images and scores of base and fine-tuned model from the same noise, in one process."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cdpo_ray.dataflow.columns import list_column, tensor_column
from cdpo_ray.dataflow.memory import BatchSize
from cdpo_ray.dataflow.parts import IMAGES_PER_BATCH, images_of
from cdpo_ray.dataflow.quarantine import Quarantine
from cdpo_ray.generation.generator import Encoded, MakeScores, Sampling, sample_batches
from cdpo_ray.models import load_model
from cdpo_ray.models.family import Conditioning
from cdpo_ray.policy.implicit_rewards import implicit_values
from cdpo_ray.records import ARMS, IMPLICIT_VALUE, score_column


class Comparer:
    """Rows of prompts, or of pieces -> rows of `5-evaluation` (`records`), one list of images per model; without Ray.

    Images are returned as pixels: later tasks, which need no model, measure their appearance and encode them as PNG.

    Args:
        family, model: name in `FAMILIES` and the arguments of its ``load``.
        training_dir: `4-training`, which holds the fine-tuned model.
        num_margin_draws: timesteps and noises drawn for the implicit value of each base image; 0: no implicit values.
        quarantine: quarantine of the prompts that raise inside the model.
    """

    def __init__(
        self,
        family: str,
        model: dict[str, Any],
        sampling: Sampling,
        *,
        training_dir: Path,
        make_scores: MakeScores,
        num_margin_draws: int,
        quarantine: Quarantine,
    ) -> None:
        self.model = load_model(family, **model, for_training=num_margin_draws > 0, keep_vae=True)
        self.model.load_tuned(training_dir)
        self.sampling = sampling
        self.num_margin_draws = num_margin_draws
        self.scores = make_scores()
        self.quarantine = quarantine
        self.batch_size = BatchSize(sampling.images_per_batch)
        self.encoded = Encoded(self.model)

    def __call__(self, rows: pa.Table) -> pa.Table:
        return self.quarantine.apply(self.compared, rows)

    def compared(self, rows: pa.Table) -> pa.Table:
        prompts = rows["prompt"].to_pylist()
        conditioning, _ = self.encoded(prompts)
        indices = images_of(rows) or range(self.sampling.images_per_prompt)
        num_images, are_black = len(indices), []
        for arm in ARMS:
            self.model.use_tuned(arm == "tuned")
            pixels, latents, scores = [], [], []
            for batch in sample_batches(
                self.model, prompts, conditioning, self.sampling, self.scores, self.batch_size, images=indices
            ):
                scores.append(batch.scores)
                are_black.append(batch.is_black)
                latents.append(batch.latents)
                pixels.append(batch.images.cpu().numpy())
            rows = rows.append_column(f"{arm}_pixels", tensor_column(np.concatenate(pixels), num_images))
            for judge in scores[0]:
                values = np.concatenate([batch[judge] for batch in scores])
                rows = rows.append_column(f"{arm}_{score_column(judge)}", list_column(values, num_images, pa.float64()))
            if arm == "base" and self.num_margin_draws:
                values = self._implicit_values(prompts, conditioning, torch.cat(latents))
                rows = rows.append_column(IMPLICIT_VALUE, list_column(values, num_images, pa.float32()))
        black = np.concatenate(are_black).reshape(len(ARMS), rows.num_rows, num_images).swapaxes(0, 1)
        names = [f"{arm} {image}" for arm in ARMS for image in indices]
        self.quarantine.add_images(rows, black, names, len(ARMS) * self.sampling.images_per_prompt)
        return rows.append_column(IMAGES_PER_BATCH, pa.array([self.batch_size.num_images] * len(prompts), pa.int64()))

    def _implicit_values(self, prompts: list[str], conditioning: Conditioning, latents: Tensor) -> Any:
        num_images = len(latents) // len(prompts)
        return implicit_values(
            self.model,
            latents,
            {name: value.repeat_interleave(num_images, dim=0) for name, value in conditioning.items()},
            [prompt for prompt in prompts for _ in range(num_images)],
            num_draws=self.num_margin_draws,
            samples_per_launch=self.batch_size.num_images,
            seed=self.sampling.seed,
        )
