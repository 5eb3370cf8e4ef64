"""Ranking -> admitted pairs and drawn pairs of a stage."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cdpo_ray.curriculum.drawing import draw_pairs, swap_labels
from cdpo_ray.curriculum.measures import ACCEPTS, Cut, measure_function
from cdpo_ray.curriculum.pairs import AdmittedPairs, PairArrays, PairSet, ShuffledSlice, cap_per_prompt, concat
from cdpo_ray.curriculum.ranking import Ranking
from cdpo_ray.curriculum.stages import ORDERED, admitted_levels, new_level
from cdpo_ray.errors import CurriculumError
from cdpo_ray.randomness.numbers import Permutation


@dataclass(frozen=True)
class Schedule:
    """Which pairs are trained in which stage; the defaults are the paper's.

    Attributes:
        num_stages: number of stages and of levels of difficulty.
        measure: name of a `measure_function`.
        boundaries: ``linear`` in the measure or ``equal_count``; ``margin`` requires ``equal_count``.
        pacing, window: levels of each stage, see `admitted_levels`.
        order: ``easy_to_hard``; ``hard_to_easy``; ``random``: levels of the same sizes with randomly assigned pairs;
            ``shuffled``: the draws of ``easy_to_hard``, randomly assigned to stages; ``none``: every stage draws from
            all pairs; ``best_against_worst``: every stage draws from one pair per prompt.
        draws: ``uniform``, or ``by_measure``: in proportion to the measure.
        min_rank_gap: smallest rank gap that forms a pair, >= 1; the levels divide the gaps from it.
        min_score_gap: score gap that pairs must exceed, in the reward's unit.
        min_gap_in_noise: multiple of the score gaps' noise that pairs must exceed; `None`: noise is ignored.
        max_pairs_per_prompt: maximum number of candidates per prompt and stage; `None`: all.
        label_noise: share of drawn pairs whose labels are swapped.

    Source: arXiv:2405.13637.
    """

    num_stages: int = 5
    measure: str = "rank_gap"
    boundaries: str = "linear"
    pacing: str = "cumulative"
    window: int | None = None
    order: str = "easy_to_hard"
    draws: str = "uniform"
    min_rank_gap: int = 1
    min_score_gap: float = 0.0
    min_gap_in_noise: float | None = None
    max_pairs_per_prompt: int | None = None
    label_noise: float = 0.0

    def levels(self, stage: int) -> tuple[int, int]:
        """First and last level of a stage."""
        return admitted_levels(stage, self.num_stages, order=self.order, pacing=self.pacing, window=self.window)


class Curriculum:
    """Stages of a schedule for one ranking; all results are functions of the arguments only.

    Args:
        ranking: ranking of the samples of each prompt.
        schedule: which pairs are trained in which stage.
        seed: address of all randomness.
        values: ``[prompt, sample]``, by sample index: implicit rewards, whose differences are the ``margin``; `None`:
            all equal, as before the first update.
        gap_noise: noise of the score gaps, see `curriculum.noise`; `None`: not known.

    Raises:
        ValueError: if the measure does not support the schedule's levels or its draws, or the schedule requires a noise
            that is not known.

    Attributes:
        formed: all pairs that can be formed.
        gap_noise: as given.
    """

    def __init__(
        self,
        ranking: Ranking,
        schedule: Schedule,
        *,
        seed: int,
        values: NDArray[np.floating] | None = None,
        gap_noise: float | None = None,
    ) -> None:
        if schedule.draws == "by_measure" and schedule.measure not in ACCEPTS:
            raise ValueError(f"draws `by_measure` need one of {', '.join(ACCEPTS)}, got {schedule.measure!r}")
        if schedule.min_gap_in_noise is not None:
            if gap_noise is None:
                raise ValueError("`min_gap_in_noise` needs `gap_noise`, got None; score some prompts twice")
            above = max(schedule.min_score_gap, schedule.min_gap_in_noise * gap_noise)
            schedule = replace(schedule, min_score_gap=above, min_gap_in_noise=None)
        self.ranking, self.schedule, self.seed, self.gap_noise = ranking, schedule, seed, gap_noise
        cut = Cut(
            ranking, schedule.num_stages, schedule.boundaries, schedule.min_score_gap, values, schedule.min_rank_gap
        )
        self.formed = cut.formed
        if schedule.order in (*ORDERED, "random"):
            self._pairs_of_levels = measure_function(schedule.measure)(cut)
        elif schedule.order == "shuffled":
            in_order = replace(schedule, order="easy_to_hard", label_noise=0.0)
            self._in_order = Curriculum(ranking, in_order, seed=seed, values=values)

    def plan(self, stage: int, num_draws: int) -> tuple[PairArrays, PairSet]:
        """Drawn pairs of a stage, in training order, and its candidates.

        A longer plan starts with the same pairs, except in ``shuffled`` order, which distributes the draws of the whole
        run, and whose candidates are all pairs.

        Args:
            stage: number of the stage, from 1.
            num_draws: number of pairs to draw.

        Raises:
            CurriculumError: if a stage admits no pair, or weighted draws find none.
        """
        schedule, pairs = self.schedule, self._candidates(stage)
        if not pairs.num_pairs:
            raise CurriculumError(self._why_no_pair(stage))
        shuffled = schedule.order == "shuffled"
        drawn = self._shuffled(stage, num_draws) if shuffled else self._draw(pairs, stage, num_draws)
        return swap_labels(drawn, schedule.label_noise, seed=self.seed, stage=stage), pairs

    def num_new_pairs(self, stage: int) -> int | None:
        """Number of pairs of the level that a stage is the first to admit; `None`: every stage has all levels.

        ``max_pairs_per_prompt`` is ignored: it selects other pairs in each stage.

        Args:
            stage: number of the stage, from 1.
        """
        level = new_level(stage, self.schedule.num_stages, order=self.schedule.order)
        return None if level is None else self._pairs_of_levels(level, level).num_pairs

    def empty_levels(self) -> list[str]:
        """One sentence per stage whose new level is empty: why, and what to do.

        Raises:
            CurriculumError: if no stage after the first has new pairs.
        """
        schedule = self.schedule
        later = range(2, schedule.num_stages + 1)
        empty = [stage for stage in later if self.num_new_pairs(stage) == 0]
        cut = f"by `{schedule.measure}` with `{schedule.boundaries}` boundaries"
        remedy = (
            "lower `curriculum.num_stages`, or choose other `curriculum.boundaries` or another `curriculum.measure`"
        )
        if empty and len(empty) == len(later):
            raise CurriculumError(
                f"no stage after the first admits new pairs: all {self.formed.num_pairs} pairs are in one level of"
                f" {schedule.num_stages} {cut}; {remedy}"
            )
        return [
            f"stage {stage} admits no pair that earlier stages do not: its new level, one of {schedule.num_stages}"
            f" {cut}, is empty; {remedy}"
            for stage in empty
        ]

    def _candidates(self, stage: int) -> PairSet:
        limit, pairs = self.schedule.max_pairs_per_prompt, self._pairs_in_levels(stage)
        if limit is None or self.schedule.order == "shuffled":
            return pairs
        return cap_per_prompt(pairs, limit, seed=self.seed, stage=stage)

    def _pairs_in_levels(self, stage: int) -> PairSet:
        first, last = self.schedule.levels(stage)
        match self.schedule.order:
            case "easy_to_hard" | "hard_to_easy":
                return self._pairs_of_levels(first, last)
            case "random":
                start, end = (self._pairs_of_levels(1, level).num_pairs if level else 0 for level in (first - 1, last))
                return ShuffledSlice(self.formed, start, end, seed=self.seed)
            case "best_against_worst":
                farthest = np.maximum(self.ranking.num_ranked - 1, 1)
                nearest = np.maximum(farthest, self.schedule.min_rank_gap)
                return AdmittedPairs(self.ranking, nearest, farthest, min_score_gap=self.schedule.min_score_gap)
            case "none" | "shuffled":
                return self.formed
            case unknown:
                raise ValueError(f"`order` must be one of those in `Schedule`, got {unknown!r}")

    def _draw(self, admitted: PairSet, stage: int, num_draws: int) -> PairArrays:
        accept = None
        if self.schedule.draws == "by_measure":
            accept = ACCEPTS[self.schedule.measure](admitted, self.formed)
        try:
            return draw_pairs(admitted, num_draws, seed=self.seed, stage=stage, accept=accept)
        except ValueError as error:
            raise CurriculumError(str(error)) from None

    def _shuffled(self, stage: int, num_draws: int) -> PairArrays:
        stages = range(1, self.schedule.num_stages + 1)
        whole_run = concat([self._in_order.plan(in_order, num_draws)[0] for in_order in stages])
        shuffle = Permutation(len(whole_run), "shuffle", self.seed)
        positions = shuffle((stage - 1) * num_draws + np.arange(num_draws))
        return replace(whole_run.take(positions), draw=np.arange(num_draws))

    def _why_no_pair(self, stage: int) -> str:
        schedule, (first, last) = self.schedule, self.schedule.levels(stage)
        if self.formed.num_pairs:
            return (
                f"stage {stage} admits no pair: levels {first} to {last} of {schedule.num_stages} by"
                f" `{schedule.measure}` with `{schedule.boundaries}` boundaries hold none of the"
                f" {self.formed.num_pairs} pairs; lower `num_stages`, or choose other `boundaries` or `pacing`"
            )
        scores, num_unranked = self.ranking.sorted_scores, self.ranking.num_unranked.sum()
        spread = np.fmax.reduce(scores[:, 0] - np.fmin.reduce(scores, axis=1), initial=0.0)
        return (
            f"stage {stage} admits no pair: the scores of a prompt differ by at most {spread:g} in {len(scores)}"
            f" prompts, pairs must differ by more than {schedule.min_score_gap:g} and by {schedule.min_rank_gap} ranks"
            f" of {self.ranking.num_samples}, and {num_unranked} scores are not finite; lower `min_score_gap`,"
            " `min_gap_in_noise` or `min_rank_gap`, or check the reward if scores are all equal or not finite"
        )
