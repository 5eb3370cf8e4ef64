"""Admitted and drawn pairs of each stage, for every schedule, against brute force over all pairs."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from brute_force import MIN_SCORE_GAP, SCORES, Pair, chi_square_is_plausible, formed_pairs, rows
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cdpo_ray.curriculum.measures import MEASURES, Cut
from cdpo_ray.curriculum.pairs import PairArrays, PairSet
from cdpo_ray.curriculum.ranking import Ranking, rank_samples
from cdpo_ray.curriculum.schedule import Curriculum, Schedule
from cdpo_ray.errors import CurriculumError

ORDERS = ("easy_to_hard", "hard_to_easy", "random", "shuffled", "none", "best_against_worst")
SCHEDULES = st.builds(
    Schedule,
    measure=st.sampled_from(["rank_gap", "score_gap", "score_gap_quantile"]),
    boundaries=st.sampled_from(["linear", "equal_count"]),
    pacing=st.sampled_from(["cumulative", "one_stage", "sliding_window"]),
    window=st.integers(1, 4),
    order=st.sampled_from(ORDERS),
    draws=st.sampled_from(["uniform", "by_measure"]),
    min_score_gap=MIN_SCORE_GAP,
    max_pairs_per_prompt=st.none() | st.integers(1, 9),
) | st.builds(
    Schedule,
    measure=st.just("margin"),
    boundaries=st.just("equal_count"),
    pacing=st.sampled_from(["cumulative", "one_stage", "sliding_window"]),
    window=st.integers(1, 4),
    order=st.sampled_from(["easy_to_hard", "hard_to_easy"]),
    min_score_gap=MIN_SCORE_GAP,
)


def plan_stage(
    ranking: Ranking, *, schedule: Schedule, stage: int, num_draws: int, seed: int, values: np.ndarray | None = None
) -> tuple[PairArrays, PairSet]:
    return Curriculum(ranking, schedule, seed=seed, values=values).plan(stage, num_draws)


def stage_of_scores(schedule: Schedule, scores: np.ndarray, stage: int) -> set[Pair] | int:
    """Expected candidates of a stage by the schedule's definition; in random order only their number."""
    formed = formed_pairs(scores, schedule.min_score_gap)
    if schedule.order in ("none", "shuffled"):
        return set(formed)
    if schedule.order == "best_against_worst":
        return {pair for pair in formed if pair[3] == np.isfinite(scores[pair[0]]).sum() - 1}
    cut = Cut(rank_samples(scores), schedule.num_stages, schedule.boundaries, schedule.min_score_gap)
    between = MEASURES[schedule.measure](cut)
    easy_first = [rows(between(level, level).all()) for level in range(1, schedule.num_stages + 1)]
    if schedule.order == "hard_to_easy":
        easy_first.reverse()
    seen = easy_first[:stage]
    if schedule.pacing != "cumulative":
        seen = seen[-(1 if schedule.pacing == "one_stage" else schedule.window or 1) :]
    pairs = {pair for level in seen for pair in level}
    return len(pairs) if schedule.order == "random" else pairs


@settings(max_examples=300)
@given(SCORES, SCHEDULES, st.integers(0, 3), st.data())
def test_every_stage_holds_the_pairs_of_its_schedule(
    scores: np.ndarray, schedule: Schedule, seed: int, data: st.DataObject
) -> None:
    scores = np.where(scores == 1e16, 5.0, scores)  # outliers with all the weight have a separate test
    schedule = replace(schedule, num_stages=data.draw(st.integers(1, scores.shape[1] - 1)))
    stage = data.draw(st.integers(1, schedule.num_stages))
    expected = stage_of_scores(schedule, scores, stage)
    in_order = replace(schedule, order="easy_to_hard")
    dealt_from = range(1, schedule.num_stages + 1) if schedule.order == "shuffled" else ()
    if not expected or not all(stage_of_scores(in_order, scores, earlier) for earlier in dealt_from):
        with pytest.raises(CurriculumError, match=r"stage \d admits no pair: "):
            plan_stage(rank_samples(scores), schedule=schedule, stage=stage, num_draws=3, seed=seed)
        return
    drawn, admitted = plan_stage(rank_samples(scores), schedule=schedule, stage=stage, num_draws=12, seed=seed)
    found = rows(admitted.all())
    assert len(set(found)) == len(found)
    limit = schedule.max_pairs_per_prompt if schedule.order != "shuffled" else None
    if isinstance(expected, int):
        assert set(found) <= set(formed_pairs(scores, schedule.min_score_gap))
        assert len(found) == expected or limit
    elif limit:
        per_prompt = Counter(pair[0] for pair in expected)
        assert set(found) <= expected
        assert Counter(pair[0] for pair in found) == {prompt: min(n, limit) for prompt, n in per_prompt.items()}
    else:
        assert set(found) == expected
    assert set(rows(drawn)) <= set(found)
    assert drawn.draw.tolist() == list(range(12))


