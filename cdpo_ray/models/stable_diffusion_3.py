"""The SD3 family (SD3, SD3.5): a flow-matching transformer with three text encoders."""

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net
from cdpo_ray.models.flow_matching import FlowMatchingModel
from cdpo_ray.models.stable_diffusion import tokens_cut

MAX_T5_TOKENS = 256


class StableDiffusion3(FlowMatchingModel):
    """Euler sampling with the model's scheduler."""

    family = "stable_diffusion_3"
    pipeline_class = StableDiffusion3Pipeline
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[Conditioning, list[int]]:
        with self.on_device(*self.text_encoders):
            embeddings, _, pooled, _ = self.pipeline.encode_prompt(
                prompts,
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=MAX_T5_TOKENS,
            )
        longest_tokenizer = self.pipeline.tokenizer_3 or self.pipeline.tokenizer
        limit = MAX_T5_TOKENS if self.pipeline.tokenizer_3 else None
        num_tokens_cut = tokens_cut(longest_tokenizer, prompts, limit)
        return {"prompt_embedding": embeddings, "pooled_embedding": pooled}, num_tokens_cut

    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        prediction: Tensor = denoiser(
            hidden_states=task.noisy_latents,
            timestep=task.times["timestep"],
            encoder_hidden_states=task.conditioning["prompt_embedding"],
            pooled_projections=task.conditioning["pooled_embedding"],
            return_dict=False,
        )[0]
        return prediction
