"""Which timesteps training draws."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cdpo_ray.models.layouts import NUM_TIMESTEPS


@dataclass(frozen=True)
class TimestepRule:
    """Restriction of the timesteps that a family draws in training; by default none.

    Attributes:
        low, high: smallest and largest timestep, 0 to 1000, of the family's distribution.
        listed: timesteps to draw from uniformly, in place of that distribution.
        num_denoising_steps: uniform draws of the timesteps of the sampler with this number of steps, likewise.
    """

    low: int = 0
    high: int = NUM_TIMESTEPS
    listed: tuple[int, ...] | None = None
    num_denoising_steps: int | None = None

    def draw_from(self, timesteps: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform draw, int64 scalar, from ``timesteps [choice]`` in the range, or from the listed ones."""
        if self.listed:
            choices = torch.tensor(self.listed)
        else:
            choices = timesteps[(timesteps >= self.low) & (timesteps <= self.high)]
        return choices[torch.randint(len(choices), (), generator=generator)]

    def draw_logit_normal(self, generator: torch.Generator) -> Tensor:
        """Logit-normal draw truncated to the range, or a uniform one of the listed timesteps; fp32 scalar.

        1000 times the sigmoid of a standard normal number, by its inverse distribution function.

        Source: arXiv:2403.03206, section 3.1 (logit-normal).
        """
        if self.listed:
            return self.draw_from(torch.empty(0), generator).float()
        bounds = torch.tensor([self.low, self.high], dtype=torch.float64) / NUM_TIMESTEPS
        low, high = torch.special.ndtr(torch.logit(bounds))
        quantile = low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64)
        return NUM_TIMESTEPS * torch.sigmoid(torch.special.ndtri(quantile)).float()
