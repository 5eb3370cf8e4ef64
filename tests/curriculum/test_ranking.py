"""Ranking of scores against a plain sort."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cdpo_ray.curriculum.ranking import rank_samples

SCORES = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=8),
    elements=st.sampled_from([-0.0, 0.0, -1.5, 0.1, 0.2, 0.3, 1e300, math.nan, math.inf, -math.inf]),
)


@given(SCORES)
def test_ranking_equals_a_plain_sort(scores: np.ndarray) -> None:
    ranking = rank_samples(scores)
    for row, order, sorted_scores, num_ranked in zip(
        scores.tolist(), ranking.order, ranking.sorted_scores, ranking.num_ranked, strict=True
    ):
        finite = [index for index, score in enumerate(row) if math.isfinite(score)]
        unranked = [index for index, score in enumerate(row) if not math.isfinite(score)]
        best_first = sorted(finite, key=lambda index: (-row[index], index))
        assert order.tolist() == best_first + unranked
        assert num_ranked == len(finite)
        assert sorted_scores[:num_ranked].tolist() == [row[index] for index in best_first]
        assert np.isnan(sorted_scores[num_ranked:]).all()
    assert (ranking.num_unranked == np.sum(~np.isfinite(scores), axis=1)).all()


def test_the_scores_are_not_changed() -> None:
    scores = np.array([[1.0, np.nan, 2.0]])
    scores.flags.writeable = False
    assert rank_samples(scores).order.tolist() == [[2, 0, 1]]


def test_single_precision_and_integer_scores_rank_equally() -> None:
    scores = np.array([[3, 1, 2], [5, 5, 9]])
    assert (rank_samples(scores).order == rank_samples(scores.astype(np.float32)).order).all()
    assert rank_samples(scores).order.dtype == np.int32


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (3, 0)])
def test_scores_must_be_a_table(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`scores` must be \[prompt, sample\] with at least one sample, got shape"):
        rank_samples(np.zeros(shape))
