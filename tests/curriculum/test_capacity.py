"""Trainable capacity of each stage against hand-computed values."""

from fractions import Fraction

import pytest

from cdpo_ray.curriculum.capacity import Capacity, stage_capacities


def test_rank_of_the_paper_grows_linearly_from_6_to_16() -> None:
    assert [capacity.rank for capacity in stage_capacities(16, 5, initial_rank=6)] == [6, 8, 11, 13, 16]


@pytest.mark.parametrize("num_stages", [2, 3, 5, 7])
@pytest.mark.parametrize(("initial_rank", "rank"), [(1, 1), (1, 2), (3, 8), (6, 16), (1, 64)])
def test_rank_has_the_given_ends_and_deviates_from_the_line_by_less_than_one(
    initial_rank: int, rank: int, num_stages: int
) -> None:
    ranks = [capacity.rank for capacity in stage_capacities(rank, num_stages, initial_rank=initial_rank)]
    line = [initial_rank + Fraction((rank - initial_rank) * done, num_stages - 1) for done in range(num_stages)]
    assert (ranks[0], ranks[-1]) == (initial_rank, rank)
    assert all(0 <= exact - found < 1 for exact, found in zip(line, ranks, strict=True))


def test_sequential_stages_add_equal_shares_of_blocks_and_others_train_all() -> None:
    shares = [capacity.block_share for capacity in stage_capacities(8, 4, sequential=True)]
    assert shares == [Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), 1]
    assert set(stage_capacities(8, 4)) == {Capacity(8, Fraction(1))}


def test_one_stage_has_full_capacity_or_is_refused() -> None:
    assert stage_capacities(8, 1) == (Capacity(8, Fraction(1)),)
    for growth in ({"initial_rank": 4}, {"sequential": True}):
        with pytest.raises(ValueError, match=r"`num_stages` must be >= 2 for a LoRA to grow, got 1"):
            stage_capacities(8, 1, **growth)


@pytest.mark.parametrize("initial_rank", [0, 9])
def test_an_initial_rank_out_of_range_is_refused(initial_rank: int) -> None:
    with pytest.raises(ValueError, match=rf"`initial_rank` must be in 1..8, the final rank, got {initial_rank}"):
        stage_capacities(8, 3, initial_rank=initial_rank)
