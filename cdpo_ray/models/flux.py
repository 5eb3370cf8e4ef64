"""The FLUX family: a transformer on 2 x 2 patches of latents, told of the guidance where it was distilled from it."""

from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net, Times, tokens_cut, uniform_between
from cdpo_ray.models.flow_matching import NUM_TIMESTEPS, FlowMatching

MAX_T5_TOKENS = 512
PATCH = 2


class Flux(FlowMatching):
    """CLIP for the pooled embedding, T5 for the tokens; no pass without prompt, as guidance is the net's own."""

    pipeline_class = FluxPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    guidance_range = (3.5, 3.5)

    def __init__(self, pipeline: Any, *, dtype: torch.dtype, device: str) -> None:
        super().__init__(pipeline, dtype=dtype, device=device)
        self.latent_channels //= PATCH**2
        self.native_size = pipeline.default_sample_size

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[Conditioning, list[int]]:
        """As in the base class; T5, which reads furthest, decides what is cut."""
        embeddings, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=MAX_T5_TOKENS
        )
        cut = tokens_cut(self.pipeline.tokenizer_2, prompts, MAX_T5_TOKENS)
        return {"prompt_embedding": embeddings, "pooled_embedding": pooled}, cut

    def pipeline_arguments(self, conditioning: Conditioning, guidance_scale: float) -> dict[str, Any]:
        return super().pipeline_arguments(conditioning, guidance_scale=1)

    def pack(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        return unpack(latents, height, width)

    def draw_times(self, generator: torch.Generator) -> Times:
        """Logit-normal timestep; guidance for nets that have an embedding of it (FLUX.1-dev, not schnell)."""
        times = super().draw_times(generator)
        if self.denoiser.config.guidance_embeds:
            times["guidance"] = uniform_between(self.guidance_range, generator)
        return times

    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        height, width = task.noisy_latents.shape[-2:]
        embeddings = task.conditioning["prompt_embedding"]
        prediction = denoiser(
            hidden_states=pack(task.noisy_latents),
            timestep=task.times["timestep"] / NUM_TIMESTEPS,
            guidance=task.times.get("guidance"),
            encoder_hidden_states=embeddings,
            pooled_projections=task.conditioning["pooled_embedding"],
            txt_ids=torch.zeros(embeddings.shape[1], 3, device=embeddings.device),
            img_ids=patch_places(height // PATCH, width // PATCH, embeddings.device),
            return_dict=False,
        )[0]
        return unpack(prediction, height, width)


def pack(latents: Tensor) -> Tensor:
    """``[sample, channel, height, width]`` -> a token a patch, row by row: ``[sample, token, 4 * channel]``."""
    num_samples, channels, height, width = latents.shape
    patches = latents.reshape(num_samples, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(num_samples, -1, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The reverse of `pack`, for latents of ``height`` by ``width``."""
    num_samples, _, values = tokens.shape
    channels = values // PATCH**2
    patches = tokens.reshape(num_samples, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(num_samples, channels, height, width)


def patch_places(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """``[token, 3]`` fp32: 0, row and column of each patch, in the order of `pack`."""
    return torch.cartesian_prod(*(torch.arange(count, device=device).float() for count in (1, rows, columns)))
