"""Reports of a stage, against values computed by hand."""

import numpy as np
import pytest

from cdpo_ray.search.trial_run import stage_report

BASE = {
    "clip": np.array([[0.1, 0.2], [0.5, 0.3], [0.4, 0.4]]),
    "oracle": np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]),
}
SUMMARY = {
    "stage": 2,
    "loss": 0.6,
    "validation": {
        "scores": {"clip": [[0.2, 0.2], [0.4, 0.5]], "oracle": [[1.0, float("nan")], [float("nan")] * 2]},
        "diversity": [0.2, 0.4],
        "implicit_values": [[-1.0, 2.0], [-3.0, -2.0]],
    },
}


def report_of(judge: str = "clip") -> dict:
    return stage_report(SUMMARY, BASE, judge, is_last=False, num_resamples=200, seed=0)


def test_a_policy_is_compared_with_the_base_on_the_measured_prompts() -> None:
    report = report_of()
    assert (report["stage"], report["is_last"], report["num_prompts"]) == (2, False, 2)
    # By clip: +0.1 and 0 on the first prompt, -0.1 and +0.2 on the second.
    assert report["reward"] == pytest.approx((0.05 + 0.05) / 2)
    assert report["win_rate"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert report["diversity"] == pytest.approx(0.3)
    assert report["by_prompt"]["clip"] == pytest.approx([0.05, 0.05])
    assert report["judges"]["clip"]["difference"]["mean"] == report["reward"]
    assert report["training"] == {"stage": 2, "loss": 0.6}


def test_implicit_accuracy_is_the_share_of_the_bases_pairs_in_the_order_of_the_judge() -> None:
    assert report_of("clip")["implicit_accuracy"] == 0.5, "0.1 < 0.2 as -1 < 2, but 0.5 > 0.3 against -3 < -2"
    assert report_of("oracle")["implicit_accuracy"] == 1.0, "the second prompt's images have equal oracle scores"


def test_images_without_a_score_are_excluded() -> None:
    report = report_of("oracle")
    assert report["reward"] == pytest.approx(1.0)
    assert report["judges"]["oracle"]["num_missing"] == 3
    assert report["by_prompt"]["oracle"] == [pytest.approx(1.0), None]
