"""The Stable Diffusion family (SD1.5, SD2.1 and their like): a latent diffusion model with one text encoder."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net, TextToImageModel, Times
from cdpo_ray.models.noising import add_noise, denoising_target
from cdpo_ray.testbed import PIPELINE_DIR

NUM_TIMESTEPS = 1000


class StableDiffusion(TextToImageModel):
    """DDIM sampling; epsilon or v prediction, as the model's own scheduler says."""

    pipeline_class = StableDiffusionPipeline
    scheduler_class: ClassVar = DDIMScheduler
    load_options: ClassVar = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def __init__(self, pipeline: Any, *, dtype: torch.dtype, device: str) -> None:
        super().__init__(pipeline, dtype=dtype, device=device)
        pipeline.scheduler = self.scheduler_class.from_config(pipeline.scheduler.config)
        self.alphas_cumprod: Tensor = pipeline.scheduler.alphas_cumprod.to(device)
        self.prediction_type = pipeline.scheduler.config.prediction_type

    @classmethod
    def embedded_pipeline(cls) -> Path:
        return PIPELINE_DIR

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[Conditioning, list[int]]:
        embeddings, _ = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embedding": embeddings}, tokens_cut(self.pipeline.tokenizer, prompts)

    def pipeline_arguments(self, conditioning: Conditioning, guidance_scale: float) -> dict[str, Any]:
        embeddings = conditioning["prompt_embedding"]
        empty = self.empty_conditioning["prompt_embedding"].expand_as(embeddings) if guidance_scale > 1 else None
        return {"prompt_embeds": embeddings, "negative_prompt_embeds": empty}

    def draw_times(self, generator: torch.Generator) -> Times:
        """Uniform over the 1000 timesteps."""
        return {"timestep": torch.randint(NUM_TIMESTEPS, (), generator=generator)}

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
    """How many tokens of each prompt are beyond the tokenizer's limit, or another."""
    lengths = [len(ids) for ids in tokenizer(prompts, truncation=False, verbose=False).input_ids]
    return [max(0, length - (limit or tokenizer.model_max_length)) for length in lengths]