@given(SCORES, SCHEDULES, st.data())
def test_new_pairs_are_those_that_no_earlier_stage_admits(
    scores: np.ndarray, schedule: Schedule, data: st.DataObject
) -> None:
    schedule = replace(schedule, num_stages=data.draw(st.integers(1, scores.shape[1] - 1)))
    in_order = replace(schedule, order="easy_to_hard") if schedule.order == "random" else schedule  # the same sizes
    curriculum = Curriculum(rank_samples(scores), schedule, seed=0)
    seen: set[Pair] = set()
    for stage in range(1, schedule.num_stages + 1):
        admitted = stage_of_scores(in_order, scores, stage)
        assert isinstance(admitted, set)
        has_levels = schedule.order in ("easy_to_hard", "hard_to_easy", "random")
        assert curriculum.num_new_pairs(stage) == (len(admitted - seen) if has_levels else None)
        seen |= admitted


BETWEEN_2_AND_4 = np.array([[0.0, 2.0, 6.0]])  # gaps 2, 4 and 6: of four linear levels the third is empty


@pytest.mark.parametrize("pacing", ["cumulative", "sliding_window"])
@pytest.mark.parametrize(("order", "stage"), [("easy_to_hard", 3), ("hard_to_easy", 2), ("random", 3)])
def test_a_stage_that_adds_nothing_is_named_with_the_remedy(order: str, stage: int, pacing: str) -> None:
    schedule = Schedule(num_stages=4, measure="score_gap", order=order, pacing=pacing, window=3)
    found = Curriculum(rank_samples(BETWEEN_2_AND_4), schedule, seed=0).empty_levels()
    assert found == [
        f"stage {stage} admits no pair that earlier stages do not: its new level, one of 4 by `score_gap` with `linear`"
        " boundaries, is empty; lower `curriculum.num_stages`, or choose other `curriculum.boundaries` or another"
        " `curriculum.measure`"
    ]


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(num_stages=1),
        Schedule(num_stages=2),
        Schedule(num_stages=2, pacing="one_stage"),
        Schedule(num_stages=2, pacing="sliding_window", window=1),
        Schedule(num_stages=2, max_pairs_per_prompt=1),
        Schedule(num_stages=3, measure="margin", boundaries="equal_count"),
        *(Schedule(num_stages=4, measure="score_gap", order=order) for order in ORDERS[3:]),
    ],
)
def test_a_schedule_whose_stages_all_add_pairs_or_have_no_levels_has_no_empty_level(schedule: Schedule) -> None:
    assert not Curriculum(rank_samples(BETWEEN_2_AND_4), schedule, seed=0).empty_levels()


def test_a_curriculum_without_new_pairs_after_its_first_stage_is_refused() -> None:
    scores = np.array([[0.0, 1.0], [3.0, 4.0]])  # both gaps are 1
    schedule = Schedule(num_stages=3, measure="score_gap")
    message = (
        "no stage after the first admits new pairs: all 2 pairs are in one level of 3 by `score_gap` with `linear`"
        r" boundaries; lower `curriculum\.num_stages`, or choose other"
    )
    with pytest.raises(CurriculumError, match=message):
        Curriculum(rank_samples(scores), schedule, seed=0).empty_levels()


