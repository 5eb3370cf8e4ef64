import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_up_trials import KNOBS, PAPER_POINT, confirmed, done, report, search_of

from cdpo_ray.search import figures
from cdpo_ray.search.findings import find
from cdpo_ray.search.report import sections, write_report
from cdpo_ray.search.trials import FAILED, RUNNING, Trial


def page_of(trials, path: Path, *, num_knobs=10, gain=None, objectives=("reward",), importance=None, **given) -> str:
    runs = {"paper_runs": {}, "found_runs": {}}
    if gain is not None:
        paper = np.random.default_rng(0).normal(0.02, 0.05, size=(3, 40))
        runs = {"paper_runs": confirmed(paper.tolist()), "found_runs": confirmed((paper + gain).tolist())}
    found = find(
        trials,
        name="tune",
        algorithm="tpe",
        objectives=objectives,
        judge="clip",
        knobs=KNOBS[:num_knobs],
        num_invalid=3,
        importance=importance,
        best_config="runs/tune/best.yaml",
        num_resamples=200,
        seed=0,
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
    """Of the table of all trials."""
    rows = page[page.index("<h2>All trials") :].split("<tr>")[2:]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows]


def test_verdict_comes_first(page: str) -> None:
    assert '<li class="better">The found schedule holds: trial ' in page
    assert page.index("The found schedule holds") < page.index("<h2>") < page.index("<svg")


@pytest.mark.parametrize(
    ("gain", "tone", "sentence"),
    [(0.0, "same", "is not told apart from"), (-0.05, "worse", "is worse"), (None, "same", "Not confirmed yet: ")],
)
def test_verdict_has_the_colour_of_what_it_says(gain, tone, sentence, tmp_path: Path) -> None:
    page = page_of(search_of(12, 2), tmp_path, num_knobs=2, gain=gain)
    [verdict] = re.findall(r'<ul class="headline">\n<li class="(\w+)">(.*?)</li>', page)
    assert verdict[0] == tone and sentence in verdict[1]


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
    assert "found failed: &lt;i&gt;␛[31m" in hostile


def test_page_refers_to_nothing_outside_itself(page: str) -> None:
    targets = re.findall(r'(?:src|href|action|data|poster)\s*=\s*"([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert all(target.startswith("#") for target in targets)
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert "@import" not in page and "default-src 'none'" in page


def test_pictures_have_no_number_that_is_none(page: str) -> None:
    pictures = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    assert len(pictures) == 5
    for picture in pictures:
        assert not re.search(r"\b(nan|inf|None)\b", picture)


def test_best_schedule_is_yaml_of_what_it_changes(page: str) -> None:
    given = yaml.safe_load(re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)[1])
    best = next(trial for trial in search_of(12, 10) if f"<td>{trial.number} (best)</td>" in page)
    changed = {key: value for key, value in best.point.items() if PAPER_POINT.get(key) != value}
    assert changed and given == sections(changed)
    assert "cdpo run runs/tune/best.yaml" in page


def test_keys_become_sections() -> None:
    point = {"training.beta": 3, "training.lora.rank": 4, "curriculum.window": 2}
    assert sections(point) == {"training": {"beta": 3, "lora": {"rank": 4}}, "curriculum": {"window": 2}}


def test_counts_are_told(page: str) -> None:
    states = [trial.state for trial in search_of(12, 10)]
    told = f"12 trials: {states.count('done')} done, {states.count('stopped')} stopped early, 1 failed;"
    assert told in page and "3 more points were drawn and left out" in page


def test_importance_of_few_trials_is_called_a_hint(page: str, tmp_path: Path) -> None:
    assert "varies over 11 trials; 0: not told apart from chance. So few trials tell little" in page
    many = page_of(search_of(60, 3), tmp_path, num_knobs=3, importance={knob["key"]: 1 / 3 for knob in KNOBS[:3]})
    assert "varies over 59 trials;" in many and "tell little" not in many
    none = page_of(search_of(4, 3), tmp_path, num_knobs=3)
    assert "No importance of knobs: 4 trials with a value tell too little." in none
    chance = page_of(search_of(9, 2), tmp_path, num_knobs=2, importance={knob["key"]: 0.0 for knob in KNOBS[:2]})
    assert "8 trials with a value none stands out from chance." in chance


def test_selection_is_explained(page: str) -> None:
    assert "The best of many trials looks better than it is" in page and "held-out prompts" in page


def test_best_of_the_paper_is_said_and_asks_for_no_confirmation(tmp_path: Path) -> None:
    page = page_of([done(1, 0.5, PAPER_POINT), done(2, 0.1, PAPER_POINT)], tmp_path, gain=0.05)
    assert "nothing to confirm" in page and "The paper's own: nothing to change." in page
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
def test_page_of_a_search_that_has_hardly_begun(trials, objectives, tmp_path: Path) -> None:
    page = page_of(trials, tmp_path, num_knobs=1, objectives=objectives)
    assert len(cells(page)) == len(trials)
    assert not re.search(r"\b(nan|inf)\b", "".join(re.findall(r"<svg .*?</svg>", page, re.DOTALL)))


def test_what_the_paper_alone_has_is_told(page: str, tmp_path: Path) -> None:
    trials = [done(1, 0.1, {"training.beta": 200.0, "curriculum.order": "easy_to_hard"}), done(2, 0.2, {})]
    told = page_of(trials, tmp_path, num_knobs=1)
    assert "which alone has order easy_to_hard: there the config departs from the paper" in told
    assert "with the config&#39;s own values" in told or "with the config's own values" in told
    assert "which alone has" not in page


def test_same_findings_give_the_same_page(tmp_path: Path) -> None:
    assert page_of(search_of(12, 3), tmp_path, num_knobs=3) == page_of(search_of(12, 3), tmp_path, num_knobs=3)


def test_places_of_a_knob_follow_its_range() -> None:
    """100 lies in the middle of 10 to 1000 on a log axis, and at 1/11 of a linear one."""
    trials = [{"number": 1, "point": {"training.beta": 100.0}}]
    for log, place in [(True, 0.5), (False, 90 / 990)]:
        knob = {"key": "training.beta", "choices": (), "low": 10, "high": 1000, "log": log, "is_integer": False}
        assert figures._knob_row(knob, trials)["places"][1] == pytest.approx(place)


def test_trials_of_one_choice_lie_apart_within_it_and_unused_knobs_have_a_place_of_their_own() -> None:
    knob = {"key": "curriculum.window", "choices": (1, 2)}
    points = [{"curriculum.window": 1}] * 20 + [{"curriculum.window": 2}] * 20 + [{}] * 20
    row = figures._knob_row(knob, [{"number": at, "point": point} for at, point in enumerate(points)])
    places = np.array([row["places"][at] for at in range(60)]).reshape(3, 20)
    assert len(np.unique(places)) == 60
    assert places[0].max() < row["reach"] / 2 < places[1].min() and places[1].max() < row["reach"] < places[2].min()
    assert [text for _, text in row["ticks"]] == ["1", "2", "not used"]
