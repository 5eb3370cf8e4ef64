"""The Stable Diffusion XL family: two text encoders, and a UNet that is told of the image's size."""

import functools
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net, tokens_cut
from cdpo_ray.models.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """As Stable Diffusion, with the pooled text embedding and the image size as further conditioning.

    Source: arXiv:2307.01952.
    """

    pipeline_class = StableDiffusionXLPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    load_options: ClassVar = {}
    embedded_dir = None

    def __init__(self, pipeline: Any, *, dtype: torch.dtype, device: str) -> None:
        super().__init__(pipeline, dtype=dtype, device=device)
        if pipeline.vae is not None and dtype == torch.float16 and pipeline.vae.config.force_upcast:
            pipeline.vae.to(torch.float32)  # its activations do not fit fp16

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[Conditioning, list[int]]:
        pipeline = self.pipeline
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        cut = map(min, tokens_cut(pipeline.tokenizer, prompts), tokens_cut(pipeline.tokenizer_2, prompts))
        return {"prompt_embedding": embeddings, "pooled_embedding": pooled}, list(cut)

    @functools.cached_property
    def empty_conditioning(self) -> Conditioning:
        """Zeros where the model was trained so, as its pipeline's configuration says; else of the empty prompt."""
        encoded, _ = self.encode_prompts([""])
        if self.pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(value) for name, value in encoded.items()}
        return encoded

    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        embeddings, pooled = task.conditioning["prompt_embedding"], task.conditioning["pooled_embedding"]
        added = {"text_embeds": pooled, "time_ids": self.size_conditioning(task.noisy_latents).to(embeddings.dtype)}
        prediction: Tensor = denoiser(
            task.noisy_latents,
            task.times["timestep"],
            encoder_hidden_states=embeddings,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return prediction

    def size_conditioning(self, latents: Tensor) -> Tensor:
        """``[sample, 6]``: height and width of the original image, its crop's top and left, height and width wanted.

        Our samples are whole images: original and wanted size are the same, and nothing is cropped.
        """
        factor = self.pipeline.vae_scale_factor  # 8 where the VAE is left out; every VAE of this family has 8
        height, width = (size * factor for size in latents.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=latents.device)
        return sizes.expand(len(latents), -1)
