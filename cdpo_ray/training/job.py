"""Input of a training worker: config section, paths and values derived at run time; importable without torch."""

from dataclasses import dataclass
from typing import Any

from cdpo_ray.config.training import LoraSection, TrainingSection
from cdpo_ray.curriculum.combination import RankingRule
from cdpo_ray.curriculum.schedule import Schedule


@dataclass(frozen=True)
class OnlineJob:
    """Curriculum whose difficulty is the policy's margin, measured again at the start of each stage.

    Attributes:
        scores_dir: path of `2-scores`.
        rule: selects and combines the scores that rank the samples.
        num_draws: number of (times, noise) draws that a margin is averaged over.
    """

    scores_dir: str
    rule: RankingRule
    schedule: Schedule
    pairs_per_stage: int
    num_draws: int


@dataclass(frozen=True)
class ValidationJob:
    """Validation prompts to sample from the policy at the end of a stage, and the judges of these images.

    Attributes:
        samples_dir: path of the base model's samples of the same prompts, in the layout of `1-samples`.
        sampling: keyword arguments of `Sampling` used for ``samples_dir``; the policy samples from the same noise.
        judges: keyword arguments of each judge's class, by name.
        early_prompts: number of prompts measured before the last stage; ``None``: all.
        only_last: whether only the last stage is measured.
        num_margin_draws: number of (times, noise) draws for the implicit values; 0: not measured.
    """

    samples_dir: str
    sampling: dict[str, Any]
    judges: dict[str, dict[str, Any]]
    early_prompts: int | None
    only_last: bool
    num_margin_draws: int


@dataclass(frozen=True)
class PreviewJob:
    """Held-out prompts to sample from the base model, and from the policy at the end of each stage.

    Attributes:
        prompts: at least one.
        sampling: keyword arguments of `Sampling`, with one image per prompt.
    """

    prompts: list[str]
    sampling: dict[str, Any]


@dataclass(frozen=True)
class TrainingJob:
    """Input of every training worker.

    Attributes:
        training: config section.
        samples_dir: path of `1-samples`.
        stages_dir: path of `3-stages`.
        output_dir: path of `4-training`.
        num_stages: number of stages.
        family: model family.
        model: keyword arguments of the family's ``load``.
        seed: seed of the LoRA's initial values and of all draws; each round has its own.
        start_dir: path of the previous round's `4-training`, to continue from; ``None``: the base model.
        online: ``None``: train on the pairs in ``stages_dir``.
        validation: ``None``: the policy is not measured during training.
        previews: ``None``: no images are sampled during training.
        plain_peak_bytes: estimated peak memory of a worker without gradient checkpointing; ``None``: unknown.
        gpu_share: fraction of one GPU per worker, 0 to 1.
    """

    training: TrainingSection
    samples_dir: str
    stages_dir: str
    output_dir: str
    num_stages: int
    family: str
    model: dict[str, Any]
    seed: int
    start_dir: str | None = None
    online: OnlineJob | None = None
    validation: ValidationJob | None = None
    previews: PreviewJob | None = None
    plain_peak_bytes: float | None = None
    gpu_share: float = 1.0

    @property
    def lora(self) -> LoraSection | None:
        """LoRA to train; ``None``: full fine-tuning."""
        return self.training.lora if self.training.method == "lora" else None
