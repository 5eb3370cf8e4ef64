"""The Stable Diffusion 3 family (SD3, SD3.5): a joint transformer of image and text tokens, three text encoders."""

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net, tokens_cut
from cdpo_ray.models.flow_matching import FlowMatching

MAX_T5_TOKENS = 256


class StableDiffusion3(FlowMatching):
    """Two CLIP encoders of 77 tokens, whose pooled embeddings are one, and T5, whose tokens follow theirs."""

    pipeline_class = StableDiffusion3Pipeline
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[Conditioning, list[int]]:
        """As in the base class; T5, which reads furthest, decides what is cut."""
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=MAX_T5_TOKENS,
        )
        cut = tokens_cut(self.pipeline.tokenizer_3, prompts, MAX_T5_TOKENS)
        return {"prompt_embedding": embeddings, "pooled_embedding": pooled}, cut

    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        prediction: Tensor = denoiser(
            hidden_states=task.noisy_latents,
            timestep=task.times["timestep"],
            encoder_hidden_states=task.conditioning["prompt_embedding"],
            pooled_projections=task.conditioning["pooled_embedding"],
            return_dict=False,
        )[0]
        return prediction
