"""The Qwen-Image family: a flow-matching transformer on 2x2 patches of a video VAE's latents, and Qwen2.5-VL."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net
from cdpo_ray.models.flow_matching import PatchedFlowMatchingModel, pack, real_tokens, unpack
from cdpo_ray.models.layouts import NUM_TIMESTEPS
from cdpo_ray.models.stable_diffusion import tokens_cut

MAX_TOKENS = 512
"""Number of tokens per prompt, including those of the template after it; the default of the pipeline's call."""
EMPTY_PROMPT = " "
"""Source: the negative prompt in the inference code of the model's authors."""


class QwenImage(PatchedFlowMatchingModel):
    """Guidance is the pipeline's ``true_cfg_scale``; an image is a video of one frame to the VAE."""

    family = "qwen_image"
    pipeline_class = QwenImagePipeline
    mask_argument = "prompt_embeds_mask"

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[Conditioning, list[int]]:
        with self.on_device(*self.text_encoders):
            embeddings, _ = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=MAX_TOKENS)
        in_template = [self.pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        limit = self.pipeline.prompt_template_encode_start_idx + MAX_TOKENS
        padded = F.pad(embeddings, (0, 0, 0, MAX_TOKENS - embeddings.shape[1]))
        return {"prompt_embedding": padded}, tokens_cut(self.pipeline.tokenizer, in_template, limit)

    @functools.cached_property
    def empty_conditioning(self) -> Conditioning:
        return self.encode_prompts([EMPTY_PROMPT])[0]

    def pipeline_arguments(self, conditioning: Conditioning, guidance_scale: float) -> dict[str, Any]:
        arguments = super().pipeline_arguments(conditioning, guidance_scale)
        return arguments | {"true_cfg_scale": guidance_scale, "guidance_scale": None}

    def vae_scaling(self) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        mean, std = (
            torch.tensor(values, device=self.device, dtype=vae.dtype)[:, None, None]
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return mean, 1 / std

    def vae_decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.pipeline.vae.decode(latents[:, :, None]).sample
        return pixels[:, :, 0]

    def vae_encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.pipeline.vae.encode(pixels[:, :, None]).latent_dist
        return posterior.mean[:, :, 0], posterior.std[:, :, 0]

    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        num_samples, _, height, width = task.noisy_latents.shape
        embeddings = task.conditioning["prompt_embedding"]
        prediction: Tensor = denoiser(
            hidden_states=pack(task.noisy_latents),
            timestep=task.times["timestep"].to(self.dtype) / NUM_TIMESTEPS,  # rounded as in the pipeline
            encoder_hidden_states=embeddings,
            encoder_hidden_states_mask=real_tokens(embeddings),
            img_shapes=[[(1, height // 2, width // 2)]] * num_samples,
            return_dict=False,
        )[0]
        return unpack(prediction, height, width)
