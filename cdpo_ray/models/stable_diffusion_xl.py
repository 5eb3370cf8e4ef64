"""The SDXL family: a latent diffusion model with two text encoders, conditioned on the image size."""

import functools
from typing import ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net
from cdpo_ray.models.stable_diffusion import StableDiffusion, tokens_cut


class StableDiffusionXL(StableDiffusion):
    """DDIM sampling, as in `StableDiffusion`; further inputs are a pooled embedding and the image size."""

    family = "stable_diffusion_xl"
    pipeline_class = StableDiffusionXLPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    load_options: ClassVar = {"add_watermarker": False}
    embedded_dir = None

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[Conditioning, list[int]]:
        with self.on_device(*self.text_encoders):
            embeddings, _, pooled, _ = self.pipeline.encode_prompt(
                prompts, device=self.device, do_classifier_free_guidance=False
            )
        # both tokenizers have the same vocabulary and limit
        return {"prompt_embedding": embeddings, "pooled_embedding": pooled}, tokens_cut(
            self.pipeline.tokenizer, prompts
        )

    @functools.cached_property
    def empty_conditioning(self) -> Conditioning:
        """Conditioning of the empty prompt; zeros if the pipeline's ``force_zeros_for_empty_prompt`` is set."""
        encoded, _ = self.encode_prompts([""])
        if self.pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(value) for name, value in encoded.items()}
        return encoded

    def decode(self, latents: Tensor) -> Tensor:
        self._upcast_vae()
        return super().decode(latents)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self._upcast_vae()
        mean, std = super().encode(images)
        return mean.to(self.dtype), std.to(self.dtype)

    def _upcast_vae(self) -> None:
        """Run a VAE with ``force_upcast`` in fp32: it overflows in fp16; bf16 has the range of fp32."""
        if self.dtype == torch.float16 and self.pipeline.vae.config.force_upcast:
            self.pipeline.vae.float()

    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        prediction: Tensor = denoiser(
            task.noisy_latents,
            task.times["timestep"],
            encoder_hidden_states=task.conditioning["prompt_embedding"],
            added_cond_kwargs={
                "text_embeds": task.conditioning["pooled_embedding"],
                "time_ids": self.size_ids(task.noisy_latents),
            },
            return_dict=False,
        )[0]
        return prediction

    def size_ids(self, latents: Tensor) -> Tensor:
        """Original size, crop offset and target size, ``[sample, 6]``; uncropped. Source: arXiv:2307.01952."""
        height, width = (side * self.pipeline.vae_scale_factor for side in latents.shape[-2:])
        return _size_ids(height, width, latents.device, latents.dtype).expand(len(latents), -1)


@functools.lru_cache(maxsize=8)  # a copy from host memory in every forward pass would synchronise with the GPU
def _size_ids(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor([height, width, 0, 0, height, width], device=device, dtype=dtype)
