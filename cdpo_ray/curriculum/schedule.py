"""Ranking -> the pairs that a stage admits, and those it trains on."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cdpo_ray.curriculum.drawing import draw_pairs, swap_labels
from cdpo_ray.curriculum.measures import ACCEPTS, MEASURES, Cut
from cdpo_ray.curriculum.pairs import AdmittedPairs, DealtPairs, PairBatch, PairSet, cap_per_prompt, concat
from cdpo_ray.curriculum.ranking import Ranking
from cdpo_ray.curriculum.stages import ORDERED, admitted_levels
from cdpo_ray.errors import CurriculumError
from cdpo_ray.randomness.numbers import Permutation


@dataclass(frozen=True)
class Schedule:
    """What is shown and when; the defaults are the paper's.

    Attributes:
        num_stages: as many as levels of difficulty.
        measure: a key of `MEASURES`.
        boundaries: ``linear`` in the measure or ``equal_count``; ``margin`` needs ``equal_count``.
        pacing, window: levels a stage, see `admitted_levels`.
        order: ``easy_to_hard``; ``hard_to_easy``; ``random``: levels of the same sizes, dealt without regard to
            difficulty; ``shuffled``: the very draws of ``easy_to_hard``, dealt to the stages at random; ``none``: every
            stage draws from all pairs; ``best_against_worst``: every stage draws from one pair a prompt.
        draws: ``uniform``, or in proportion to the measure, ``by_measure``.
        min_score_gap: pairs form above it, in the reward's unit.
        min_gap_in_noise: pairs form above this many times the noise of score gaps; None: noise does not matter.
        max_pairs_per_prompt: candidates of a prompt in a stage; None: all.
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
    min_score_gap: float = 0.0
    min_gap_in_noise: float | None = None
    max_pairs_per_prompt: int | None = None
    label_noise: float = 0.0

    def levels(self, stage: int) -> tuple[int, int]:
        """First and last level that a stage draws from."""
        return admitted_levels(stage, self.num_stages, order=self.order, pacing=self.pacing, window=self.window)


class Curriculum:
    """The stages of a schedule over one ranking; everything it gives is a function of its arguments alone.

    Args:
        ranking: the samples of each prompt, best first.
        schedule: what is shown and when.
        seed: address of all that is random.
        values: ``[prompt, sample]``, by sample index: each sample's value under the policy, of which ``margin`` takes
            differences; None: all equal, as before the first update.
        gap_noise: of the ranking's score gaps, see `curriculum.noise`; None: not known.

    Raises:
        ValueError: if the measure cannot cut this ranking, or weigh its pairs, as the schedule asks, or the schedule
            asks for a noise that is not known.

    Attributes:
        formed: every pair that can be formed.
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
        self.ranking, self.schedule, self.seed = ranking, schedule, seed
        self.formed = AdmittedPairs(ranking, min_score_gap=schedule.min_score_gap)
        if schedule.order in (*ORDERED, "random"):
            cut = Cut(ranking, schedule.num_stages, schedule.boundaries, schedule.min_score_gap, values)
            self._between = MEASURES[schedule.measure](cut)
        elif schedule.order == "shuffled":
            in_order = replace(schedule, order="easy_to_hard", label_noise=0.0)
            self._in_order = Curriculum(ranking, in_order, seed=seed, values=values)

    def plan(self, stage: int, num_draws: int) -> tuple[PairBatch, PairSet]:
        """The pairs that a stage trains on, in training order, and its candidates.

        A longer plan starts with the same pairs, but for a ``shuffled`` order, which deals out the draws of a whole run
        and whose candidates are all pairs, as any draw may come to any stage.

        Raises:
            CurriculumError: if a stage admits no pair, or weighted draws find none.
        """
        schedule, pairs = self.schedule, self._candidates(stage)
        if not pairs.num_pairs:
            raise CurriculumError(self._why_no_pair(stage))
        drawn = self._deal(stage, num_draws) if schedule.order == "shuffled" else self._draw(pairs, stage, num_draws)
        return swap_labels(drawn, schedule.label_noise, seed=self.seed, stage=stage), pairs

    def _candidates(self, stage: int) -> PairSet:
        limit, pairs = self.schedule.max_pairs_per_prompt, self._pairs_in_levels(stage)
        if limit is None or self.schedule.order == "shuffled":
            return pairs
        return cap_per_prompt(pairs, limit, seed=self.seed, stage=stage)

    def _pairs_in_levels(self, stage: int) -> PairSet:
        first, last = self.schedule.levels(stage)
        match self.schedule.order:
            case "easy_to_hard" | "hard_to_easy":
                return self._between(first, last)
            case "random":
                start, end = (self._between(1, level).num_pairs if level else 0 for level in (first - 1, last))
                return DealtPairs(self.formed, start, end, seed=self.seed)
            case "best_against_worst":
                farthest = np.maximum(self.ranking.num_ranked - 1, 1)
                return AdmittedPairs(self.ranking, farthest, farthest, min_score_gap=self.schedule.min_score_gap)
            case "none" | "shuffled":
                return self.formed
            case unknown:
                raise ValueError(f"`order` must be one of those in `Schedule`, got {unknown!r}")

    def _draw(self, admitted: PairSet, stage: int, num_draws: int) -> PairBatch:
        accept = None
        if self.schedule.draws == "by_measure":
            accept = ACCEPTS[self.schedule.measure](admitted, self.formed)
        try:
            return draw_pairs(admitted, num_draws, seed=self.seed, stage=stage, accept=accept)
        except ValueError as error:
            raise CurriculumError(str(error)) from None

    def _deal(self, stage: int, num_draws: int) -> PairBatch:
        stages = range(1, self.schedule.num_stages + 1)
        whole_run = concat([self._in_order.plan(in_order, num_draws)[0] for in_order in stages])
        deal = Permutation(len(whole_run), "shuffle", self.seed)
        places = deal((stage - 1) * num_draws + np.arange(num_draws))
        return replace(whole_run.take(places), draw=np.arange(num_draws))

    def _why_no_pair(self, stage: int) -> str:
        schedule, (first, last) = self.schedule, self.schedule.levels(stage)
        if self.formed.num_pairs:
            return (
                f"stage {stage} admits no pair: levels {first} to {last} of {schedule.num_stages} by"
                f" `{schedule.measure}` with `{schedule.boundaries}` boundaries hold none of the"
                f" {self.formed.num_pairs} pairs; lower `num_stages`, or choose other `boundaries` or `pacing`"
            )
        scores, num_set_aside = self.ranking.sorted_scores, self.ranking.num_set_aside.sum()
        spread = np.fmax.reduce(scores[:, 0] - np.fmin.reduce(scores, axis=1), initial=0.0)
        return (
            f"stage {stage} admits no pair: the scores of a prompt differ by at most {spread:g} in {len(scores)}"
            f" prompts, pairs form above {schedule.min_score_gap:g}, and {num_set_aside} scores are not finite;"
            " lower `min_score_gap` or `min_gap_in_noise`, or check the reward if scores are all equal or not finite"
        )


def plan_stage(
    ranking: Ranking,
    *,
    schedule: Schedule,
    stage: int,
    num_draws: int,
    seed: int,
    values: NDArray[np.floating] | None = None,
    gap_noise: float | None = None,
) -> tuple[PairBatch, PairSet]:
    """The pairs that a stage trains on, in training order, and its candidates; arguments and errors of `Curriculum`.

    A function of its arguments alone, so all workers that call it alike hold the same stage.
    """
    return Curriculum(ranking, schedule, seed=seed, values=values, gap_noise=gap_noise).plan(stage, num_draws)
