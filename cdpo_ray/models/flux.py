"""The FLUX family: a guidance-conditioned flow-matching transformer on 2x2 patches of latents."""

import functools
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net, Times, uniform_between
from cdpo_ray.models.flow_matching import PatchedFlowMatchingModel, pack, unpack
from cdpo_ray.models.layouts import NUM_TIMESTEPS
from cdpo_ray.models.stable_diffusion import tokens_cut


class Flux(PatchedFlowMatchingModel):
    """FLUX.1-dev is guidance-conditioned; FLUX.1-schnell is not. Neither needs the empty prompt."""

    family = "flux"
    pipeline_class = FluxPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    guidance_range = (3.5, 3.5)

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

    def pipeline_arguments(self, conditioning: Conditioning, guidance_scale: float) -> dict[str, Any]:
        return super().pipeline_arguments(conditioning, guidance_scale=1)

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


@functools.lru_cache(maxsize=8)  # a copy from host memory in every forward pass would synchronise with the GPU
def patch_ids(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Position of each patch in the grid of patches: ``[height * width, 3]``, rows ``(0, row, column)``."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(device, dtype)
