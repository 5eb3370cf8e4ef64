"""The SANA family: a flow-matching transformer with linear attention on latents of 32 x 32 pixels, and Gemma 2."""

import functools
import inspect
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net
from cdpo_ray.models.flow_matching import FlowMatchingModel, real_tokens
from cdpo_ray.models.stable_diffusion import tokens_cut

MAX_TOKENS = 300
"""Number of embeddings per prompt; the default of the pipeline."""
INSTRUCTION: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
"""Lines that the pipeline puts before each prompt, but not before the empty one of guidance."""


class Sana(FlowMatchingModel):
    """Sampling with the model's scheduler: DPM-Solver++ in the published models, or Euler."""

    family = "sana"
    pipeline_class = SanaPipeline
    mask_argument = "prompt_attention_mask"

    def encode_prompts(self, prompts: list[str]) -> tuple[Conditioning, list[int]]:
        instruction = "\n".join(INSTRUCTION)
        limit = len(self.pipeline.tokenizer.encode(instruction)) + MAX_TOKENS - 2
        as_encoded = [instruction + prompt.lower().strip() for prompt in prompts]
        return self._encode(prompts, INSTRUCTION), tokens_cut(self.pipeline.tokenizer, as_encoded, limit)

    @functools.cached_property
    def empty_conditioning(self) -> Conditioning:
        return self._encode([""], None)

    @torch.no_grad()
    def _encode(self, prompts: list[str], instruction: list[str] | None) -> Conditioning:
        with self.on_device(*self.text_encoders):
            embeddings, mask, _, _ = self.pipeline.encode_prompt(
                prompts,
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=MAX_TOKENS,
                complex_human_instruction=instruction,
            )
        return {"prompt_embedding": embeddings * mask[:, :, None]}

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, noise: Tensor, *, num_denoising_steps: int, guidance_scale: float
    ) -> Tensor:
        latents = super().sample(
            conditioning, noise, num_denoising_steps=num_denoising_steps, guidance_scale=guidance_scale
        )
        return latents.to(self.dtype)  # the pipeline's are fp32

    def pipeline_arguments(self, conditioning: Conditioning, guidance_scale: float) -> dict[str, Any]:
        arguments = super().pipeline_arguments(conditioning, guidance_scale)
        # binning would change the given size; the default negative prompt excludes embeddings of one
        return arguments | {"negative_prompt": None, "use_resolution_binning": False}

    def vae_encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latents: Tensor = self.pipeline.vae.encode(pixels).latent
        return latents, torch.zeros_like(latents)  # a deterministic autoencoder

    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        embeddings = task.conditioning["prompt_embedding"]
        prediction: Tensor = denoiser(
            hidden_states=task.noisy_latents,
            timestep=task.times["timestep"] * self.denoiser.config.timestep_scale,
            encoder_hidden_states=embeddings,
            encoder_attention_mask=real_tokens(embeddings),
            return_dict=False,
        )[0]
        return prediction
