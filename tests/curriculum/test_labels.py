"""Agreement of labels and scores, pair by pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cdpo_ray.curriculum.labels import where_labels_agree
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


def test_more_than_two_images_per_row_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[pair, 2\], got shapes \(4, 3\) and \(4, 3\)"):
        where_labels_agree(np.zeros((4, 3)), np.zeros((4, 3)))