def some_ranking(seed: int = 0) -> Ranking:
    return rank_samples(np.random.default_rng(seed).normal(size=(5, 12)))


@pytest.mark.parametrize(
    ("measure", "boundaries"), [("rank_gap", "linear"), ("rank_gap", "equal_count"), ("score_gap", "equal_count")]
)
def test_a_random_order_has_the_level_sizes_of_the_ordered_one(measure: str, boundaries: str) -> None:
    ordered = Schedule(measure=measure, boundaries=boundaries, pacing="one_stage")
    stages = {
        order: [Curriculum(some_ranking(), replace(ordered, order=order), seed=0).plan(k, 0)[1] for k in range(1, 6)]
        for order in ("easy_to_hard", "random")
    }
    assert [stage.num_pairs for stage in stages["random"]] == [stage.num_pairs for stage in stages["easy_to_hard"]]
    shared_out = [pair for stage in stages["random"] for pair in rows(stage.all())]
    assert sorted(shared_out) == sorted(rows(Curriculum(some_ranking(), ordered, seed=0).formed.all()))
    assert [rows(stage.all()) for stage in stages["random"]] != [rows(stage.all()) for stage in stages["easy_to_hard"]]


def test_in_a_random_order_all_stages_have_the_same_difficulty() -> None:
    schedule = Schedule(order="random", pacing="one_stage", num_stages=2, boundaries="equal_count")
    mean_gaps = [
        Curriculum(some_ranking(), schedule, seed=seed).plan(1, 0)[1].all().rank_gap.mean() for seed in range(200)
    ]
    every = Curriculum(some_ranking(), schedule, seed=0).formed.all().rank_gap
    assert np.mean(mean_gaps) == pytest.approx(every.mean(), abs=4 * every.std() / np.sqrt(330 * 200))


@given(SCHEDULES.filter(lambda schedule: schedule.measure != "margin"), st.integers(1, 30), st.integers(0, 9))
def test_a_shuffled_order_has_exactly_the_draws_of_the_ordered_one(
    schedule: Schedule, num_draws: int, seed: int
) -> None:
    ranking = some_ranking(seed)
    shown = {}
    for order in ("easy_to_hard", "shuffled"):
        curriculum = Curriculum(ranking, replace(schedule, order=order), seed=seed)
        try:
            shown[order] = [pair for stage in range(1, 6) for pair in rows(curriculum.plan(stage, num_draws)[0])]
        except CurriculumError:
            assume(False)
    assert Counter(shown["shuffled"]) == Counter(shown["easy_to_hard"])


def test_in_a_shuffled_order_all_stages_have_the_same_distribution() -> None:
    curriculum = Curriculum(some_ranking(), Schedule(order="shuffled"), seed=0)
    gaps = [curriculum.plan(stage, 2000)[0].rank_gap for stage in range(1, 6)]
    every = np.concatenate(gaps)
    assert all(abs(stage.mean() - every.mean()) < 4 * every.std() / np.sqrt(2000) for stage in gaps)
    plain = Curriculum(some_ranking(), Schedule(order="none"), seed=0).plan(1, 2000)[0].rank_gap
    assert every.mean() > plain.mean() + 1  # the paper's weights: easy pairs more often


@pytest.mark.parametrize("measure", ["rank_gap", "score_gap", "score_gap_quantile"])
def test_draws_by_measure_follow_it_within_a_stage(measure: str) -> None:
    ranking = some_ranking()
    schedule = Schedule(measure=measure, draws="by_measure", pacing="one_stage", num_stages=2)
    drawn, admitted = plan_stage(ranking, schedule=schedule, stage=2, num_draws=100_000, seed=0)
    pairs = admitted.all()
    every = np.sort(Curriculum(ranking, schedule, seed=0).formed.all().score_gap)
    weight = {
        "rank_gap": pairs.rank_gap,
        "score_gap": pairs.score_gap,
        "score_gap_quantile": np.searchsorted(every, pairs.score_gap, side="right"),
    }[measure]
    counts = np.array([Counter(drawn.identity(12).tolist())[name] for name in pairs.identity(12).tolist()])
    assert chi_square_is_plausible(counts, 100_000 * weight / weight.sum())


