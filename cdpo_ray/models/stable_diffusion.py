"""The Stable Diffusion family (SD1.5, SD2.1 and similar): a latent diffusion model with one text encoder."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net, TextToImageModel, Times
from cdpo_ray.models.layouts import NUM_TIMESTEPS
from cdpo_ray.models.noising import add_noise, denoising_target
from cdpo_ray.testbed import PIPELINE_DIR


class StableDiffusion(TextToImageModel):
    """DDIM sampling; epsilon or v prediction, noise schedule and timesteps as the model's scheduler configures.

    DDIM without added noise is Euler's method in other coordinates, so few-step models that are published with Euler's
    scheduler (SD-Turbo) are sampled as published.
    """

    family = "stable_diffusion"
    pipeline_class = StableDiffusionPipeline
    scheduler_class: ClassVar = DDIMScheduler
    load_options: ClassVar = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    embedded_dir: ClassVar[Path | None] = PIPELINE_DIR

    def __init__(self, pipeline: Any, *, dtype: torch.dtype, device: str) -> None:
        super().__init__(pipeline, dtype=dtype, device=device)
        config = pipeline.scheduler.config
        # the configuration of another scheduler class may lack `clip_sample`; latents are unbounded
        changes = {"clip_sample": False}
        if config.get("timestep_spacing") == "trailing":
            # the last step is a long one; to the first timestep it would leave noise of 3 %, Euler's ends without noise
            changes["set_alpha_to_one"] = True
        pipeline.scheduler = self.scheduler_class.from_config(config, **changes)
        self.alphas_cumprod: Tensor = pipeline.scheduler.alphas_cumprod.to(device)
        self.prediction_type = pipeline.scheduler.config.prediction_type

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[Conditioning, list[int]]:
        with self.on_device(*self.text_encoders):
            embeddings, _ = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embedding": embeddings}, tokens_cut(self.pipeline.tokenizer, prompts)

    def draw_times(self, generator: torch.Generator) -> Times:
        """Uniform timestep, 0 to 999, as `timesteps` restrict it."""
        return {"timestep": self.timesteps.draw_from(torch.arange(NUM_TIMESTEPS), generator)}

    def sampler_timesteps(self, num_denoising_steps: int) -> tuple[int, ...]:
        """Timesteps at which the sampler calls the denoiser, highest first."""
        scheduler = self.scheduler_class.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(num_denoising_steps)
        return tuple(scheduler.timesteps.tolist())

    def denoising_task(
        self, reference: Net, latents: Tensor, conditioning: Conditioning, times: Times, noise: Tensor
    ) -> DenoisingTask:
        alpha_bar = self.alphas_cumprod[times["timestep"]]
        return DenoisingTask(
            add_noise(latents, noise, alpha_bar).to(self.dtype),
            times,
            conditioning,
            denoising_target(latents, noise, alpha_bar, self.prediction_type),
        )

    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        prediction: Tensor = denoiser(
            task.noisy_latents,
            task.times["timestep"],
            encoder_hidden_states=task.conditioning["prompt_embedding"],
            return_dict=False,
        )[0]
        return prediction


def tokens_cut(tokenizer: Any, prompts: list[str], limit: int | None = None) -> list[int]:
    """Number of tokens of each prompt that are truncated.

    Args:
        limit: maximum number of tokens; `None`: the tokenizer's.
    """
    lengths = [len(ids) for ids in tokenizer(prompts, truncation=False, verbose=False).input_ids]
    return [max(0, length - (limit or tokenizer.model_max_length)) for length in lengths]
