import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_up_trials import KNOBS, PAPER_POINT, confirmed, done, heldout_ids, report, search_of

from cdpo_ray.search import figures
from cdpo_ray.search.findings import search_summary
from cdpo_ray.search.report import sections, write_report
from cdpo_ray.search.trials import FAILED, RUNNING, Trial


def page_of(
    trials, path: Path, *, num_knobs=10, gain=None, num_seeds=3, objectives=("reward",), importance=None, **given
) -> str:
    runs = {"paper_runs": {}, "found_runs": {}}
    if gain is not None:
        paper = np.random.default_rng(0).normal(0.02, 0.05, size=(num_seeds, 40))
        runs = {"paper_runs": confirmed(paper.tolist()), "found_runs": confirmed((paper + gain).tolist())}
    found = search_summary(
        trials,
        name="tune",
        algorithm="tpe",
        objectives=objectives,
        judge="clip",
        knobs=KNOBS[:num_knobs],
        num_invalid=3,
        importance=importance,
        best_config="runs/tune/best.yaml",
        heldout_ids=heldout_ids(40),
        **runs | given,
    )
    write_report(found, path / "tune.html")
    return (path / "tune.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(
        search_of(12, 10),
        tmp_path_factory.mktemp("tune"),
        gain=0.05,
        objectives=("reward", "diversity", "implicit_accuracy"),
        importance={knob["key"]: 0.1 for knob in KNOBS},
    )


def cells(page: str) -> list[list[str]]:
    """Cells of the table of all trials."""
    rows = page[page.index("<h2>All trials") :].split("<tr>")[2:]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows]


def test_verdict_comes_first(page: str) -> None:
    assert '<li class="better">The found schedule holds: trial ' in page
    assert page.index("The found schedule holds") < page.index("<h2>") < page.index("<svg")


@pytest.mark.parametrize(
    ("gain", "tone", "sentence"),
    [
        (0.0, "same", "does not differ significantly from"),
        (-0.05, "worse", "is worse"),
        (None, "same", "Not confirmed yet: "),
    ],
)
def test_the_colour_of_the_verdict_follows_the_verdict(gain, tone, sentence, tmp_path: Path) -> None:
    page = page_of(search_of(12, 2), tmp_path, num_knobs=2, gain=gain)
    [verdict] = re.findall(r'<ul class="headline">\n<li class="(\w+)">(.*?)</li>', page)
    assert verdict[0] == tone and sentence in verdict[1]


def test_page_says_which_half_chose_and_which_half_judges(page: str) -> None:
    assert "on the judging half of the held-out prompts (20), with 3 training seeds" in page
    assert "On the choosing half (20), found − paper is +0.050 by clip, so\nthe found schedule is kept" in page


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_page_of_fewer_than_3_seeds_has_no_verdict_and_says_why(num_seeds: int, tmp_path: Path) -> None:
    page = page_of(search_of(12, 2), tmp_path, num_knobs=2, gain=0.05, num_seeds=num_seeds)
    reason = f"n interval needs at least 3 runs, got {num_seeds}; set `search.confirm_seeds` to at least 3"
    assert '<li class="same">No verdict on trial ' in page and f": a{reason}" in page and f"<p>A{reason}" in page
    assert '<td class="same">no verdict</td>' in page and '+0.050<span class="under">[no interval]</span>' in page
    assert "The found schedule" not in page.split("<h2>")[0]
    assert not re.search(r"\b(nan|None)\b", page)


def test_every_trial_has_a_row_with_its_state(page: str) -> None:
    rows, trials = cells(page), search_of(12, 10)
    assert [int(row[0].split()[0]) for row in rows] == [trial.number for trial in trials]
    assert [row[2] for row in rows] == [trial.state for trial in trials]
    assert sum("(best)" in row[0] for row in rows) == 1


def test_text_from_elsewhere_stays_text(page: str, tmp_path: Path) -> None:
    assert "had a &lt;b&gt;NaN&lt;/b&gt; loss" in page and "<b>NaN" not in page
    trials = [done(1, 0.1, {"training.loss": "a"}), done(2, 0.2, {"training.loss": "<script>alert(1)</script>"})]
    hostile = page_of(trials, tmp_path, found_runs={7: Trial(1, {}, FAILED, (), "<i>\x1b[31m")})
    assert "<script" not in hostile and "&lt;script&gt;" in hostile
    assert "the found schedule failed: &lt;i&gt;␛[31m" in hostile


def test_page_refers_to_nothing_outside_itself(page: str) -> None:
    targets = re.findall(r'(?:src|href|action|data|poster)\s*=\s*"([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert all(target.startswith("#") for target in targets)
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert "@import" not in page and "default-src 'none'" in page


def test_charts_contain_no_invalid_numbers(page: str) -> None:
    charts = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    assert len(charts) == 5
    for chart in charts:
        assert not re.search(r"\b(nan|inf|None)\b", chart)


def test_best_schedule_is_the_yaml_of_its_changes(page: str) -> None:
    given = yaml.safe_load(re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)[1])
    best = next(trial for trial in search_of(12, 10) if f"<td>{trial.number} (best)</td>" in page)
    changed = {key: value for key, value in best.point.items() if PAPER_POINT.get(key) != value}
    assert changed and given == sections(changed)
    assert "cdpo run runs/tune/best.yaml" in page


