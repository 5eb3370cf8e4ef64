import json
import subprocess
import sys

import numpy as np
import pytest
from made_up_trials import JUDGES, KNOBS, PAPER_POINT, confirmed, done, heldout_ids, report, search_of

from cdpo_ray.records import prompt_id
from cdpo_ray.search.findings import best, changes, chooses, confirm, pareto, search_summary, table_of
from cdpo_ray.search.trials import DONE, FAILED, RUNNING, STOPPED, Trial

CLIP = {"judge": "clip", "heldout_ids": heldout_ids(60)}
CHOOSING = chooses(heldout_ids(60))


def found_of(trials, *, paper_runs=None, found_runs=None, objectives=("reward",), importance=None):
    return search_summary(
        trials,
        name="tune",
        algorithm="tpe",
        objectives=objectives,
        judge="clip",
        knobs=KNOBS,
        num_invalid=3,
        importance=importance,
        paper_runs=paper_runs or {},
        found_runs=found_runs or {},
        heldout_ids=heldout_ids(60),
        best_config="runs/tune/best.yaml",
    )


def gains(gain: float, *, seeds: int = 3, prompts: int = 60, noise: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """``[seed, prompt]`` differences to the base of the paper's schedule and of one that is better by ``gain``."""
    rng = np.random.default_rng(0)
    paper = rng.normal(0.02, 0.05, size=(seeds, prompts))
    return paper, paper + gain + rng.normal(0, noise, size=(seeds, prompts))


def confirmation(gain: float, **size):
    paper, found = gains(gain, **size)
    return {"paper_runs": confirmed(paper.tolist()), "found_runs": confirmed(found.tolist())}


def test_best_is_the_finished_trial_with_the_highest_last_report() -> None:
    fell = Trial(4, {}, DONE, (report(1, is_last=False, reward=0.9), report(2, reward=0.01)))
    stopped = Trial(5, {}, STOPPED, (report(1, is_last=False, reward=0.8),))
    trials = [done(1, 0.02), done(2, 0.05), done(3, 0.05), fell, stopped, Trial(6, {}, FAILED), done(7, None)]
    assert best(trials, ["reward"]).number == 2
    assert best(trials[::-1], ["reward"]).number == 2


def test_another_objective_may_decide() -> None:
    trials = [done(1, 0.05, diversity=0.1), done(2, 0.01, diversity=0.3)]
    assert best(trials, ["diversity", "reward"]).number == 2


@pytest.mark.parametrize("trials", [[], [Trial(1, {})], [Trial(1, {}, FAILED)], [done(1, float("nan"))]])
def test_without_a_finished_trial_with_a_value_there_is_no_best(trials) -> None:
    assert best(trials, ["reward"]) is None
    assert found_of(trials)["sentence"] == "No trial has finished, so no schedule was found."


@pytest.mark.parametrize("objectives", [["reward"], ["reward", "diversity"], ["reward", "diversity", "win_rate"]])
def test_pareto_front_equals_brute_force(objectives) -> None:
    rng = np.random.default_rng(7)
    table = rng.integers(0, 5, size=(30, 3)) / 10  # few values, so that there are ties
    trials = [
        done(number, reward, diversity=diversity, win_rate=win_rate)
        for number, (reward, diversity, win_rate) in enumerate(table.tolist(), 1)
    ]
    table = table[:, : len(objectives)]
    expected = []
    for mine in range(30):
        beaten = False
        for other in range(30):
            gained = table[other] - table[mine]
            beaten |= bool(gained.min() >= 0 and gained.max() > 0)
        if not beaten:
            expected.append(mine + 1)
    assert pareto(trials, objectives) == expected


def test_only_finished_trials_with_all_values_are_on_the_front() -> None:
    trials = [
        done(1, 0.01, implicit_accuracy=0.5),
        done(2, 0.09, implicit_accuracy=None),
        Trial(3, {}, STOPPED, (report(reward=0.5, implicit_accuracy=0.9),)),
    ]
    assert pareto(trials, ["reward", "implicit_accuracy"]) == [1]


def test_changes_name_the_values_that_differ_from_the_papers() -> None:
    point = PAPER_POINT | {"training.beta": 372.81, "training.lora.rank": 16, "curriculum.pacing": "sliding_window"}
    assert changes(point | {"curriculum.window": 2}, PAPER_POINT) == (
        "beta 373, pacing sliding_window, lora.rank 16, window 2"
    )
    assert changes(PAPER_POINT, PAPER_POINT) == ""
    assert changes({}, PAPER_POINT) == ""  # a knob that is not used follows from another
    text = changes({"a.lr": 0.000123456, "a.loud": True, "a.cap": None, "a.layers": ["q", "k"]}, {})
    assert text == "lr 0.000123, loud true, cap none, layers q+k"


@pytest.mark.parametrize(
    ("gain", "verdict", "kept", "sentence"),
    [
        (0.05, "better", 2, "The found schedule holds: trial 2"),
        (
            0.0,
            "not significantly different",
            None,
            "The found schedule does not hold: trial 2 (beta 400) does not differ significantly from the paper's",
        ),
        (-0.05, "worse", 1, "The found schedule does not hold: trial 2 (beta 400) is worse"),
    ],
)
def test_verdict_is_that_of_new_seeds_on_the_judging_half(gain, verdict, kept, sentence) -> None:
    trials = [done(1, 0.02, PAPER_POINT), done(2, 0.4, PAPER_POINT | {"training.beta": 400.0})]
    found = found_of(trials, **confirmation(gain))
    assert found["verdict"] == verdict
    assert found["kept"] == kept or kept is None, "a worse schedule must not be kept"
    assert found["sentence"].startswith(sentence)
    assert "on 30 held-out prompts, 3 seeds" in found["sentence"]
    kept_name = "the paper's schedule" if found["kept"] == 1 else "trial 2"
    assert found["sentence"].endswith(f" Kept: {kept_name}, by the mean on the other 30 held-out prompts.")


def test_the_halves_depend_on_the_ids_alone() -> None:
    ids = [prompt_id(f"a red circle number {number}") for number in range(101)]
    chosen = {ids[place] for place in np.flatnonzero(chooses(ids))}
    assert len(chosen) == 50 and max(chosen) < min({*ids} - chosen)
    assert {ids[::-1][place] for place in np.flatnonzero(chooses(ids[::-1]))} == chosen
    assert chooses([]).tolist() == [] and chooses(["a"]).tolist() == [False]


def test_the_schedule_is_kept_by_one_half_and_judged_by_the_other() -> None:
    """The found schedule is better on the choosing half and worse on the judging half, then the reverse."""
    paper, found = gains(0.0)
    trials = [done(1, 0.02, PAPER_POINT), done(2, 0.4, PAPER_POINT | {"training.beta": 400.0})]
    for sign, kept, verdict, end in [
        (1, 2, "worse", "Kept: trial 2, by the mean on the other 30 held-out prompts."),
        (-1, 1, "better", "Kept: the paper's schedule, by the mean on the other 30 held-out prompts."),
    ]:
        apart = found + sign * np.where(CHOOSING, 0.05, -0.05)
        summary = found_of(trials, paper_runs=confirmed(paper.tolist()), found_runs=confirmed(apart.tolist()))
        assert (summary["kept"], summary["verdict"]) == (kept, verdict)
        assert summary["confirmation"]["choice"] == pytest.approx((apart - paper)[:, CHOOSING].mean())
        assert summary["sentence"].endswith(end)


def test_choosing_inflates_the_mean_on_the_choosing_half_only() -> None:
    """Two equal schedules: if found is kept, its mean is above 0 on the choosing half, but not on the judging half."""
    rng = np.random.default_rng(3)
    choices, judged = [], []
    for _ in range(120):
        difference = rng.normal(size=(3, 60))
        table, _ = confirm(confirmed(np.zeros((3, 60)).tolist()), confirmed(difference.tolist()), **CLIP)
        if table["choice"] > 0:
            choices.append(table["choice"])
            judged.append(table["judges"]["clip"]["difference"]["mean"])
    error = 1 / np.sqrt(3 * 30 * len(choices))
    assert np.mean(choices) > 4 * error and abs(np.mean(judged)) < 3 * error


@pytest.mark.parametrize(("num_seeds", "num_prompts"), [(1, 60), (2, 60), (3, 18)])
def test_fewer_than_3_seeds_or_10_judging_prompts_give_no_verdict_and_what_to_do(
    num_seeds: int, num_prompts: int
) -> None:
    paper, found = gains(0.05, seeds=num_seeds, prompts=num_prompts)
    table, warnings = confirm(
        confirmed(paper.tolist()), confirmed(found.tolist()), judge="clip", heldout_ids=heldout_ids(num_prompts)
    )
    assert table["judges"]["clip"]["verdict"] == "no verdict" and warnings == []
    assert set(table["judges"]["clip"]["difference"]) == {"mean", "no_interval"}


def test_a_sentence_without_verdict_says_why() -> None:
    trials = [done(1, 0.02, PAPER_POINT), done(2, 0.4, PAPER_POINT | {"training.beta": 400.0})]
    found = found_of(trials, **confirmation(0.05, seeds=2, noise=0))
    assert found["sentence"] == (
        "No verdict on trial 2 (beta 400), clip +0.050 [no interval] against the paper's schedule on 30 held-out"
        " prompts, 2 seeds: an interval needs at least 3 runs, got 2; set `search.confirm_seeds` to at least 3 and"
        " hold out at least 20 prompts. Kept: trial 2, by the mean on the other 30 held-out prompts."
    )
    *_, of_schedules, _ = table_of(found).split("\n\n")
    assert of_schedules.splitlines()[-1].split("  ")[0] == "verdict on found" and of_schedules.endswith("no verdict")
    assert of_schedules.count("[no interval]") == 3


def test_without_a_score_in_both_halves_there_is_no_confirmation() -> None:
    values = np.full((3, 60), np.nan)
    values[:, CHOOSING] = 0.1
    table, warnings = confirm(confirmed(values.tolist()), confirmed(values.tolist()), **CLIP)
    assert table is None
    assert warnings[-1] == ("no confirmation: clip needs a score in both halves of the held-out prompts; add prompts")
    assert confirm(confirmed([[0.1]]), confirmed([[0.2]]), judge="clip", heldout_ids=["a"])[0] is None


def test_difference_is_paired_by_seed_and_prompt() -> None:
    """Values with a spread of 0.05 over prompts and a constant gain of 0.004, which only pairing detects."""
    table, _ = confirm(**confirmation(0.004, noise=0), **CLIP)
    clip = table["judges"]["clip"]
    assert clip["difference"]["low"] == pytest.approx(0.004)
    assert clip["verdict"] == "better"
    assert clip["paper"]["high"] > clip["found"]["low"]


def test_means_are_over_seeds_and_prompts_and_by_seed() -> None:
    paper, found = gains(0.03)
    table, warnings = confirm(confirmed(paper.tolist()), confirmed(found.tolist()), **CLIP)
    paper, found = paper[:, ~CHOOSING], found[:, ~CHOOSING]
    clip = table["judges"]["clip"]
    assert [clip[arm]["mean"] for arm in ("paper", "found", "difference")] == pytest.approx(
        [paper.mean(), found.mean(), (found - paper).mean()]
    )
    np.testing.assert_allclose(clip["by_seed"]["difference"], (found - paper).mean(axis=1))
    assert (table["seeds"], warnings) == ([100, 101, 102], [])


def test_gain_of_one_seed_alone_does_not_hold() -> None:
    paper = np.zeros((3, 60))
    found = paper + np.array([[0.3], [-0.01], [-0.02]])
    table, _ = confirm(confirmed(paper.tolist()), confirmed(found.tolist()), **CLIP)
    assert table["judges"]["clip"]["difference"]["mean"] == pytest.approx(0.09)
    assert table["judges"]["clip"]["verdict"] == "not significantly different"


def test_a_non_deciding_judge_with_a_worse_result_is_named() -> None:
    paper, found = gains(0.05)
    trials = [done(1, 0.02), done(2, 0.4, {"training.beta": 400.0})]
    runs = {
        "paper_runs": confirmed(paper.tolist(), oracle=paper.tolist()),
        "found_runs": confirmed(found.tolist(), oracle=(paper - 0.05).tolist()),
    }
    sentence = found_of(trials, **runs)["sentence"]
    assert sentence.startswith("The found schedule holds") and " It is worse by oracle. Kept: trial 2" in sentence


def test_a_failed_seed_is_excluded_from_both_and_named() -> None:
    runs = confirmation(0.05)
    runs["found_runs"][101] = Trial(2, {}, FAILED, (), "TrainingError: NaN")
    del runs["paper_runs"][102]
    table, warnings = confirm(**runs, **CLIP)
    assert table["seeds"] == [100]
    assert warnings == [
        "seed 101 is excluded: the found schedule failed: TrainingError: NaN",
        "seed 102 is excluded: the paper's schedule is not trained yet",
    ]
    assert table["judges"]["clip"]["verdict"] == "no verdict"


def test_prompts_without_a_score_are_excluded_and_counted() -> None:
    paper, found = gains(0.05)
    holes = [[None, *row[1:]] for row in paper.tolist()]
    nothing = [[float("nan")] * 60] * 3
    table, warnings = confirm(confirmed(holes, oracle=nothing), confirmed(found.tolist(), oracle=nothing), **CLIP)
    assert table["choice"] == pytest.approx((found - paper)[:, CHOOSING][:, 1:].mean())
    assert table["judges"]["clip"]["difference"]["mean"] == pytest.approx((found - paper)[:, ~CHOOSING].mean())
    assert warnings == [
        "clip: 1 of 60 prompts lack a score and are excluded",
        "oracle: 60 of 60 prompts lack a score and are excluded",
    ]
    assert list(table["judges"]) == ["clip"]
    assert confirm(confirmed(nothing), confirmed(nothing), **CLIP)[0] is None


def test_the_paper_as_the_best_needs_no_confirmation() -> None:
    found = found_of([done(1, 0.5), done(2, 0.1)], **confirmation(0.05))
    assert found["confirmation"] is None and found["verdict"] is None
    assert found["sentence"] == (
        "The paper's schedule has the highest reward on the validation prompts: 1 other trial did not beat it. There is"
        " nothing to confirm."
    )


def test_an_unconfirmed_lead_is_called_unconfirmed() -> None:
    found = found_of([done(1, 0.1), done(2, 0.5, {"training.beta": 400.0})])
    assert found["sentence"] == (
        "Not confirmed yet: trial 2 (beta 400) has the highest reward of 2 trials on the validation prompts, which"
        " overestimate the best of many."
    )


def test_the_summary_has_plain_values_without_nan() -> None:
    trials = [*search_of(12, 10), done(13, float("nan"), win_rate=float("inf"))]
    found = found_of(trials, **confirmation(0.01), importance={"training.beta": 1.0})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert sum(found["counts"][state] for state in (DONE, STOPPED, FAILED, RUNNING)) == 13
    assert found["counts"]["invalid"] == 3


def test_table_has_the_trials_then_the_schedules_by_judge_then_the_verdict() -> None:
    trials = search_of(12, 5)
    paper, values = gains(0.05)
    runs = {
        "paper_runs": confirmed(paper.tolist(), oracle=paper.tolist()),
        "found_runs": confirmed(values.tolist(), oracle=paper.tolist()),
    }
    found = found_of(trials, **runs)
    of_trials, of_schedules, verdict = table_of(found).split("\n\n")
    assert [int(line.split()[0]) for line in of_trials.splitlines()[1:]] == list(range(1, 13))
    assert of_trials.splitlines()[1].endswith("the paper's")
    assert of_trials.splitlines()[found["best"]].startswith(f"{found['best']} *")
    assert [line.split("  ")[0] for line in of_schedules.splitlines()] == [
        "judging prompts",
        "paper - base",
        f"found (trial {found['best']}) - base",
        "found - paper",
        "verdict on found",
    ]
    assert all(judge in of_schedules.splitlines()[0] for judge in JUDGES)
    assert of_schedules.endswith("not significantly different")
    assert verdict == found["sentence"]


def test_interval_of_a_trial_is_the_deciding_judges_in_its_last_report() -> None:
    [trial] = found_of([Trial(1, {}, DONE, (report(1, reward=0.1), report(2, reward=0.2, width=0.05)))])["trials"]
    assert trial["interval"] == pytest.approx({"mean": 0.2, "low": 0.15, "high": 0.25})
    [trial] = found_of([done(1, 0.1)], objectives=["diversity", "reward"])["trials"]
    assert trial["interval"] is None and trial["values"] == {"diversity": 0.17, "reward": 0.1}


def test_a_trial_judged_on_few_prompts_has_a_value_and_no_interval() -> None:
    few = {"mean": 0.1, "no_interval": "an interval needs at least 10 prompts, got 6"}
    [trial] = found_of([done(1, 0.1, judges={"clip": dict.fromkeys(("difference", "win_rate"), few)})])["trials"]
    assert trial["interval"] is None and trial["values"] == {"reward": 0.1}


def test_summary_and_page_need_neither_torch_nor_ray() -> None:
    code = "import cdpo_ray.search.report, sys; print([name for name in ('torch', 'ray') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
