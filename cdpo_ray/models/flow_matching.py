"""Base classes of the flow-matching families: straight paths from data to noise, with their velocity as the target."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net, TextToImageModel, Times
from cdpo_ray.models.layouts import NUM_TIMESTEPS
from cdpo_ray.models.noising import flow_interpolant, flow_velocity
from cdpo_ray.models.stable_diffusion import tokens_cut

MAX_CHAT_TOKENS = 512
"""Number of tokens per prompt of the families whose text encoder reads a chat, the default of their pipelines."""


class FlowMatchingModel(TextToImageModel):
    """A transformer trained by flow matching; the ``timestep`` is fp32, from 0 (data) to 1000 (noise)."""

    denoiser_name = "transformer"
    mask_argument: ClassVar[str | None] = None
    """Keyword argument of the pipeline for the mask of real tokens; `None`: padding is not masked."""

    def pipeline_arguments(self, conditioning: Conditioning, guidance_scale: float) -> dict[str, Any]:
        arguments = super().pipeline_arguments(conditioning, guidance_scale)
        if self.mask_argument:
            for sign in ("", "negative_"):
                if (embedding := arguments.get(f"{sign}prompt_embeds")) is not None:
                    arguments[f"{sign}{self.mask_argument}"] = real_tokens(embedding)
        return arguments

    def draw_times(self, generator: torch.Generator) -> Times:
        """Logit-normal timestep, as `timesteps` restrict it."""
        return {"timestep": self.timesteps.draw_logit_normal(generator)}

    def denoising_task(
        self, reference: Net, latents: Tensor, conditioning: Conditioning, times: Times, noise: Tensor
    ) -> DenoisingTask:
        noisy_latents = flow_interpolant(latents, noise, times["timestep"] / NUM_TIMESTEPS)
        return DenoisingTask(noisy_latents.to(self.dtype), times, conditioning, flow_velocity(latents, noise))


def chat_tokens_cut(tokenizer: Any, prompts: list[str], *, enable_thinking: bool) -> list[int]:
    """Number of tokens beyond `MAX_CHAT_TOKENS` of each prompt as a chat, template included.

    Args:
        enable_thinking: argument of the template, as in the family's pipeline.
    """
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=enable_thinking,
        )
        for prompt in prompts
    ]
    return tokens_cut(tokenizer, chats, MAX_CHAT_TOKENS)


class PatchedFlowMatchingModel(FlowMatchingModel):
    """A transformer on 2x2 patches of latents, which are packed for the transformer only."""

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        native, factor = self.pipeline.default_sample_size, self.pixels_per_latent
        channels = self.denoiser.config.in_channels // 4
        return channels, height // factor if height else native, width // factor if width else native

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, noise: Tensor, *, num_denoising_steps: int, guidance_scale: float
    ) -> Tensor:
        packed = super().sample(
            conditioning, noise, num_denoising_steps=num_denoising_steps, guidance_scale=guidance_scale
        )
        return unpack(packed, *noise.shape[-2:])

    def pipeline_latents(self, noise: Tensor) -> Tensor:
        return pack(super().pipeline_latents(noise))


def real_tokens(embedding: Tensor) -> Tensor:
    """Mask of the tokens that are not padding, ``[row, token]`` bool: padding has zero embeddings ``[.., channel]``."""
    return embedding.any(dim=-1)


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
