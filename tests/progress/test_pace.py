"""Rate and time left follow the latest units, not the start-up time."""

import pytest

from cdpo_ray.progress.pace import WINDOW, Pace, duration, rate_in_words


def test_a_step_that_has_done_nothing_has_no_rate() -> None:
    pace = Pace(0.0, total=10)
    assert pace.rate(100.0) is None and pace.seconds_left(100.0) is None


def test_the_start_up_time_counts_only_until_a_second_mark() -> None:
    pace = Pace(0.0, total=100)
    pace.advance(10, 60.0)  # a minute, mostly to load the model
    assert pace.rate(60.0) == pytest.approx(10 / 60)
    pace.advance(10, 65.0)
    pace.advance(10, 70.0)
    assert pace.rate(70.0) == pytest.approx(2.0)
    assert pace.seconds_left(70.0) == pytest.approx(35.0)


def test_units_of_an_earlier_process_do_not_count_for_the_rate() -> None:
    pace = Pace(0.0, total=1000, done=900)
    pace.advance(10, 5.0)
    assert pace.rate(5.0) == pytest.approx(2.0)
    assert pace.seconds_left(5.0) == pytest.approx(45.0)


def test_units_that_arrive_in_bursts_are_counted_over_the_time_between_bursts() -> None:
    pace = Pace(0.0, total=1000)
    for burst in range(1, 6):
        for unit in range(8):
            pace.advance(1, 4.0 * burst + 0.01 * unit)
    assert pace.rate(20.1) == pytest.approx(2.0)


def test_the_rate_is_that_of_the_latest_marks() -> None:
    pace, now = Pace(0.0, total=10**6), 0.0
    for seconds_per_unit in (1.0, 10.0):
        for _ in range(WINDOW):
            now += seconds_per_unit
            pace.advance(1, now)
    assert pace.rate(now) == pytest.approx(0.1)


def test_the_rate_falls_while_no_units_arrive() -> None:
    pace = Pace(0.0, total=100)
    for second in range(1, 12):
        pace.advance(1, float(second))
    assert pace.rate(12.0) == pytest.approx(1.0)
    assert pace.rate(111.0) == pytest.approx(10 / 109)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (41, "41 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (273_600, "3 d 4 h")],
)
def test_durations_are_formatted_in_the_two_largest_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_rates_below_one_per_second_are_given_per_minute() -> None:
    assert (rate_in_words(3.21, "update"), rate_in_words(0.5, "prompt")) == ("3.21 updates/s", "30 prompts/min")
