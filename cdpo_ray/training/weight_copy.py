"""Copy of the trainable weights: their moving average, or their values at an earlier update."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn


class WeightCopy:
    """fp32 copy of parameters, which must be whole on every worker.

    Args:
        name: prefix of its tensors in a checkpoint.
        parameters: parameters by name.
    """

    def __init__(self, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
        self.name, self.parameters = name, parameters
        self.values = {key: parameter.detach().float().clone() for key, parameter in parameters.items()}

    def approach(self, share: float) -> None:
        """Move the copy towards the parameters by a share of the difference; 1: copy them."""
        for key, parameter in self.parameters.items():
            self.values[key].lerp_(parameter.detach().float(), share)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors to save in a checkpoint, by name."""
        for key, value in self.values.items():
            yield f"{self.name}.{key}", value

    def restore(self, tensors: Callable[[str], Tensor]) -> None:
        """Restore the tensors of `tensors`."""
        for key, value in self.values.items():
            value.copy_(tensors(f"{self.name}.{key}"))

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Context manager within which the parameters have the copy's values."""
        kept = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}
        for key, parameter in self.parameters.items():
            parameter.copy_(self.values[key])
        try:
            yield
        finally:
            for key, parameter in self.parameters.items():
                parameter.copy_(kept[key])


def averaging_share(num_updates: int, decay: float) -> float:
    """Share by which an exponential moving average approaches the weights after an update: ``max(1 - decay, 1 / n)``.

    The average is then the mean of the first ``1 / (1 - decay)`` weights, and does not contain those before training.

    Args:
        num_updates: ``n``, number of updates made, 1 or more.
        decay: between 0 and 1.
    """
    return max(1 - decay, 1 / num_updates)
