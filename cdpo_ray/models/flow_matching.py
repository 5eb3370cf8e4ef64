"""Base class of the flow-matching families: straight paths from data to noise, with their velocity as the target."""

import torch
from torch import Tensor

from cdpo_ray.models.family import Conditioning, DenoisingTask, Net, TextToImageModel, Times
from cdpo_ray.models.layouts import NUM_TIMESTEPS
from cdpo_ray.models.noising import flow_interpolant, flow_velocity


class FlowMatchingModel(TextToImageModel):
    """A transformer trained by flow matching; the ``timestep`` is fp32, from 0 (data) to 1000 (noise)."""

    denoiser_name = "transformer"

    def draw_times(self, generator: torch.Generator) -> Times:
        """Logit-normal timestep, as `timesteps` restrict it."""
        return {"timestep": self.timesteps.draw_logit_normal(generator)}

    def denoising_task(
        self, reference: Net, latents: Tensor, conditioning: Conditioning, times: Times, noise: Tensor
    ) -> DenoisingTask:
        noisy_latents = flow_interpolant(latents, noise, times["timestep"] / NUM_TIMESTEPS)
        return DenoisingTask(noisy_latents.to(self.dtype), times, conditioning, flow_velocity(latents, noise))
