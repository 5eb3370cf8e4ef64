"""Latent consistency models: few denoising steps, trained against a diffusion model's guided step."""

import hashlib
from collections.abc import Mapping
from typing import Any, Self

import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
from torch import Tensor

from cdpo_ray.models.consistency import (
    GRID_STEP,
    NUM_GRID_CELLS,
    clean_and_noise,
    consistency_function,
    ddim_step,
    guidance_embedding,
    guided,
    pseudo_huber,
)
from cdpo_ray.models.family import Conditioning, DenoisingTask, Net, Times, cannot_be_loaded, uniform_between
from cdpo_ray.models.noising import PredictionType, add_noise
from cdpo_ray.models.stable_diffusion import StableDiffusion
from cdpo_ray.testbed import PIPELINE_DIR
from cdpo_ray.testbed.consistency import load_consistency_pipeline


class LatentConsistency(StableDiffusion):
    """The error is how far the net lands from where the reference lands after the teacher's guided step.

    ``d(f_policy(z_t, t, w), f_reference(z_s, s, w))`` with the teacher's step from ``z_t`` to ``z_s``, one cell of the
    grid; four launches a batch: teacher, target, reference, policy.

    Attributes:
        teacher: the diffusion model that the model was distilled from; only for training.

    Source: arXiv:2310.04378; as a preference loss arXiv:2405.13637.
    """

    pipeline_class = LatentConsistencyModelPipeline
    scheduler_class = LCMScheduler
    guidance_range = (5.0, 15.0)
    teacher: UNet2DConditionModel
    teacher_prediction_type: PredictionType

    @classmethod
    def load(cls, path: str, *, teacher: Mapping[str, Any] | None = None, **arguments: Any) -> Self:
        """As every family; `teacher` (`path`, `revision`) is loaded for training.

        Raises:
            ModelError: nothing that can be loaded is there.
        """
        model = super().load(path, **arguments)
        if arguments.get("for_training"):
            model.load_teacher(**(teacher or {"path": str(PIPELINE_DIR)}))
        return model

    @classmethod
    def load_pipeline(cls, path: str, revision: str | None, dtype: torch.dtype, left_out: Mapping[str, None]) -> Any:
        if path != "embedded":
            return super().load_pipeline(path, revision, dtype, left_out)
        pipeline = load_consistency_pipeline(dtype)
        for part in left_out:
            setattr(pipeline, part, None)
        return pipeline

    def load_teacher(self, path: str, revision: str | None = None) -> None:
        """Load the teacher's net, frozen, in the model's type."""
        try:
            found = {"pretrained_model_name_or_path": path, "revision": revision}
            teacher = UNet2DConditionModel.from_pretrained(
                **found, subfolder="unet", torch_dtype=self.dtype, use_safetensors=True
            )
            scheduler = DDIMScheduler.from_pretrained(**found, subfolder="scheduler")
        except OSError as error:
            raise cannot_be_loaded("model.teacher", path, revision, error) from None
        self.teacher = teacher.to(self.device).requires_grad_(False).eval()
        self.teacher_prediction_type = scheduler.config.prediction_type

    def pipeline_arguments(self, conditioning: Conditioning, noise: Tensor, guidance_scale: float) -> dict[str, Any]:
        """The pipeline embeds the guidance. The noise it adds between steps is a function of the first noise alone."""
        generators = [torch.Generator().manual_seed(_seed_in(sample)) for sample in noise]
        return {"prompt_embeds": conditioning["prompt_embedding"], "generator": generators}

    def draw_times(self, generator: torch.Generator) -> Times:
        """A place of the grid 19, 39, ..., 999, and a guidance ``w``; both images of a pair share them."""
        cell = torch.randint(NUM_GRID_CELLS, (), generator=generator)
        return {
            "timestep": GRID_STEP * cell + GRID_STEP - 1,
            "guidance": uniform_between(self.guidance_range, generator),
        }

    def denoising_task(
        self, reference: Net, latents: Tensor, conditioning: Conditioning, times: Times, noise: Tensor
    ) -> DenoisingTask:
        timesteps = times["timestep"]
        noisy_latents = add_noise(latents, noise, self.alphas_cumprod[timesteps]).to(self.dtype)
        previous = (timesteps - GRID_STEP).clamp(min=0)
        clean, predicted_noise = self.ask_teacher(noisy_latents, timesteps, conditioning, times["guidance"])
        less_noisy = ddim_step(clean, predicted_noise, self.alphas_cumprod[previous]).to(self.dtype)
        landed = self.predict(
            reference, DenoisingTask(less_noisy, times | {"timestep": previous}, conditioning, less_noisy)
        )
        return DenoisingTask(noisy_latents, times, conditioning, landed)

    def ask_teacher(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The teacher's guided clean latents and noise; with and without the prompt in one launch."""
        embeddings = conditioning["prompt_embedding"]
        empty = self.empty_conditioning["prompt_embedding"].to(embeddings).expand_as(embeddings)
        output = self.teacher(
            torch.cat([noisy_latents, noisy_latents]),
            torch.cat([timesteps, timesteps]),
            encoder_hidden_states=torch.cat([embeddings, empty]),
            return_dict=False,
        )[0]
        alpha_bar = self.alphas_cumprod[timesteps]
        told, untold = (
            clean_and_noise(noisy_latents, half, alpha_bar, self.teacher_prediction_type) for half in output.chunk(2)
        )
        clean, noise = (guided(*both, guidance) for both in zip(told, untold, strict=True))
        return clean, noise

    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        """``f(z, t, w)``: where the net lands."""
        timesteps = task.times["timestep"]
        channels = self.denoiser.config.time_cond_proj_dim
        output = denoiser(
            task.noisy_latents,
            timesteps,
            encoder_hidden_states=task.conditioning["prompt_embedding"],
            timestep_cond=guidance_embedding(task.times["guidance"], channels).to(self.dtype),
            return_dict=False,
        )[0]
        clean, _ = clean_and_noise(task.noisy_latents, output, self.alphas_cumprod[timesteps], self.prediction_type)
        return consistency_function(task.noisy_latents, clean, timesteps)

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        return pseudo_huber(prediction, target)


def _seed_in(noise: Tensor) -> int:
    digest = hashlib.blake2b(noise.float().cpu().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