def test_margins_move_pairs_between_stages_and_stay_with_the_formed_ones() -> None:
    ranking = some_ranking()
    schedule = Schedule(measure="margin", boundaries="equal_count", pacing="one_stage")
    before = plan_stage(ranking, schedule=schedule, stage=1, num_draws=40, seed=0)
    values = np.random.default_rng(1).normal(size=(5, 12))
    after = plan_stage(ranking, schedule=schedule, stage=1, num_draws=40, seed=0, values=values)
    again = plan_stage(ranking, schedule=schedule, stage=1, num_draws=40, seed=0, values=values)
    assert rows(after[0]) == rows(again[0]) != rows(before[0])
    assert before[1].num_pairs == after[1].num_pairs == 66
    pairs = after[1].all()
    margins = values[pairs.prompt, pairs.chosen] - values[pairs.prompt, pairs.rejected]
    rest = [plan_stage(ranking, schedule=schedule, stage=k, num_draws=0, seed=0, values=values)[1] for k in range(2, 6)]
    others = [values[p.prompt, p.chosen] - values[p.prompt, p.rejected] for p in (stage.all() for stage in rest)]
    assert margins.min() >= max(map(np.max, others))


@pytest.mark.parametrize("order", [order for order in ORDERS if order != "shuffled"])
@pytest.mark.parametrize("draws", ["uniform", "by_measure"])
def test_a_longer_plan_starts_with_the_same_pairs(order: str, draws: str) -> None:
    schedule = Schedule(order=order, draws=draws, label_noise=0.3)
    short, long = (Curriculum(some_ranking(), schedule, seed=2).plan(2, count)[0] for count in (10, 200))
    assert rows(short) == rows(long)[:10]


def test_draws_of_the_papers_schedule_do_not_change_between_versions() -> None:
    drawn, _ = plan_stage(
        rank_samples(np.arange(16.0).reshape(2, 8)), schedule=Schedule(), stage=2, num_draws=5, seed=7
    )
    pinned = [(1, 7, 0, 7), (0, 7, 1, 6), (0, 6, 1, 5), (0, 5, 0, 5), (0, 7, 2, 5)]
    assert [pair[:4] for pair in rows(drawn)] == pinned


@pytest.mark.parametrize("order", ["easy_to_hard", "shuffled"])
def test_labels_are_swapped_with_their_probability_and_gaps_stay(order: str) -> None:
    plain, noisy = (
        plan_stage(some_ranking(), schedule=Schedule(order=order, label_noise=p), stage=3, num_draws=4000, seed=0)[0]
        for p in (0, 0.25)
    )
    swapped = plain.chosen != noisy.chosen
    assert 0.22 < swapped.mean() < 0.28
    assert (noisy.rejected[swapped] == plain.chosen[swapped]).all() and (noisy.rank_gap == plain.rank_gap).all()


