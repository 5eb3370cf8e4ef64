"""Votes of people on held-out images -> the judge `people`, and how far it agrees with the others."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cdpo_ray.evaluation.report import check_comparison, read_metrics, read_table, votes_as_text
from cdpo_ray.evaluation.statistics import Scores, bootstrap_mean, compare_scores
from cdpo_ray.evaluation.votes import Vote, rated_images, read_all_votes, voted_files
from cdpo_ray.pages.page import reasons_without_interval
from cdpo_ray.records import ARMS, EVALUATION, HELDOUT, PEOPLE, score_column
from cdpo_ray.store import RunFolder

NUM_RESAMPLES = 10_000
CHOSEN_LEFT = {"left": 1.0, "right": -1.0, "tie": 0.0}


@dataclass(frozen=True)
class Votes:
    """Votes on held-out pairs, NaN where a voter has none.

    Attributes:
        voters: names.
        tuned: ``[voter, prompt, image]``, 1: the fine-tuned model's image is better, -1: the base model's, 0: a tie.
        left: the same, 1: the image on the left is better, -1: the one on the right, 0: a tie.
        num_other: number of votes on images that the run does not have any more.
    """

    voters: Sequence[str]
    tuned: Scores
    left: Scores
    num_other: int = 0


def measure_people(votes: Votes, judged: Mapping[str, Scores], *, seed: int) -> dict[str, Any]:
    """The judge `people`.

    Args:
        votes: at least one.
        judged: by judge, ``[prompt, image]`` difference of its scores, tuned minus base.
        seed: seed of the bootstrap over prompts.

    Returns:
        `comparison`: `statistics.Comparison`; an image's score is its share of the pair's votes, a tie is half a vote.
        `left`: share of votes for the left image; one half if voters do not favour a side.
        `agreement`: by judge, share of votes for the image that the judge scores higher; equal scores count one half.
        `between_voters`: share of two voters' votes on one pair that are equal.
        `voters`: by voter, `num_votes`, `num_ties`, `win_rate` of the fine-tuned model, `left`, and `agreement` with
        the other voters.
        `num_votes`, `num_ties`, `num_prompts`, `num_other`: see `Votes`.

        All but `comparison` and `win_rate` exclude ties. An estimate is `None` if no vote counts for it.
    """

    def over_prompts(values: Scores) -> dict[str, Any] | None:
        """Mean over prompts of ``[voter, prompt, image]``, with its interval; NaN is excluded."""
        counts = np.isfinite(values).sum(axis=(0, 2))
        kept = counts > 0
        if not kept.any():
            return None
        means = np.nansum(values, axis=(0, 2))[kept] / counts[kept]
        return asdict(bootstrap_mean(means, num_resamples=NUM_RESAMPLES, seed=seed))

    decided = np.where(votes.tuned == 0, np.nan, votes.tuned)
    left = 0.5 + 0.5 * np.where(votes.left == 0, np.nan, votes.left)
    alike = _share_of_equal_votes(decided)
    voted = np.isfinite(votes.tuned)
    num_voters = voted.sum(axis=0)
    shares = 0.5 + 0.5 * np.nansum(votes.tuned, axis=0) / np.where(num_voters, num_voters, np.nan)
    compared = compare_scores(1 - shares, shares, num_resamples=NUM_RESAMPLES, seed=seed)
    return {
        "comparison": compared.to_dict(),
        "num_votes": int(voted.sum()),
        "num_ties": int((votes.tuned == 0).sum()),
        "num_prompts": int(voted.any(axis=(0, 2)).sum()),
        "num_other": votes.num_other,
        "left": over_prompts(left),
        "agreement": {
            judge: over_prompts(0.5 + 0.5 * decided * np.sign(np.where(np.isfinite(scores), scores, np.nan)))
            for judge, scores in judged.items()
        },
        "between_voters": over_prompts(alike),
        "voters": {
            voter: {
                "num_votes": int(voted[place].sum()),
                "num_ties": int((votes.tuned[place] == 0).sum()),
                "win_rate": over_prompts(0.5 + 0.5 * votes.tuned[[place]]),
                "left": over_prompts(left[[place]]),
                "agreement": over_prompts(alike[[place]]),
            }
            for place, voter in enumerate(votes.voters)
        },
    }


def _share_of_equal_votes(decided: Scores) -> Scores:
    """For each vote of -1 or 1 in ``[voter, prompt, image]``, the share of the other voters' votes that equal it."""
    votes_for = {sign: (decided == sign).sum(axis=0) for sign in (-1, 1)}
    others = votes_for[-1] + votes_for[1] - 1
    equal = np.where(decided == 1, votes_for[1], votes_for[-1]) - 1
    return np.divide(equal, others, out=np.full(decided.shape, np.nan), where=np.isfinite(decided) & (others > 0))


