"""Policy at the end of a stage -> scores and diversity of its images of validation prompts."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.dataflow.images import pairwise_rms_distance
from cdpo_ray.generation.generator import Sampling, sample_batches
from cdpo_ray.models.family import TextToImageModel, rows_of
from cdpo_ray.policy.implicit_rewards import sample_values
from cdpo_ray.policy.policy import Policy
from cdpo_ray.rewards.scorer import Scorer
from cdpo_ray.store import read_shards, storage_path
from cdpo_ray.training.bank import SampleBank
from cdpo_ray.training.job import ValidationJob


class Validator:
    """Measures the policy; all workers take part, each with a share of the prompts."""

    def __init__(self, job: ValidationJob) -> None:
        samples_dir = storage_path(job.samples_dir)
        self.job = job
        self.sampling = Sampling(**job.sampling)
        self.prompts: list[str] = read_shards(samples_dir, ["prompt"])["prompt"].to_pylist()
        self.bank = SampleBank.open(samples_dir)
        self.scorer = Scorer(job.judges)

    def measure(self, policy: Policy, *, is_last: bool, worker_rank: int, num_workers: int) -> dict[str, Any]:
        """Measure the policy; collective. Uses no global RNG, so training is the same without it.

        Args:
            policy: its model must have a VAE.
            is_last: whether the stage is the last one.

        Returns:
            Plain lists, the same on each worker. ``scores``: ``[prompt][image]`` by judge. ``diversity``: ``[prompt]``,
            see `pairwise_rms_distance`. ``implicit_values``, if measured: ``[prompt][image]`` of the base model's
            images, higher: preferred by the policy. Empty if this stage is not measured.
        """
        model = policy.model
        if self.job.only_last and not is_last:
            return {}
        num_prompts = len(self.prompts)
        if not is_last:
            num_prompts = min(num_prompts, self.job.early_prompts or num_prompts)
        model.denoiser.eval()
        found = self._sampled(model, num_prompts, worker_rank, num_workers)
        model.denoiser.train()
        if self.job.num_margin_draws:
            values = sample_values(
                policy,
                self.bank.latents,
                self.bank.conditioning,
                num_prompts=num_prompts,
                kappa=0.5,  # any positive value gives the same order
                num_draws=self.job.num_margin_draws,
                samples_per_launch=self.sampling.images_per_batch,
                seed=self.sampling.seed,
                stage=0,  # the same draws at each stage
                worker_rank=worker_rank,
                num_workers=num_workers,
            )
            found["implicit_values"] = values.mean(axis=0).tolist()
        return found

    def _sampled(self, model: TextToImageModel, num_prompts: int, rank: int, num_workers: int) -> dict[str, Any]:
        num_images = self.sampling.images_per_prompt
        # Past the last prompt a worker samples that one again and drops it: ZeRO 3 needs the same launches everywhere.
        rows = [min(first + rank, num_prompts - 1) for first in range(0, num_prompts, num_workers)]
        conditioning = {
            name: value.to(model.device, model.dtype) for name, value in rows_of(self.bank.conditioning, rows).items()
        }
        prompts = [self.prompts[row] for row in rows]
        batches = list(sample_batches(model, prompts, conditioning, self.sampling, self.scorer))
        images = torch.cat([batch.images for batch in batches]).cpu().numpy()
        per_prompt = images.reshape(len(rows), num_images, *images.shape[1:])
        columns = [np.concatenate([batch.scores[judge] for batch in batches]) for judge in self.job.judges]
        scores = np.stack(columns).reshape(len(columns), len(rows), num_images)
        diversity = np.array([pairwise_rms_distance(few) for few in per_prompt])
        own = range(rank, num_prompts, num_workers)

        def shared(values: NDArray[np.float64]) -> Any:
            """``[..., own row]`` of each worker -> nested lists ``[..., prompt]`` of all; collective."""
            whole = torch.zeros(*values.shape[:-1], num_prompts, dtype=torch.float64)
            whole[..., own] = torch.from_numpy(values)[..., : len(own)]
            return _summed(whole.to(model.device), num_workers).cpu().numpy()

        by_judge = shared(scores.swapaxes(1, 2)).swapaxes(1, 2)
        return {
            "scores": {judge: by_judge[row].tolist() for row, judge in enumerate(self.job.judges)},
            "diversity": shared(diversity).tolist(),
        }


def _summed(values: Tensor, num_workers: int) -> Tensor:
    if num_workers > 1:
        torch.distributed.all_reduce(values)
    return values
