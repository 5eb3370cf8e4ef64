"""Policy at a stage's end -> its images of validation prompts, judged."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.dataflow.images import pairwise_rms_distance
from cdpo_ray.generation.generator import Sampling, sample_batches
from cdpo_ray.models.family import Net, TextToImageModel, rows_of
from cdpo_ray.policy.implicit_rewards import sample_values
from cdpo_ray.policy.policy import Reference
from cdpo_ray.rewards.scorer import Scorer
from cdpo_ray.store import read_shards, storage_path
from cdpo_ray.training.batches import SampleBank
from cdpo_ray.training.job import ValidationJob


class Validator:
    """What a worker measures policies with; all workers share the prompts."""

    def __init__(self, job: ValidationJob) -> None:
        samples_dir = storage_path(job.samples_dir)
        self.job = job
        self.sampling = Sampling(**job.sampling)
        self.prompts: list[str] = read_shards(samples_dir, ["prompt"])["prompt"].to_pylist()
        self.bank = SampleBank.read(samples_dir)
        self.scorer = Scorer(job.judges)

    def measure(
        self,
        model: TextToImageModel,
        policy: Net,
        reference: Reference,
        *,
        is_last: bool,
        worker_rank: int,
        num_workers: int,
    ) -> dict[str, Any]:
        """Called by all workers together; draws from no global generator, so training is the same with and without.

        Args:
            model: with its VAE; its denoiser is the policy.
            policy, reference: what is called to run each, as in `errors.sample_errors`.
            is_last: whether this stage is.

        Returns:
            Plain lists, the same on each worker. ``scores``: ``[prompt][image]`` a judge. ``diversity``: ``[prompt]``,
            see `pairwise_rms_distance`. ``implicit_values``: ``[prompt][image]`` of the base model's images, the more,
            the more the policy favours them; none if they were left out. Nothing at a stage that is not measured.
        """
        if self.job.only_last and not is_last:
            return {}
        num_prompts = len(self.prompts)
        if not is_last:
            num_prompts = min(num_prompts, self.job.early_prompts or num_prompts)
        model.denoiser.eval()
        found = self._sampled(model, num_prompts, worker_rank, num_workers)
        model.denoiser.train()
        if self.job.num_margin_draws:
            found["implicit_values"] = sample_values(
                model,
                policy,
                reference,
                self.bank.latents[:num_prompts],
                rows_of(self.bank.conditioning, slice(num_prompts)),
                kappa=0.5,  # any positive value: it changes no order
                num_draws=self.job.num_margin_draws,
                samples_per_launch=self.sampling.images_per_batch,
                seed=self.sampling.seed,
                stage=0,  # the same draws at each stage
                worker_rank=worker_rank,
                num_workers=num_workers,
            ).tolist()
        return found

    def _sampled(self, model: TextToImageModel, num_prompts: int, rank: int, num_workers: int) -> dict[str, Any]:
        num_images = self.sampling.images_per_prompt
        # Past the last prompt a worker samples that one again, for nothing: under ZeRO 3 all must launch alike.
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
        apart = np.array([pairwise_rms_distance(few) for few in per_prompt])
        own = range(rank, num_prompts, num_workers)

        def shared(values: NDArray[np.float64]) -> Any:
            """``[..., own row]`` of every worker -> lists of ``[..., prompt]``."""
            whole = torch.zeros(*values.shape[:-1], num_prompts, dtype=torch.float64)
            whole[..., own] = torch.from_numpy(values)[..., : len(own)]
            return _summed(whole.to(model.device), num_workers).cpu().numpy()

        by_judge = shared(scores.swapaxes(1, 2)).swapaxes(1, 2)
        return {
            "scores": {judge: by_judge[row].tolist() for row, judge in enumerate(self.job.judges)},
            "diversity": shared(apart).tolist(),
        }


def _summed(values: Tensor, num_workers: int) -> Tensor:
    if num_workers > 1:
        torch.distributed.all_reduce(values)
    return values
