"""Stage -> how much of the LoRA learns: the model's curriculum beside the pairs'."""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Capacity:
    """How much of a LoRA learns in a stage.

    Attributes:
        rank: of each layer that learns.
        block_share: share of the net's blocks whose layers learn, above 0 to 1; the other blocks wait.
    """

    rank: int
    block_share: Fraction


def stage_capacities(
    rank: int, num_stages: int, *, initial_rank: int | None = None, sequential: bool = False
) -> tuple[Capacity, ...]:
    """What learns in stage 1, 2, ..., ``num_stages``; the last has the whole LoRA.

    The rank of stage ``k`` of ``B`` lies on the straight line from ``initial_rank`` at stage 1 to ``rank`` at stage
    ``B``, rounded down: 6, 8, 11, 13, 16 from 6 to 16 in five stages.

    Args:
        rank: of the last stage.
        initial_rank: of the first, 1 to ``rank``; none is ``rank``.
        sequential: stage ``k`` has ``k/B`` of the blocks; else every stage has all.

    Raises:
        ValueError: one stage, in which nothing can grow, or ``initial_rank`` is not in 1..``rank``.

    Source: arXiv:2602.13055 for growing rank and sequential unfreezing; the line and the equal shares are chosen here.
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
