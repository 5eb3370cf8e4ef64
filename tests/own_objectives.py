"""A user's own reward, measure and loss, as a configuration names them; and faulty ones."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.curriculum.pairs import PairArrays


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of red minus that of the other channels, ``[image]``."""
    means = images.double().mean(dim=(2, 3))
    return means[:, 0] - means[:, 1:].mean(dim=1)


def distance_of_indices(pairs: PairArrays) -> NDArray[np.int64]:
    """Pairs whose images have distant indices are easy: a measure that no reward knows."""
    return np.abs(pairs.chosen - pairs.rejected)


def focal_dpo(margin: Tensor, *, gamma: float) -> Tensor:
    """``sigmoid(-m)^gamma * -log sigmoid(m)``: pairs that are ordered well weigh less."""
    return torch.sigmoid(-margin) ** gamma * -F.logsigmoid(margin)


def mean_loss(margin: Tensor) -> Tensor:
    return -F.logsigmoid(margin).mean()


def broken(_: object) -> None:
    raise KeyError("no such thing")


def not_finite(pairs: PairArrays) -> NDArray[np.float64]:
    return np.full(len(pairs), np.nan)