@pytest.mark.parametrize(
    "scores", [np.ones((3, 6)), np.full((3, 6), np.nan), np.zeros((0, 6)), np.linspace(0, 0.05, 6)[None]]
)
@pytest.mark.parametrize("order", ORDERS)
def test_fault_19_scores_that_form_no_pair_are_refused_with_the_reason(scores: np.ndarray, order: str) -> None:
    schedule = Schedule(order=order, min_score_gap=0.1)
    with pytest.raises(
        CurriculumError, match=r"stage 2 admits no pair: .* must differ by more than 0\.1 .*; lower `min_score_gap`"
    ):
        plan_stage(rank_samples(scores), schedule=schedule, stage=2, num_draws=4, seed=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("boundaries", ["linear", "equal_count"])
@pytest.mark.parametrize("measure", ["rank_gap", "score_gap", "score_gap_quantile"])
def test_pairs_below_the_smallest_rank_gap_are_left_out_and_the_levels_divide_the_others(
    measure: str, boundaries: str, order: str
) -> None:
    scores = np.random.default_rng(0).normal(size=(5, 9))
    expected = {pair for pair in formed_pairs(scores) if pair[3] >= 3}
    schedule = Schedule(num_stages=3, measure=measure, boundaries=boundaries, order=order, min_rank_gap=3)
    curriculum = Curriculum(rank_samples(scores), schedule, seed=0)
    stages = [set(rows(curriculum.plan(stage, 4)[1].all())) for stage in (1, 2, 3)]
    assert set(rows(curriculum.formed.all())) == expected
    if order == "best_against_worst":
        assert stages == [{pair for pair in expected if pair[3] == 8}] * 3
    else:
        assert set().union(*stages) == expected
    if order in ("easy_to_hard", "hard_to_easy", "random"):
        assert stages[0] < stages[1] < stages[2]  # no level is empty


@given(SCORES, SCHEDULES, st.floats(0.5, 4), st.sampled_from([0.0, 0.05, 0.25, 2.0]))
def test_pairs_exceed_the_larger_of_the_smallest_gap_and_the_noise(
    scores: np.ndarray, schedule: Schedule, min_gap_in_noise: float, gap_noise: float
) -> None:
    schedule = replace(schedule, num_stages=1)
    by_noise = replace(schedule, min_gap_in_noise=min_gap_in_noise)
    above = max(schedule.min_score_gap, min_gap_in_noise * gap_noise)
    formed = Curriculum(rank_samples(scores), by_noise, seed=0, gap_noise=gap_noise).formed
    assert rows(formed.all()) == formed_pairs(scores, above)
    stages = []
    for each, noise in ((by_noise, gap_noise), (replace(schedule, min_score_gap=above), None)):
        try:
            stages.append(rows(Curriculum(rank_samples(scores), each, seed=0, gap_noise=noise).plan(1, 9)[0]))
        except CurriculumError as error:
            stages.append(str(error))
    assert stages[0] == stages[1]


def test_a_smallest_gap_in_noise_needs_the_noise() -> None:
    with pytest.raises(ValueError, match="`min_gap_in_noise` needs `gap_noise`, got None; score some prompts twice"):
        Curriculum(some_ranking(), Schedule(min_gap_in_noise=2.0), seed=0)


def test_an_empty_level_is_refused_with_the_reason() -> None:
    scores = np.array([[0.0, 1.0, 10.0]])  # gaps 1, 9 and 10: nothing between 2.5 and 7.5
    schedule = Schedule(num_stages=4, measure="score_gap", pacing="one_stage")
    message = (
        "stage 2 admits no pair: levels 2 to 2 of 4 by `score_gap` with `linear` boundaries hold none of the 3 pairs"
    )
    with pytest.raises(CurriculumError, match=message):
        plan_stage(rank_samples(scores), schedule=schedule, stage=2, num_draws=4, seed=0)


def test_a_margin_has_no_weights() -> None:
    schedule = Schedule(measure="margin", boundaries="equal_count", draws="by_measure")
    with pytest.raises(ValueError, match=r"draws `by_measure` need one of rank_gap, score_gap, .*, got 'margin'"):
        Curriculum(some_ranking(), schedule, seed=0)


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="`order` must be one of those in `Schedule`, got 'backwards'"):
        plan_stage(some_ranking(), schedule=Schedule(order="backwards"), stage=1, num_draws=1, seed=0)


def test_plain_dpo_may_have_more_stages_than_rank_gaps() -> None:
    for order, expected in (("none", 3), ("best_against_worst", 1)):
        schedule = Schedule(num_stages=9, order=order)
        _, admitted = plan_stage(rank_samples(np.arange(3.0)[None]), schedule=schedule, stage=9, num_draws=1, seed=0)
        assert admitted.num_pairs == expected


def test_the_published_size_is_admitted_without_a_table() -> None:
    ranking = rank_samples(np.random.default_rng(0).normal(size=(135, 500)))
    counts = [Curriculum(ranking, Schedule(), seed=0).plan(stage, 10)[1].num_pairs for stage in range(1, 6)]
    assert counts[0] == 135 * 5050 and counts[-1] == 135 * 124_750
    assert all(easier < harder for easier, harder in itertools.pairwise(counts))
