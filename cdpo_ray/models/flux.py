"""The FLUX family: a guidance-conditioned flow-matching transformer on 2x2 patches of latents."""

import functools
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net, Times, uniform_between
from cdpo_ray.models.flow_matching import FlowMatchingModel
from cdpo_ray.models.layouts import NUM_TIMESTEPS
from cdpo_ray.models.stable_diffusion import tokens_cut


class Flux(FlowMatchingModel):
    """Latents are stored as ``[sample, 16, height, width]``, and packed into patches for the transformer only.

    FLUX.1-dev is guidance-conditioned; FLUX.1-schnell is not. Neither needs the empty prompt.
    """

    family = "flux"
    pipeline_class = FluxPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    guidance_range = (3.5, 3.5)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        native, factor = self.pipeline.default_sample_size, self.pipeline.vae_scale_factor
        channels = self.denoiser.config.in_channels // 4
        return channels, height // factor if height else native, width // factor if width else native

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[Conditioning, list[int]]:
        limit = max_t5_tokens(self.denoiser.config)
        with self.on_device(*self.text_encoders):
            embeddings, pooled, _ = self.pipeline.encode_prompt(
                prompts, None, device=self.device, max_sequence_length=limit
            )
        return {"prompt_embedding": embeddings, "pooled_embedding": pooled}, tokens_cut(
            self.pipeline.tokenizer_2, prompts, limit
        )

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, noise: Tensor, *, num_denoising_steps: int, guidance_scale: float
    ) -> Tensor:
        packed = super().sample(
            conditioning, noise, num_denoising_steps=num_denoising_steps, guidance_scale=guidance_scale
        )
        return unpack(packed, *noise.shape[-2:])

    def pipeline_arguments(self, conditioning: Conditioning, guidance_scale: float) -> dict[str, Any]:
        return super().pipeline_arguments(conditioning, guidance_scale=1)

    def pipeline_latents(self, noise: Tensor) -> Tensor:
        return pack(super().pipeline_latents(noise))

    def draw_times(self, generator: torch.Generator) -> Times:
        times = super().draw_times(generator)
        if self.denoiser.config.guidance_embeds:
            times["guidance"] = uniform_between(self.guidance_range, generator)
        return times

    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        height, width = task.noisy_latents.shape[-2:]
        embeddings = task.conditioning["prompt_embedding"]
        prediction: Tensor = denoiser(
            hidden_states=pack(task.noisy_latents),
            timestep=task.times["timestep"].to(self.dtype) / NUM_TIMESTEPS,  # rounded as in the pipeline
            guidance=task.times.get("guidance"),
            pooled_projections=task.conditioning["pooled_embedding"],
            encoder_hidden_states=embeddings,
            txt_ids=torch.zeros(embeddings.shape[1], 3, device=embeddings.device, dtype=self.dtype),
            img_ids=patch_ids(height // 2, width // 2, embeddings.device, self.dtype),
            return_dict=False,
        )[0]
        return unpack(prediction, height, width)


def max_t5_tokens(config: Any) -> int:
    """Number of T5 tokens per prompt, including the end token: 512 for FLUX.1-dev, 256 for FLUX.1-schnell.

    Their tokenizers have the same limit; only ``guidance_embeds`` of the transformer's configuration differs.

    Args:
        config: of the transformer.

    Source: the models' published inference code.
    """
    return 512 if config.guidance_embeds else 256


def pack(latents: Tensor) -> Tensor:
    """``[sample, channel, height, width]`` -> one row per 2x2 patch, ``[sample, height/2 * width/2, channel * 4]``."""
    sample, channel, height, width = latents.shape
    patches = latents.reshape(sample, channel, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(sample, height // 2 * (width // 2), channel * 4)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack`.

    Args:
        height, width: of the latents.
    """
    sample, _, packed = patches.shape
    latents = patches.reshape(sample, height // 2, width // 2, packed // 4, 2, 2)
    return latents.permute(0, 3, 1, 4, 2, 5).reshape(sample, packed // 4, height, width)


@functools.lru_cache(maxsize=8)  # a copy from host memory in every forward pass would synchronise with the GPU
def patch_ids(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Position of each patch in the grid of patches: ``[height * width, 3]``, rows ``(0, row, column)``."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(device, dtype)
