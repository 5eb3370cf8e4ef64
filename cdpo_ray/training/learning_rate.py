"""Update -> learning rate."""

import math
from typing import Literal


def learning_rate_at(
    update: int, *, peak: float, warmup_updates: int, decay: Literal["constant", "cosine"], num_updates: int
) -> float:
    """Learning rate of an update: linear warm-up to ``peak``, then constant, or a cosine that ends at 0.

    ``peak * update / warmup_updates`` up to ``warmup_updates``. Of the ``n`` updates after that, the i-th (from 0) has
    ``peak``, or ``peak * (1 + cos(pi i / n)) / 2``. A function of the update alone, so a resumed training needs no
    state of a scheduler; the values are those of PyTorch's ``LinearLR``, then ``CosineAnnealingLR``.

    Args:
        update: number of the update, 1-based.
        num_updates: number of updates of all stages.

    Source: arXiv:1608.03983, equation 5 without restarts (cosine).
    """
    if update <= warmup_updates:
        return peak * update / warmup_updates
    if decay == "constant":
        return peak
    return peak * (1 + math.cos(math.pi * (update - warmup_updates - 1) / (num_updates - warmup_updates))) / 2
