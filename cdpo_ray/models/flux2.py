"""The FLUX.2 klein family: a flow-matching transformer on normalised 2x2 patches of latents, prompted through Qwen3."""

import functools
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor

from cdpo_ray.errors import ModelError
from cdpo_ray.models.family import Conditioning, DenoisingTask, Net
from cdpo_ray.models.flow_matching import MAX_CHAT_TOKENS, FlowMatchingModel, chat_tokens_cut
from cdpo_ray.models.layouts import NUM_TIMESTEPS


class Flux2(FlowMatchingModel):
    """Latents are stored as the transformer takes them: one patch per position, ``[sample, 128, height, width]``.

    A patch is 2x2 values of the VAE's latents, normalised with the running statistics of the VAE's batch norm.
    """

    family = "flux2"
    pipeline_class = Flux2KleinPipeline

    @property
    def pixels_per_latent(self) -> int:
        return 2 * super().pixels_per_latent

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        native, factor = self.pipeline.default_sample_size // 2, self.pixels_per_latent
        channels = self.denoiser.config.in_channels
        return channels, height // factor if height else native, width // factor if width else native

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[Conditioning, list[int]]:
        with self.on_device(*self.text_encoders):
            embeddings, _ = self.pipeline.encode_prompt(
                prompts, device=self.device, max_sequence_length=MAX_CHAT_TOKENS
            )
        return {"prompt_embedding": embeddings}, chat_tokens_cut(
            self.pipeline.tokenizer, prompts, enable_thinking=False
        )

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, noise: Tensor, *, num_denoising_steps: int, guidance_scale: float
    ) -> Tensor:
        """See `TextToImageModel.sample`; the last latents before the pipeline scales them for the VAE.

        Raises:
            ModelError: if the model is distilled, which would ignore guidance, and the scale is above 1.
        """
        if guidance_scale > 1 and self.pipeline.config.is_distilled:
            raise ModelError(
                f"`generation.guidance_scale` is {guidance_scale:g}, but this FLUX.2 klein model is distilled and has"
                " no guidance; set it to 1, or use a klein base model"
            )
        packed: list[Tensor] = []

        def keep(pipeline: Any, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
            packed[:] = [values["latents"]]
            return values

        self.run_pipeline(
            conditioning,
            noise,
            num_denoising_steps=num_denoising_steps,
            guidance_scale=guidance_scale,
            callback_on_step_end=keep,
        )
        return from_rows(packed[0], *noise.shape[-2:])

    def vae_scaling(self) -> tuple[Any, Any]:
        return 0, 1  # the patches are normalised instead

    def vae_decode(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return super().vae_decode(from_patches(latents * std + mean))

    def vae_encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latents_mean, latents_std = map(to_patches, super().vae_encode(pixels))
        mean, std = self._statistics(latents_mean)
        return (latents_mean - mean) / std, latents_std / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the patches, ``[1, channel, 1, 1]``, as in the pipeline."""
        norm = self.pipeline.vae.bn
        mean = norm.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + self.pipeline.vae.config.batch_norm_eps)
        return mean.to(like.device, like.dtype), std.to(like.device, like.dtype)

    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        height, width = task.noisy_latents.shape[-2:]
        embeddings = task.conditioning["prompt_embedding"]
        prediction: Tensor = denoiser(
            hidden_states=to_rows(task.noisy_latents),
            timestep=task.times["timestep"].to(self.dtype) / NUM_TIMESTEPS,  # rounded as in the pipeline
            guidance=None,
            encoder_hidden_states=embeddings,
            txt_ids=grid_ids((1, 1, 1, embeddings.shape[1]), embeddings.device),
            img_ids=grid_ids((1, height, width, 1), embeddings.device),
            return_dict=False,
        )[0]
        return from_rows(prediction, height, width)


def to_patches(latents: Tensor) -> Tensor:
    """``[sample, channel, height, width]`` -> one position per 2x2 patch, of 4 times as many channels."""
    return torch.nn.functional.pixel_unshuffle(latents, 2)


def from_patches(patches: Tensor) -> Tensor:
    """Inverse of `to_patches`."""
    return torch.nn.functional.pixel_shuffle(patches, 2)


def to_rows(latents: Tensor) -> Tensor:
    """``[sample, channel, height, width]`` -> one row per position, ``[sample, height * width, channel]``."""
    return latents.flatten(2).transpose(1, 2)


def from_rows(rows: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `to_rows`."""
    return rows.transpose(1, 2).unflatten(2, (height, width))


@functools.lru_cache(maxsize=16)  # a copy from host memory in every forward pass would synchronise with the GPU
def grid_ids(sizes: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """Coordinates (time, row, column, token) of all positions of a grid: ``[position, 4]``, the last one fastest."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).to(device)
