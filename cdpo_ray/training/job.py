"""What a training worker is told: plain values that travel to it, importable without torch."""

from dataclasses import dataclass
from typing import Any, Literal

from cdpo_ray.curriculum.combination import RankingRule
from cdpo_ray.curriculum.schedule import Schedule
from cdpo_ray.policy.job import LoraJob


@dataclass(frozen=True)
class LossJob:
    """The loss; see `training.losses.preference_loss`."""

    loss: str
    beta: float
    label_smoothing: float = 0.0
    sft_weight: float = 0.0


@dataclass(frozen=True)
class Optimization:
    """AdamW and how a global batch is spread; see `TrainingSection` of the config for the bounds."""

    learning_rate: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    max_grad_norm: float
    global_batch_size: int
    pairs_per_launch: int
    zero_stage: int
    optimizer: str = "adamw"


@dataclass(frozen=True)
class OnlineJob:
    """A curriculum whose difficulty is the policy's margin: measured, and drawn anew, at each stage's start.

    Attributes:
        rule: which scores of ``scores_dir`` rank the samples, and how.
        num_draws: times and noises a prompt that a margin is averaged over.
    """

    scores_dir: str
    rule: RankingRule
    schedule: Schedule
    pairs_per_stage: int
    num_draws: int


@dataclass(frozen=True)
class CommitJob:
    """Where and how often training is committed; see `TrainingSection` of the config for the bounds."""

    commits_dir: str
    updates_per_commit: int
    keep_last: int
    keep_best: bool


@dataclass(frozen=True)
class ValidationJob:
    """Prompts that a policy makes images of at a stage's end, and the judges of these.

    Attributes:
        samples_dir: what the base model made of the prompts, as `1-samples`.
        sampling: keyword arguments of `Sampling`, as that was made; the policy's images come from the same noise.
        judges: name -> keyword arguments of its class.
        early_prompts: how many are asked before the last stage; none: all.
        only_last: measure nothing before the last stage.
        num_margin_draws: of times and noise, for the implicit values; 0 leaves them out.
    """

    samples_dir: str
    sampling: dict[str, Any]
    judges: dict[str, dict[str, Any]]
    early_prompts: int | None
    only_last: bool
    num_margin_draws: int


@dataclass(frozen=True)
class TrainingJob:
    """What each worker needs to know; plain values that travel to it.

    Attributes:
        lora: none trains the whole net.
        guidance_range: that the net is told of, for families with a guidance embedding; none is the family's own.
        start_dir: `4-training` of the round before, to go on from.
        reference_is_start: hold the policy to that round, in place of the base model.
        online: none trains on the pairs of ``stages_dir`` as they are.
        output_dir: where what was trained is written.
        validation: how the policy is measured at each stage's end; none: it is not.
        plain_peak_bytes: estimated peak of a worker without gradient checkpointing; ``None``: not known.
        gpu_share: share of one GPU that a worker has, 0 to 1.
    """

    samples_dir: str
    stages_dir: str
    num_stages: int
    family: str
    model: dict[str, Any]
    lora: LoraJob | None
    loss: LossJob
    empty_prompt_fraction: float
    gradient_checkpointing: bool | Literal["auto"]
    optimization: Optimization
    seed: int
    output_dir: str
    commits: CommitJob
    max_skipped_updates: int
    collective_timeout_seconds: int
    guidance_range: tuple[float, float] | None = None
    start_dir: str | None = None
    reference_is_start: bool = False
    online: OnlineJob | None = None
    validation: ValidationJob | None = None
    plain_peak_bytes: float | None = None
    gpu_share: float = 1.0
