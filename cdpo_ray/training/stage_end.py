"""What a training worker has when a stage has ended, for whoever measures the policy then."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cdpo_ray.models.family import Net, TextToImageModel
from cdpo_ray.training.policy import Reference


@dataclass(frozen=True)
class StageEnd:
    """The policy of one of the workers, all of which are there at the same time.

    Attributes:
        model: with its VAE; its denoiser is the policy.
        policy, reference: what is called to run each, as in `update.sample_errors`.
        stage: that ended, 1-based.
    """

    model: TextToImageModel
    policy: Net
    reference: Reference
    stage: int
    is_last: bool
    worker_rank: int
    num_workers: int


Validate = Callable[[StageEnd], dict[str, Any]]
"""Called by all workers together; must draw from no global generator, and give the same on each of them."""
