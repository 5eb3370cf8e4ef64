"""Metrics of compared images."""

import numpy as np
import pyarrow as pa
import pytest

from cdpo_ray.evaluation.metrics import measure, preference_accuracy

SCORES = [[0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [1.0, 1.0, 1.0]]


def compared_rows(**columns: list) -> pa.Table:
    rows: dict[str, list] = {}
    for arm, shift in (("base", 0.0), ("tuned", 0.5)):
        scores = (np.array(SCORES) + shift).tolist()
        rows |= {f"{arm}_score_up": scores, f"{arm}_score_down": np.negative(scores).tolist()}
        for name in ("saturation", "edge_density", "jpeg_kilobytes"):
            rows[f"{arm}_{name}"] = [[0.2 + shift] * 3] * 3
        rows[f"{arm}_diversity"] = [0.3 + shift] * 3
    return pa.table(rows | columns)


def measured(**columns: list) -> dict:
    return measure(compared_rows(**columns), ["up", "down"], num_resamples=100, seed=0)


def test_judges_with_opposite_scores_have_a_rank_correlation_of_minus_1() -> None:
    assert measured()["agreement"] == [{"judges": ["up", "down"], "base": -1.0, "tuned": -1.0}]


def test_appearance_and_diversity_are_compared_like_scores() -> None:
    found = measured()
    assert list(found["appearance"]) == ["saturation", "edge_density", "jpeg_kilobytes"]
    for comparison in (found["diversity"], *found["appearance"].values()):
        assert comparison["difference"]["mean"] == pytest.approx(0.5)
    assert found["judges"]["up"]["difference"]["mean"] == 0.5
    assert found["judges"]["down"]["win_rate"]["mean"] == 0


def test_one_image_per_prompt_gives_neither_diversity_nor_pairs() -> None:
    rows = compared_rows().to_pydict()
    one = {name: [values[:1] if isinstance(values, list) else None for values in found] for name, found in rows.items()}
    found = measure(pa.table(one | {"implicit_value": [[0.1]] * 3}), ["up", "down"], num_resamples=100, seed=0)
    assert "diversity" not in found
    assert found["agreement"] == [{"judges": ["up", "down"], "base": None, "tuned": None}]
    assert found["preference_accuracy"] == {"up": None, "down": None}


def test_preference_accuracy_uses_the_base_images_and_excludes_prompts_without_order() -> None:
    assert measured()["preference_accuracy"] == {}
    found = measured(implicit_value=[[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])["preference_accuracy"]
    assert (found["up"]["mean"], found["up"]["num_prompts"]) == (0.5, 2)
    assert preference_accuracy(np.array(SCORES), np.array(SCORES), num_resamples=100, seed=0) == {
        "mean": 1.0,
        "no_interval": "an interval needs at least 10 prompts, got 2",
        "num_prompts": 2,
    }
    scores = np.tile(SCORES, (5, 1))
    assert preference_accuracy(scores, scores, num_resamples=100, seed=0) == {
        "mean": 1.0,
        "low": 1.0,
        "high": 1.0,
        "num_prompts": 10,
    }


def test_each_category_is_compared_on_its_own_prompts() -> None:
    assert "categories" not in measured()
    found = measured(category=["a", None, "a"])["categories"]
    assert [(each["category"], each["num_prompts"]) for each in found] == [("a", 2)]
    assert found[0]["judges"]["up"]["base"] == {
        "mean": 1.0,
        "no_interval": "an interval needs at least 10 prompts, got 2",
    }
    assert found[0]["judges"]["down"]["win_rate"]["mean"] == 0
    lost = measured(category=["a", "b", "a"], base_score_up=[[0.0] * 3, [float("nan")] * 3, [0.0] * 3])["categories"]
    assert lost[1]["judges"]["up"] is None and lost[1]["judges"]["down"] is not None