def people_of(run: RunFolder, votes_dir: Path) -> dict[str, Any] | None:
    """`measure_people` of a run's held-out images; `None`: nobody has rated them.

    Args:
        votes_dir: folder of the votes.

    Raises:
        StoreError: a file of votes, or of the evaluation, is missing or damaged.
    """
    if not voted_files(votes_dir, HELDOUT):
        return None
    images = rated_images(run, HELDOUT)
    by_voter, num_other = read_all_votes(votes_dir, images)
    if not by_voter:
        return None
    path, judges = run.step(EVALUATION) / "comparison.parquet", [*read_metrics(run.path)["judges"]]
    check_comparison(path, judges)
    scores = [f"{arm}_{score_column(judge)}" for judge in judges for arm in ARMS]
    grid = _Grid(read_table(path, ["prompt_index", "sample_index", *scores]))
    votes = grid.votes(by_voter, num_other)
    base, tuned = ({judge: grid.values(f"{arm}_{score_column(judge)}") for judge in judges} for arm in ARMS)
    return measure_people(votes, {judge: tuned[judge] - base[judge] for judge in judges}, seed=images.seed)


class _Grid:
    """Rows of `comparison.parquet` as ``[prompt, image]``; NaN where there is no row."""

    def __init__(self, rows: pa.Table) -> None:
        self._rows = rows
        prompts, self._prompt = np.unique(rows["prompt_index"].to_numpy(), return_inverse=True)
        samples, self._sample = np.unique(rows["sample_index"].to_numpy(), return_inverse=True)
        self._shape = len(prompts), len(samples)
        self._prompts, self._samples = (
            {int(index): place for place, index in enumerate(each)} for each in (prompts, samples)
        )

    def values(self, column: str) -> Scores:
        values = np.full(self._shape, np.nan)
        values[self._prompt, self._sample] = np.array(self._rows[column].to_pylist(), dtype=float)
        return values

    def votes(self, by_voter: Mapping[str, Sequence[Vote]], num_other: int) -> Votes:
        tuned, left = np.full((2, len(by_voter), *self._shape), np.nan)
        for voter, votes in enumerate(by_voter.values()):
            for vote in votes:
                arm, _, sample = vote["left"].partition("-")
                place = voter, self._prompts[vote["prompt_index"]], self._samples[int(sample)]
                left[place] = CHOSEN_LEFT[vote["choice"]]
                tuned[place] = left[place] if arm == "tuned" else -left[place]
        return Votes([*by_voter], tuned, left, num_other)


def lines_of(people: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal."""
    shown = votes_as_text(people)
    agreement = ", ".join(f"{judge} {share}" for judge, share in shown["agreement"].items())
    by = f"{len(people['voters']):,} voters" if len(people["voters"]) > 1 else next(iter(people["voters"]))
    lines = [
        f"{PEOPLE}: {people['num_votes']:,} votes ({people['num_ties']:,} ties) on {people['num_prompts']:,} prompts by"
        f" {by}: win rate of the fine-tuned model {shown['win_rate']}",
        f"agreement with people, chance is 50 %: {agreement}",
        f"left image preferred: {shown['left']}; far from 50 %, voters favour a side",
    ]
    if len(people["voters"]) > 1:
        lines.append(f"agreement between voters: {shown['between_voters']}")
        lines += [
            f"  {voter}: {found['num_votes']:,} votes, win rate {found['win_rate']}, left {found['left']},"
            f" agreement with other voters {found['agreement']}"
            for voter, found in shown["voters"].items()
        ]
    lines += [f"no interval: {reason}" for reason in reasons_without_interval(people)]
    if people["num_other"]:
        lines.append(f"votes on images that the run does not have any more, not counted: {people['num_other']:,}")
    return lines
