"""What flow-matching families (SD3, FLUX) share: a straight way from latents to noise, and its velocity."""

import torch
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net, TextToImageModel, Times
from cdpo_ray.models.noising import flow_velocity, logit_normal_time, mix_noise

NUM_TIMESTEPS = 1000


class FlowMatching(TextToImageModel):
    """A transformer that predicts the velocity; a timestep is a thousand times the time.

    Sampled by the pipeline's own scheduler. Source: arXiv:2403.03206.
    """

    denoiser_name = "transformer"

    def draw_times(self, generator: torch.Generator) -> Times:
        """Logit-normal."""
        return {"timestep": NUM_TIMESTEPS * logit_normal_time(generator)}

    def denoising_task(
        self, reference: Net, latents: Tensor, conditioning: Conditioning, times: Times, noise: Tensor
    ) -> DenoisingTask:
        time = times["timestep"] / NUM_TIMESTEPS
        return DenoisingTask(
            mix_noise(latents, noise, time).to(self.dtype), times, conditioning, flow_velocity(latents, noise)
        )
