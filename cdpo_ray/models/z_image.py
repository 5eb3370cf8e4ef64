"""The Z-Image family: a single-stream flow-matching transformer, with Qwen3 as text encoder."""

from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net
from cdpo_ray.models.flow_matching import MAX_CHAT_TOKENS, FlowMatchingModel, chat_tokens_cut, real_tokens
from cdpo_ray.models.layouts import NUM_TIMESTEPS

NATIVE_PIXELS = 1024
"""Native height and width, the default of the pipeline's call; no configuration has it."""


class ZImage(FlowMatchingModel):
    """The transformer's time runs from 0 (noise) to 1 (data), and its output is the negative velocity.

    Prompts have different numbers of tokens, which are padded to `MAX_CHAT_TOKENS` rows of zeros here and cut to their
    length for the transformer.
    """

    family = "z_image"
    pipeline_class = ZImagePipeline

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        factor = self.pixels_per_latent
        return self.denoiser.config.in_channels, (height or NATIVE_PIXELS) // factor, (width or NATIVE_PIXELS) // factor

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[Conditioning, list[int]]:
        with self.on_device(*self.text_encoders):
            embeddings, _ = self.pipeline.encode_prompt(
                list(prompts),  # the pipeline replaces its items by chats
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=MAX_CHAT_TOKENS,
            )
        padded = embeddings[0].new_zeros(len(prompts), MAX_CHAT_TOKENS, embeddings[0].shape[-1])
        for row, embedding in enumerate(embeddings):
            padded[row, : len(embedding)] = embedding
        return {"prompt_embedding": padded}, chat_tokens_cut(self.pipeline.tokenizer, prompts, enable_thinking=True)

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, noise: Tensor, *, num_denoising_steps: int, guidance_scale: float
    ) -> Tensor:
        """See `TextToImageModel.sample`; the pipeline counts guidance from 0, which is none."""
        latents = self.run_pipeline(
            conditioning, noise, num_denoising_steps=num_denoising_steps, guidance_scale=guidance_scale - 1
        )
        return latents.to(self.dtype)

    def pipeline_latents(self, noise: Tensor) -> Tensor:
        return noise.float()  # whatever the model's dtype

    def pipeline_arguments(self, conditioning: Conditioning, guidance_scale: float) -> dict[str, Any]:
        embeddings = unpadded(conditioning)
        empty = unpadded(self.empty_conditioning) * len(embeddings) if guidance_scale > 0 else []
        return {"prompt_embeds": embeddings, "negative_prompt_embeds": empty}

    def prepare(self, denoiser: torch.nn.Module) -> None:
        """Compile the blocks of a denoiser if `compiled`; in place.

        A graph of the whole denoiser would depend on the number of tokens of every prompt of a batch.
        """
        if self.compiled:
            denoiser.compile_repeated_blocks(dynamic=True)  # type: ignore[operator]

    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        outputs = denoiser(
            list(task.noisy_latents.unsqueeze(2)),  # one frame per sample
            (NUM_TIMESTEPS - task.times["timestep"]) / NUM_TIMESTEPS,
            unpadded(task.conditioning),
            return_dict=False,
        )[0]
        return -torch.stack(list(outputs)).squeeze(2)


def unpadded(conditioning: Conditioning) -> list[Tensor]:
    """Embeddings of each prompt up to its last token, ``[token, channel]`` each; waits for the device once.

    A perturbed prompt may have zeros between its tokens, which keep their positions.
    """
    padded = conditioning["prompt_embedding"]
    positions = torch.arange(1, padded.shape[1] + 1, device=padded.device)
    lengths = (real_tokens(padded) * positions).amax(dim=1).tolist()
    return [row[:length] for row, length in zip(padded, lengths, strict=True)]
