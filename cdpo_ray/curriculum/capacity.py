"""Stage -> trainable capacity of the LoRA: a curriculum of the model beside that of the pairs."""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Capacity:
    """Trainable part of a LoRA in a stage.

    Attributes:
        rank: trainable rank of each layer in the trained blocks.
        block_share: share of the denoiser's blocks that are trained, in (0, 1].
    """

    rank: int
    block_share: Fraction


def stage_capacities(
    rank: int, num_stages: int, *, initial_rank: int | None = None, sequential: bool = False
) -> tuple[Capacity, ...]:
    """Capacity in stage 1, 2, ..., ``num_stages``; the last stage trains the whole LoRA.

    The rank grows linearly from ``initial_rank`` in stage 1 to ``rank`` in the last stage, rounded down: 6, 8, 11, 13,
    16 from 6 to 16 in five stages.

    Args:
        rank: rank of the last stage.
        num_stages: number of stages, ``B``.
        initial_rank: rank of the first stage, 1 to ``rank``; `None`: ``rank``.
        sequential: whether stage ``k`` trains ``k/B`` of the blocks, instead of all.

    Raises:
        ValueError: if the capacity grows but there is one stage, or ``initial_rank`` is not in 1..``rank``.

    Source: arXiv:2602.13055 (growing rank, sequential unfreezing); the linear growth and equal shares are our choice.
    """
    if initial_rank is None:
        initial_rank = rank
    if num_stages < 2 and (initial_rank < rank or sequential):
        raise ValueError(f"`num_stages` must be >= 2 for a LoRA to grow, got {num_stages}")
    if not 1 <= initial_rank <= rank:
        raise ValueError(f"`initial_rank` must be in 1..{rank}, the final rank, got {initial_rank}")
    return tuple(
        Capacity(
            initial_rank + (rank - initial_rank) * (stage - 1) // max(num_stages - 1, 1),
            Fraction(stage, num_stages) if sequential else Fraction(1),
        )
        for stage in range(1, num_stages + 1)
    )
