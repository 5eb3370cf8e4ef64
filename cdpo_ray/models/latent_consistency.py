"""The latent consistency family (LCM): few denoising steps, distilled from a Stable Diffusion model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from cdpo_ray.models.consistency import (
    GRID_STEP,
    clean_and_noise,
    consistency_function,
    ddim_step,
    grid_timesteps,
    guidance_embedding,
    guided,
    pseudo_huber,
)
from cdpo_ray.models.family import Conditioning, DenoisingTask, Net, Times, uniform_between
from cdpo_ray.models.folder import check_teacher, folder_of, read_config
from cdpo_ray.models.layouts import config_path
from cdpo_ray.models.loading import fetch, load_error, load_part
from cdpo_ray.models.noising import PredictionType, add_noise
from cdpo_ray.models.stable_diffusion import StableDiffusion
from cdpo_ray.randomness.noise import generator_at
from cdpo_ray.testbed import PIPELINE_DIR
from cdpo_ray.testbed.consistency import load_consistency_pipeline


class LatentConsistency(StableDiffusion):
    """Guidance-conditioned model, trained towards the sample's own latents, or the published target.

    The published target is the frozen reference's output one teacher step later; see `docs/paper_map.md` for the
    derivation of why it hardly teaches a preference. It takes four forward passes per batch of pairs: teacher,
    reference after the teacher's step, reference, policy; the sample's own latents take the last two.

    Source: arXiv:2310.04378; arXiv:2405.13637 for preferences.
    """

    family = "latent_consistency"
    pipeline_class = LatentConsistencyModelPipeline
    scheduler_class = LCMScheduler
    guidance_range = (5.0, 15.0)
    step_down: int = GRID_STEP
    """Number of timesteps that one teacher step covers; published: one step of the grid."""
    teacher: UNet2DConditionModel | None = None
    """Source of the published target; `None`: the target is the sample's latents."""
    teacher_prediction_type: PredictionType

    def __init__(self, pipeline: Any, *, dtype: torch.dtype, device: str) -> None:
        super().__init__(pipeline, dtype=dtype, device=device)
        self.final_alpha_bar: Tensor = pipeline.scheduler.final_alpha_cumprod.to(device)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        teacher: Mapping[str, str] | None = None,
        for_training: bool = False,
        **options: Any,
    ) -> Self:
        """Load the model, and its teacher for training; other arguments and errors as in `TextToImageModel.load`.

        Args:
            teacher: ``path`` (``embedded``, a folder or a hub id) and ``revision`` of the Stable Diffusion model that
                this one was distilled from, for the published target; `None`: the target is the sample's latents.
        """
        model = super().load(path, for_training=for_training, **options)
        if for_training and teacher:
            model.teacher, model.teacher_prediction_type = load_teacher(
                **teacher,
                student_dir=folder_of(path, options.get("revision")),
                dtype=model.dtype,
            )
            model.prepare(model.teacher.to(model.device))
        return model

    @classmethod
    def load_pipeline(cls, path: str, revision: str | None, dtype: torch.dtype, left_out: Mapping[str, None]) -> Any:
        if path != "embedded":
            return super().load_pipeline(path, revision, dtype, left_out)
        pipeline = load_consistency_pipeline(dtype)
        for name in left_out:
            setattr(pipeline, name, None)
        return pipeline

    def pipeline_arguments(self, conditioning: Conditioning, guidance_scale: float) -> dict[str, Any]:
        return {"prompt_embeds": conditioning["prompt_embedding"]}  # the pipeline embeds the guidance

    def sampler_generators(self, noise: Tensor) -> list[torch.Generator]:
        """One generator per sample, seeded by its initial noise: an image stays a function of that noise.

        The sampler adds new noise at every denoising step but the last.
        """
        return [generator_at("sampler", one.numpy().tobytes().hex()) for one in noise.float().cpu()]

    def draw_times(self, generator: torch.Generator) -> Times:
        """Uniform timestep of the grid, as `timesteps` restrict it, and guidance ``w``.

        A pipeline's ``guidance_scale`` is ``w + 1``.
        """
        return {
            "timestep": self.timesteps.draw_from(grid_timesteps(), generator),
            "guidance": uniform_between(self.guidance_range, generator),
        }

    def denoising_task(
        self, reference: Net, latents: Tensor, conditioning: Conditioning, times: Times, noise: Tensor
    ) -> DenoisingTask:
        """Noisy latents; the target is the latents, or the reference's output after one step of the guided teacher.

        From the lowest timestep of the grid, 19, the teacher steps to 0 and to the scheduler's ``final_alpha_cumprod``,
        as DDIM does. The consistency function is the identity there, so the teacher's clean latents are the target.
        """
        timestep = times["timestep"]
        alpha_bar = self.alphas_cumprod[timestep]
        noisy_latents = add_noise(latents, noise, alpha_bar).to(self.dtype)
        if self.teacher is None:
            return DenoisingTask(noisy_latents, times, conditioning, latents.float())
        prediction = self._teacher_prediction(noisy_latents, conditioning, times)
        next_timestep = (timestep - self.step_down).clamp(min=0)
        next_alpha_bar = torch.where(
            timestep < self.step_down, self.final_alpha_bar, self.alphas_cumprod[next_timestep]
        )
        next_latents = ddim_step(noisy_latents, prediction, alpha_bar, next_alpha_bar, self.teacher_prediction_type).to(
            self.dtype
        )
        target = self._denoised(reference, next_latents, conditioning, {**times, "timestep": next_timestep})
        return DenoisingTask(noisy_latents, times, conditioning, target)

    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        return self._denoised(denoiser, task.noisy_latents, task.conditioning, task.times)

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of the latents, or the pseudo-Huber distance to the published target."""
        return pseudo_huber(prediction, target) if self.teacher else super().error(prediction, target)

    def _denoised(self, denoiser: Net, noisy_latents: Tensor, conditioning: Conditioning, times: Times) -> Tensor:
        """Consistency function of noisy latents, ``[sample, channel, height, width]`` fp32."""
        timestep = times["timestep"]
        embedding = guidance_embedding(times["guidance"], self.denoiser.config.time_cond_proj_dim)
        prediction = denoiser(
            noisy_latents,
            timestep,
            encoder_hidden_states=conditioning["prompt_embedding"],
            timestep_cond=embedding.to(self.dtype),
            return_dict=False,
        )[0]
        clean, _ = clean_and_noise(noisy_latents, prediction, self.alphas_cumprod[timestep], self.prediction_type)
        return consistency_function(noisy_latents, clean, timestep)

    @torch.no_grad()
    def _teacher_prediction(self, noisy_latents: Tensor, conditioning: Conditioning, times: Times) -> Tensor:
        """Guided prediction, fp32; with and without the prompt in one forward pass."""
        prompt = conditioning["prompt_embedding"]
        empty = self.empty_conditioning["prompt_embedding"].to(prompt.dtype).expand_as(prompt)
        assert self.teacher is not None, "called with a teacher only"
        both = self.teacher(
            torch.cat([noisy_latents, noisy_latents]),
            torch.cat([times["timestep"], times["timestep"]]),
            encoder_hidden_states=torch.cat([prompt, empty]),
            return_dict=False,
        )[0]
        with_prompt, without_prompt = both.chunk(2)
        return guided(with_prompt, without_prompt, times["guidance"])


def load_teacher(
    path: str, revision: str | None = None, *, student_dir: Path | None, dtype: torch.dtype
) -> tuple[UNet2DConditionModel, PredictionType]:
    """Load the frozen UNet of a Stable Diffusion model, and its prediction type.

    Args:
        path, revision: ``embedded``, a folder, or a hub id at a revision.
        student_dir: folder of the consistency model that was distilled from it; `None`: not on this machine.

    Raises:
        ModelError: if nothing loadable is found, or it does not fit the student.
    """
    left_out = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    model_dir = (
        PIPELINE_DIR
        if path == "embedded"
        else fetch(StableDiffusionPipeline, path, revision, dict.fromkeys(left_out), key="model.teacher.path")
    )
    check_teacher(model_dir, student=student_dir, partial=not Path(path).is_dir())
    try:
        unet = load_part(UNet2DConditionModel, model_dir / "unet", dtype)
        scheduler = read_config(model_dir / config_path("scheduler"))
    except Exception as error:
        raise load_error("model.teacher.path", path, revision, error) from None
    return unet.requires_grad_(False).eval(), scheduler.get("prediction_type", "epsilon")
