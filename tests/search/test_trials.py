"""Stored trials: no report twice, none lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from cdpo_ray.errors import StoreError
from cdpo_ray.search.trials import DONE, RUNNING, Trial, Trials, confirming_trials, read_trial


def stage_report(stage: int, *, is_last: bool = False) -> dict[str, Any]:
    return {"stage": stage, "is_last": is_last, "reward": 0.1 * stage}


def test_stored_trials_are_read_back_unchanged(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    trials.put(Trial(2, {"training.beta": 300.0, "curriculum.window": None}))
    trials.put(Trial(1, {"training.beta": 200}, seed=7))
    trials.add_report("002", stage_report(1))
    again = Trials(tmp_path)
    assert again == trials
    assert [*again] == ["001-seed-7", "002"], "by number"
    assert again["002"].point == {"training.beta": 300.0, "curriculum.window": None}


def test_a_repeated_report_changes_nothing(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    trials.put(Trial(1, {}))
    first = trials.add_report("001", stage_report(1))
    assert trials.add_report("001", stage_report(1)) is first
    assert Trials(tmp_path)["001"].reports == ({**stage_report(1), "order": 1},)


def test_reports_are_numbered_over_all_trials(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    for number in (1, 2):
        trials.put(Trial(number, {}))
    for name, stage in (("001", 1), ("002", 1), ("001", 2)):
        trials.add_report(name, stage_report(stage))
    orders = {trial.name: [report["order"] for report in trial.reports] for trial in Trials(tmp_path).values()}
    assert orders == {"001": [1, 3], "002": [2]}


def test_the_report_of_the_last_stage_makes_a_trial_done(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    trials.put(Trial(1, {}))
    assert trials.add_report("001", stage_report(1)).state == RUNNING
    assert trials.add_report("001", stage_report(2, is_last=True)).state == DONE
    assert Trials(tmp_path)["001"].state == DONE


def test_no_confirming_trial_has_the_seed_of_the_search() -> None:
    paper, leader = Trial(1, {"training.beta": 500.0}), Trial(7, {"training.beta": 900.0})
    found = confirming_trials([paper, leader], 2, searched_with=5)
    assert [(trial.number, trial.seed, trial.point["training.beta"]) for trial in found] == [
        (1, 6, 500.0), (7, 6, 900.0), (1, 7, 500.0), (7, 7, 900.0)
    ]  # fmt: skip


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    Trials(tmp_path).put(Trial(1, {}))
    (tmp_path / "001" / "trial.json").write_text('{"number": 1')
    with pytest.raises(StoreError, match=r"001/trial\.json: is damaged .*; delete .*001 to try that point again"):
        read_trial(tmp_path / "001")


@pytest.mark.parametrize(
    "changed",
    [
        {"number": "1"},
        {"number": 2},
        {"number": 0},
        {"seed": 7},
        {"state": "finished"},
        {"point": {"rewards.names": ["theirs:judge"]}},
        {"point": {"model.path": "theirs/model"}},
        {"point": {"training.beta/../x": 1}},
        {"point": []},
        {"reports": [{"stage": 1}]},
        {"reports": [{"stage": "1", "is_last": True, "order": 1}]},
        {"reports": [{"stage": 1, "is_last": True, "order": 1, "reward": "high"}]},
        {"reports": 3},
        {"error": ["a"]},
    ],
)
def test_fault_52_a_malformed_trial_is_named(changed: dict[str, Any], tmp_path: Path) -> None:
    Trials(tmp_path).put(Trial(1, {"training.beta": 5}))
    path = tmp_path / "001" / "trial.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(StoreError, match=r"001/trial\.json: is damaged .*; delete .*001 to try that point again"):
        Trials(tmp_path)


def test_fault_30_a_trial_behind_a_link_out_of_the_search_is_refused(tmp_path: Path) -> None:
    Trials(tmp_path / "elsewhere").put(Trial(1, {}))
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "001").symlink_to(tmp_path / "elsewhere" / "001")
    with pytest.raises(StoreError, match="leads out of"):
        Trials(tmp_path / "trials")