def test_keys_become_sections() -> None:
    point = {"training.beta": 3, "training.lora.rank": 4, "curriculum.window": 2}
    assert sections(point) == {"training": {"beta": 3, "lora": {"rank": 4}}, "curriculum": {"window": 2}}


def test_counts_are_reported(page: str) -> None:
    states = [trial.state for trial in search_of(12, 10)]
    counts = f"12 trials: {states.count('done')} done, {states.count('stopped')} stopped early, 1 failed;"
    assert counts in page and "3 more points with invalid combinations of values skipped" in page


def test_importance_of_few_trials_is_called_a_hint(page: str, tmp_path: Path) -> None:
    assert "over 11 trials. 0: not distinguishable from chance. With so few trials this is only a hint" in page
    many = page_of(search_of(60, 3), tmp_path, num_knobs=3, importance={knob["key"]: 1 / 3 for knob in KNOBS[:3]})
    assert "over 59 trials." in many and "only a hint" not in many
    none = page_of(search_of(4, 3), tmp_path, num_knobs=3)
    assert "No hyperparameter importance: 4 trials with a value are too few." in none
    chance = page_of(search_of(9, 2), tmp_path, num_knobs=2, importance={knob["key"]: 0.0 for knob in KNOBS[:2]})
    assert "8 trials with a value, no hyperparameter is distinguishable from chance." in chance


def test_selection_is_explained(page: str) -> None:
    assert "The validation prompts overestimate the best of many trials" in page and "held-out prompts" in page


def test_the_paper_as_the_best_needs_no_confirmation(tmp_path: Path) -> None:
    page = page_of([done(1, 0.5, PAPER_POINT), done(2, 0.1, PAPER_POINT)], tmp_path, gain=0.05)
    assert "nothing to confirm" in page and "The paper's schedule, without changes." in page
    assert "paper = best (trial 1)" in page


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [Trial(1, {}, FAILED, (), "broken")],
        [Trial(1, {"training.beta": 200.0}, RUNNING)],
        [Trial(1, {"training.beta": 200.0}, RUNNING, (report(1, is_last=False),))],
        [done(1, 0.1, {"training.beta": 200.0})],
        [done(1, None, {"training.beta": 200.0}, implicit_accuracy=None), Trial(2, {}, FAILED)],
        [done(1, 0.1, {"training.beta": 200.0}), done(2, 0.1, {"training.beta": 200.0}, implicit_accuracy=None)],
        [done(1, float("nan"), {"training.beta": 200.0}, diversity=None)],
    ],
)
@pytest.mark.parametrize("objectives", [["reward"], ["reward", "diversity"], ["implicit_accuracy"]])
def test_page_of_a_search_that_has_just_started(trials, objectives, tmp_path: Path) -> None:
    page = page_of(trials, tmp_path, num_knobs=1, objectives=objectives)
    assert len(cells(page)) == len(trials)
    assert not re.search(r"\b(nan|inf)\b", "".join(re.findall(r"<svg .*?</svg>", page, re.DOTALL)))


def test_values_of_the_papers_trial_only_are_reported(page: str, tmp_path: Path) -> None:
    trials = [done(1, 0.1, {"training.beta": 200.0, "curriculum.order": "easy_to_hard"}), done(2, 0.2, {})]
    departing = page_of(trials, tmp_path, num_knobs=1)
    assert "Only this trial has order easy_to_hard, because the config departs from the paper there" in departing
    assert "with the config&#39;s own values" in departing or "with the config's own values" in departing
    assert "Only this trial has" not in page


def test_same_results_give_the_same_page(tmp_path: Path) -> None:
    assert page_of(search_of(12, 3), tmp_path, num_knobs=3) == page_of(search_of(12, 3), tmp_path, num_knobs=3)


def test_positions_on_an_axis_follow_the_range_of_the_knob() -> None:
    """100 is in the middle of 10 to 1000 on a log axis, and at 1/11 of a linear axis."""
    trials = [{"number": 1, "point": {"training.beta": 100.0}}]
    for log, place in [(True, 0.5), (False, 90 / 990)]:
        knob = {"key": "training.beta", "choices": (), "low": 10, "high": 1000, "log": log, "is_integer": False}
        assert figures._knob_row(knob, trials)["places"][1] == pytest.approx(place)


def test_trials_of_one_choice_do_not_overlap_and_unused_knobs_have_their_own_position() -> None:
    knob = {"key": "curriculum.window", "choices": (1, 2)}
    points = [{"curriculum.window": 1}] * 20 + [{"curriculum.window": 2}] * 20 + [{}] * 20
    row = figures._knob_row(knob, [{"number": at, "point": point} for at, point in enumerate(points)])
    places = np.array([row["places"][at] for at in range(60)]).reshape(3, 20)
    assert len(np.unique(places)) == 60
    assert places[0].max() < row["reach"] / 2 < places[1].min() and places[1].max() < row["reach"] < places[2].min()
    assert [text for _, text in row["ticks"]] == ["1", "2", "not used"]
