"""Agreement of labels and scores, pair by pair."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cdpo_ray.curriculum.labels import num_disagreements, where_labels_agree
from cdpo_ray.curriculum.pairs import AdmittedPairs
from cdpo_ray.curriculum.ranking import rank_samples

SCORES = st.sampled_from([-1.0, 0.0, 0.5, 2.0, np.nan])
LABELS = st.sampled_from([0.0, 0.5, 1.0])


@given(arrays.arrays(float, (12, 2), elements=SCORES), arrays.arrays(float, (12, 2), elements=LABELS))
def test_every_formed_pair_has_the_labels_order_and_the_scores_gap(scores: np.ndarray, labels: np.ndarray) -> None:
    formed = AdmittedPairs(rank_samples(where_labels_agree(scores, labels))).all()
    expected = {}
    for row in range(len(scores)):
        for chosen, rejected in ((0, 1), (1, 0)):
            gap = scores[row, chosen] - scores[row, rejected]
            if labels[row, chosen] > labels[row, rejected] and gap > 0:
                expected[row] = (chosen, rejected, gap)
    found = zip(formed.prompt, formed.chosen, formed.rejected, formed.score_gap, strict=True)
    assert {prompt: (chosen, rejected, gap) for prompt, chosen, rejected, gap in found} == expected


def disagree(scores: np.ndarray, labels: np.ndarray) -> bool:
    """Whether scores and labels order two images differently."""
    return bool(np.sign(scores[0] - scores[1]) != np.sign(labels[0] - labels[1]))


@given(
    arrays.arrays(float, (8, 4), elements=SCORES),
    arrays.arrays(float, (8, 4), elements=st.sampled_from([0.0, 1.0, 2.0, np.nan])),
)
def test_no_pair_of_a_row_of_several_images_contradicts_the_labels(scores: np.ndarray, labels: np.ndarray) -> None:
    found = where_labels_agree(scores, labels)
    for row in range(len(scores)):
        (usable,) = np.nonzero(np.isfinite(scores[row]) & np.isfinite(labels[row]))
        (remaining,) = np.nonzero(np.isfinite(found[row]))
        assert set(remaining) <= set(usable) and (found[row, remaining] == scores[row, remaining]).all()
        pairs = [list(pair) for pair in combinations(remaining, 2)]
        assert not any(disagree(scores[row, pair], labels[row, pair]) for pair in pairs)
        for left_out in set(usable) - set(remaining):
            images = [[left_out, other] for other in usable if other != left_out]
            assert not images or any(disagree(scores[row, pair], labels[row, pair]) for pair in images)
        expected = sum(disagree(scores[row, list(pair)], labels[row, list(pair)]) for pair in combinations(usable, 2))
        assert num_disagreements(scores, labels)[row].sum() == 2 * expected


def test_only_the_image_that_contradicts_the_others_is_left_out() -> None:
    labels = [[3, 2, 1, 0], [0, 1, 1, 2]]
    scores = [[0.9, 0.8, 0.95, 0.1], [0.1, 0.5, 0.5, 0.9]]  # the third image of row 0; row 1 agrees, with its tie
    expected = [[0.9, 0.8, np.nan, 0.1], [0.1, 0.5, 0.5, 0.9]]
    np.testing.assert_array_equal(where_labels_agree(scores, labels), expected)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[row, image\], got shapes \(4, 3\) and \(4, 2\)"):
        where_labels_agree(np.zeros((4, 3)), np.zeros((4, 2)))
