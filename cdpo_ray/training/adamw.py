"""AdamW whose updates can be skipped and whose state can be saved and restored exactly."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cdpo_ray.config.training import TrainingSection
from cdpo_ray.errors import TrainingError

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


class Skipping(torch.optim.Optimizer):
    """Mixin: while `skips` is set, `step` changes neither weights nor moments, whatever DeepSpeed wrapper calls it."""

    skips = False
    saved_state: ClassVar[tuple[str, ...]]
    """Names of the state tensors to save in a checkpoint, if the parameter has them."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return None if self.skips else super().step(closure)

    @property
    def num_steps(self) -> float:
        """Number of steps taken, the same for all parameters."""
        steps = {float(state[STEP]) for state in self.state.values()}
        assert len(steps) == 1, f"all parameters are stepped together, got {steps}"
        return steps.pop()

    def saved_tensors(self, parameter: Tensor) -> dict[str, Tensor]:
        """State tensors of a parameter to save in a checkpoint, by name; `num_steps` is saved once for all."""
        state = self.state[parameter]
        return {name: state[name] for name in self.saved_state if name in state}

    @abstractmethod
    def make_state(self, number: int, parameter: Tensor, num_steps: float) -> None:
        """Create a parameter's state before its first step; existing moments are kept.

        Args:
            number: index of the parameter in its group.
            num_steps: number of steps already taken.
        """


class SkippingAdamW(Skipping, torch.optim.AdamW):
    """PyTorch's AdamW. Source: arXiv:1711.05101."""

    saved_state = MOMENTS

    def make_state(self, number: int, parameter: Tensor, num_steps: float) -> None:
        state = self.state[parameter]
        state[STEP] = torch.tensor(num_steps)
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(parameter)


def make_optimizer(trainable: Sequence[nn.Parameter], training: TrainingSection) -> Skipping:
    """Optimizer selected by ``training.optimizer``, with its learning rate, betas and weight decay.

    Raises:
        TrainingError: bitsandbytes, which 8-bit AdamW needs, is not installed.
    """
    kind: type[Any] = SkippingAdamW
    if training.optimizer == "adamw_8bit":
        try:
            from cdpo_ray.training.adamw_8bit import SkippingAdamW8bit
        except ImportError:
            raise TrainingError(
                "`training.optimizer` adamw_8bit needs bitsandbytes, which is not installed;"
                ' pip install "cdpo_ray[lowmem]"'
            ) from None
        kind = SkippingAdamW8bit
    optimizer: Skipping = kind(
        trainable,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        weight_decay=training.weight_decay,
    )
    return optimizer
