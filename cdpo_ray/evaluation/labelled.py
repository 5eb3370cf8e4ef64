"""Human preferences on held-out prompts -> how often the fine-tuned model prefers the same image."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cdpo_ray.dataflow.columns import list_column
from cdpo_ray.evaluation.metrics import preference_accuracy
from cdpo_ray.models import load_model
from cdpo_ray.policy.implicit_rewards import implicit_values
from cdpo_ray.prompts.sources import held_out
from cdpo_ray.records import CONDITIONING, IMPLICIT_VALUE, LABEL, score_column


@dataclass(frozen=True)
class LabelledSamples:
    """Location of imported samples, and which of them are held out.

    Attributes:
        heldout_fraction: share of prompts that are held out, by hash.
        rewards: rewards that scored the samples too.
        samples_per_launch: number of samples in one forward pass.
    """

    samples_dir: Path
    heldout_fraction: float
    rewards: tuple[str, ...]
    samples_per_launch: int


def only_held_out(rows: pa.Table, *, fraction: float) -> pa.Table:
    """Rows of prompts that are not trained on."""
    return rows.filter(held_out(rows["prompt"].to_pylist(), fraction))


class ImplicitValueModel:
    """Rows of samples -> the same rows with one implicit value per sample; independent of Ray.

    Args:
        family, model: name in `FAMILIES` and the arguments of its ``load``.
        training_dir: `4-training`, which holds the fine-tuned model.
        num_margin_draws, samples_per_launch, seed: arguments of `implicit_values`.
    """

    def __init__(
        self,
        family: str,
        model: dict[str, Any],
        *,
        training_dir: Path,
        num_margin_draws: int,
        samples_per_launch: int,
        seed: int,
    ) -> None:
        self.model = load_model(family, **model, for_training=True)
        self.model.load_tuned(training_dir)
        self.settings = {"num_draws": num_margin_draws, "samples_per_launch": samples_per_launch, "seed": seed}

    def __call__(self, rows: pa.Table) -> pa.Table:
        latents = torch.from_numpy(rows["latents"].combine_chunks().to_numpy_ndarray().copy())
        num_samples = latents.shape[1]
        conditioning = {
            name: torch.from_numpy(rows[name].combine_chunks().to_numpy_ndarray().copy()).repeat_interleave(
                num_samples, dim=0
            )
            for name in CONDITIONING
            if name in rows.column_names
        }
        prompts = [prompt for prompt in rows["prompt"].to_pylist() for _ in range(num_samples)]
        values = implicit_values(self.model, latents.flatten(0, 1), conditioning, prompts, **self.settings)
        return rows.append_column(IMPLICIT_VALUE, list_column(values, num_samples, pa.float32()))


def label_accuracy(
    rows: pa.Table, rewards: tuple[str, ...], *, num_resamples: int, seed: int
) -> Mapping[str, dict[str, Any] | None]:
    """How often the fine-tuned model, and each reward, orders two images as people did; each prompt counts once.

    Args:
        rows: output of `ImplicitValueModel`; a prompt may have several rows.
        num_resamples, seed: number of draws and seed of the bootstrap over prompts.

    Returns:
        `preference_accuracy` of ``policy`` and of each reward that scored the rows.
    """

    def column(name: str) -> np.ndarray:
        return np.array(rows[name].to_pylist(), dtype=float)

    labels = column(score_column(LABEL))
    values = {"policy": column(IMPLICIT_VALUE)}
    values |= {name: column(score_column(name)) for name in rewards if score_column(name) in rows.column_names}
    prompt_numbers = rows["prompt"].combine_chunks().dictionary_encode().indices.to_numpy()
    return {
        name: preference_accuracy(value, labels, prompt_numbers=prompt_numbers, num_resamples=num_resamples, seed=seed)
        for name, value in values.items()
    }
