"""Base class of the flow-matching families: straight paths from data to noise, with their velocity as the target."""

from typing import Any

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
