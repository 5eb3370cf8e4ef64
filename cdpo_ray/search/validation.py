"""Policy at a stage's end -> how its images of validation prompts compare with the base model's."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdpo_ray.evaluation.metrics import preference_accuracy
from cdpo_ray.evaluation.statistics import Scores, compare, pairwise_rms_distance
from cdpo_ray.generation.generator import MakeScores, Sampling, sample_batches
from cdpo_ray.models.family import rows_of
from cdpo_ray.records import score_column
from cdpo_ray.store import place, read_shards
from cdpo_ray.training.batches import SampleBank
from cdpo_ray.training.margins import sample_values
from cdpo_ray.training.stage_end import StageEnd


@dataclass(frozen=True)
class BaseSamples:
    """What the base model made of the prompts, in their order.

    Attributes:
        scores: ``[prompt, image]`` by judge.
    """

    prompts: list[str]
    bank: SampleBank
    scores: dict[str, Scores]


class Validation:
    """Measures a policy; plain values that travel to the training workers, and what each of them has made of these.

    Args:
        samples_dir: the base model's samples of the prompts, as `1-samples`, with the scores of all judges.
        sampling: that they were made with; the policy's images come from the same noise.
        make_scores: builds the judges.
        judge: whose scores are `reward` and `win_rate`.
        early_prompts: how many are asked before the last stage; none: all.
        only_last: measure nothing before the last stage.
        num_margin_draws: of times and noise, for the implicit accuracy; 0 leaves it out.
        num_resamples: of the bootstrap over prompts.
    """

    def __init__(
        self,
        samples_dir: str,
        sampling: Sampling,
        make_scores: MakeScores,
        judges: Sequence[str],
        judge: str,
        *,
        early_prompts: int | None,
        only_last: bool,
        num_margin_draws: int,
        num_resamples: int,
    ) -> None:
        self.samples_dir = samples_dir
        self.sampling = sampling
        self.make_scores = make_scores
        self.judges = judges
        self.judge = judge
        self.early_prompts = early_prompts
        self.only_last = only_last
        self.num_margin_draws = num_margin_draws
        self.num_resamples = num_resamples

    @functools.cached_property
    def base(self) -> BaseSamples:
        samples_dir = place(self.samples_dir)
        table = read_shards(samples_dir, ["prompt", *map(score_column, self.judges)])
        scores = {judge: np.array(table[score_column(judge)].to_pylist(), dtype=float) for judge in self.judges}
        return BaseSamples(table["prompt"].to_pylist(), SampleBank.read(samples_dir), scores)

    @functools.cached_property
    def scorer(self) -> Any:
        return self.make_scores()

    def __call__(self, end: StageEnd) -> dict[str, Any]:
        """All workers share the prompts; each of them gets what all found.

        Returns:
            ``num_prompts``, and to be maximised: ``reward`` (mean difference to the base model, in the unit of the
            judge), ``win_rate`` against it, ``diversity`` (`pairwise_rms_distance`, mean over prompts) and
            ``implicit_accuracy`` (share of pairs of the base's images that the implicit reward orders as the judge
            does; none if it was left out, or the judge finds all alike). ``judges``: a `Comparison` each;
            ``by_prompt``: each one's difference to the base model, none where no image has a score.
            Nothing at a stage that is not measured.
        """
        if self.only_last and not end.is_last:
            return {}
        num_asked = len(self.base.prompts) if end.is_last else self.early_prompts or len(self.base.prompts)
        num_prompts = min(num_asked, len(self.base.prompts))
        end.model.denoiser.eval()
        scores, diversity = self._sampled(end, num_prompts)
        end.model.denoiser.train()
        base = {judge: values[:num_prompts] for judge, values in self.base.scores.items()}
        bootstrap = {"num_resamples": self.num_resamples, "seed": self.sampling.seed}
        compared = {judge: compare(base[judge], scores[judge], **bootstrap) for judge in self.judges}
        found = {
            "num_prompts": num_prompts,
            "reward": compared[self.judge].difference.mean,
            "win_rate": compared[self.judge].win_rate.mean,
            "diversity": float(diversity.mean()),
            "implicit_accuracy": None,
            "judges": {judge: comparison.to_dict() for judge, comparison in compared.items()},
            "by_prompt": {judge: _finite_means(scores[judge] - base[judge]) for judge in self.judges},
        }
        if self.num_margin_draws:
            accuracy = preference_accuracy(self._implicit_values(end, num_prompts), base[self.judge], **bootstrap)
            found["implicit_accuracy"] = accuracy and accuracy["mean"]
        return found

    def _sampled(self, end: StageEnd, num_prompts: int) -> tuple[dict[str, Scores], Scores]:
        """``[prompt, image]`` scores by judge, and ``[prompt]`` diversity, of the policy's images."""
        num_images = self.sampling.images_per_prompt
        # Past the last prompt a worker samples that one again, for nothing: under ZeRO 3 all must launch alike.
        rows = [min(first + end.worker_rank, num_prompts - 1) for first in range(0, num_prompts, end.num_workers)]
        conditioning = {
            name: value.to(end.model.device, end.model.dtype)
            for name, value in rows_of(self.base.bank.conditioning, rows).items()
        }
        prompts = [self.base.prompts[row] for row in rows]
        batches = list(sample_batches(end.model, prompts, conditioning, self.sampling, self.scorer))
        images = torch.cat([batch.images for batch in batches]).unflatten(0, (len(rows), num_images)).cpu().numpy()
        columns = [np.concatenate([batch.scores[judge] for batch in batches]) for judge in self.judges]
        mine = torch.from_numpy(np.stack(columns, axis=-1)).reshape(len(rows), num_images, -1)
        apart = torch.tensor([pairwise_rms_distance(few) for few in images], dtype=torch.float64)
        shared = torch.zeros(num_prompts, num_images + 1, len(self.judges), dtype=torch.float64)
        own = range(end.worker_rank, num_prompts, end.num_workers)
        shared[own, :num_images] = mine[: len(own)]
        shared[own, num_images] = apart[: len(own), None]
        gathered = _summed(shared, end).numpy()
        scores = {judge: gathered[:, :num_images, column] for column, judge in enumerate(self.judges)}
        return scores, gathered[:, num_images, 0]

    def _implicit_values(self, end: StageEnd, num_prompts: int) -> Scores:
        bank = self.base.bank
        few = SampleBank(
            bank.latents[:num_prompts],
            rows_of(bank.conditioning, slice(num_prompts)),
            bank.row_of_prompt[:num_prompts],
        )
        return sample_values(
            end.model,
            end.policy,
            end.reference,
            end.model.denoiser,
            few,
            beta=1.0,  # changes no order
            num_draws=self.num_margin_draws,
            samples_per_launch=self.sampling.images_per_batch,
            seed=self.sampling.seed,
            stage=0,  # the same draws at each stage
            worker_rank=end.worker_rank,
            num_workers=end.num_workers,
        )


def _summed(values: Tensor, end: StageEnd) -> Tensor:
    """Over all workers."""
    if end.num_workers == 1:
        return values
    on_device = values.to(end.model.device)
    torch.distributed.all_reduce(on_device)
    return on_device.cpu()


def _finite_means(values: Scores) -> list[float | None]:
    """Of each row, over what is finite."""
    return [float(row[np.isfinite(row)].mean()) if np.isfinite(row).any() else None for row in values]
