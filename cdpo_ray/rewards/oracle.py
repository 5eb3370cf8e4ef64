"""Images of the embedded world -> correctness by the oracle, which parses their pixels."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.testbed.oracle import judge


class OracleReward:
    """1 if count, colours, shapes and named background match the caption, else 0."""

    aspect = "attr"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[Any]:
        return judge(images.cpu().numpy(), list(prompts))[self.aspect].astype(float)


class StrictOracleReward(OracleReward):
    """As `OracleReward`, and each object's position must match."""

    aspect = "strict"
