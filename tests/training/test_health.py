"""The rise of the chosen's error, and its alarm."""

import pytest

from cdpo_ray.config.training import HealthSection
from cdpo_ray.errors import TrainingError
from cdpo_ray.training.health import Alarm, alarm_sentence, error_rise, highest_error_rise
from cdpo_ray.training.loop import TrainingState


def record(update: int, policy_error: float, reference_error: float = 0.5) -> dict[str, float]:
    return {"update": update, "stage": 1, "policy_error_w": policy_error, "reference_error_w": reference_error}


RECORDS = (record(1, 0.5), record(2, 0.7), record(3, 0.2, 0.1), record(5, 0.6))


def test_the_rise_is_the_ratio_of_mean_change_and_mean_reference_error_in_the_window() -> None:
    assert error_rise(RECORDS, last=3, window=2) == pytest.approx((0.2 + 0.1) / (0.5 + 0.1))
    assert error_rise(RECORDS, last=5, window=100) == pytest.approx((0.2 + 0.1 + 0.1) / 1.6)
    assert error_rise(RECORDS, last=5, window=1) == pytest.approx(0.2)
    assert error_rise(RECORDS, last=4, window=1) is None  # skipped


def test_the_rise_does_not_depend_on_the_scale_of_errors() -> None:
    scaled = [{name: value * (1 if name == "update" else 1000) for name, value in each.items()} for each in RECORDS]
    assert error_rise(scaled, last=5, window=4) == pytest.approx(error_rise(RECORDS, last=5, window=4))


def test_the_highest_rise_is_that_of_all_comparisons_the_last_one_included() -> None:
    assert highest_error_rise(RECORDS, num_updates=5, window=2) == pytest.approx(1.0 * 0.1 / 0.1)  # updates 3 and 4
    assert highest_error_rise(RECORDS[:2], num_updates=2, window=50) == pytest.approx(0.2)
    assert highest_error_rise((), num_updates=3, window=2) is None


def checked(num_updates: int, **health: object) -> TrainingState:
    return TrainingState(records=RECORDS, num_updates=num_updates).after_check(HealthSection(**health))  # type: ignore[arg-type]


def test_an_alarm_is_raised_above_the_bound_only() -> None:
    assert checked(3, window=2, max_error_rise=0.4).alarms == (Alarm(3, pytest.approx(0.5)),)
    assert checked(3, window=2, max_error_rise=0.6).alarms == ()
    assert checked(3, window=2, max_error_rise=None).alarms == ()


def test_an_alarm_stops_training_only_if_it_is_configured() -> None:
    assert not checked(3, window=2, max_error_rise=0.4).is_stopped
    assert checked(3, window=2, max_error_rise=0.4, on_alarm="stop").is_stopped


def test_an_alarm_at_the_first_comparison_is_an_error_since_no_lora_was_healthy() -> None:
    with pytest.raises(TrainingError, match=r"by 20 %, first at update 2; .* no earlier LoRA to keep"):
        checked(2, window=2, max_error_rise=0.1, on_alarm="stop")


def test_the_comparison_before_an_update_is_at_a_multiple_of_the_window() -> None:
    health = HealthSection(window=50)
    assert [health.check_before(update) for update in (1, 50, 51, 100, 130)] == [0, 0, 50, 50, 100]


def test_the_sentence_gives_the_highest_rise_the_first_update_the_bound_and_what_to_do() -> None:
    sentence = alarm_sentence([Alarm(50, 1.25), Alarm(100, 2.5)], HealthSection(max_error_rise=1.0))
    assert "by 250 %, first at update 50" in sentence and "`training.health.max_error_rise` is 1;" in sentence
    assert "training.safeguard" in sentence
