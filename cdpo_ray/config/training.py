"""Training of a LoRA or of the whole net."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cdpo_ray.config.section import Section


class LoraSection(Section):
    """The LoRA; it may begin with a smaller rank, or in a part of the net's blocks, and grow stage by stage.

    It grows in the first round alone: later ones begin with what was trained.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    initial_rank: Annotated[int, Field(ge=1)] | None = None
    unfreeze: Literal["at_once", "from_input", "from_output"] = "at_once"
    alpha: Annotated[float, Field(gt=0)] | None = None
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("to_q", "to_k", "to_v", "to_out.0")

    @model_validator(mode="after")
    def _grows(self) -> "LoraSection":
        if self.initial_rank is not None and self.initial_rank > self.rank:
            raise ValueError(
                f"`initial_rank` must be at most `rank` = {self.rank}, which it grows to, got {self.initial_rank}"
            )
        return self

    @property
    def growth(self) -> dict[str, Any]:
        """Keyword arguments of `cdpo_ray.curriculum.capacity.stage_capacities`."""
        return {"initial_rank": self.initial_rank, "sequential": self.unfreeze != "at_once"}

    @property
    def grows(self) -> bool:
        return self.initial_rank not in (None, self.rank) or self.unfreeze != "at_once"


HOW_NOT_WHAT = {
    "batch_size_per_worker",
    "gradient_checkpointing",
    "num_workers",
    "zero_stage",
    "updates_per_commit",
    "keep_last",
    "keep_best",
    "max_skipped_updates",
    "max_restarts",
    "collective_timeout_seconds",
}
"""Keys of `TrainingSection` that may change between runs of one training: its outcome is the same but for rounding."""


class TrainingSection(Section):
    """Staged preference training of a LoRA, or of the whole net (`method` full).

    Pairs, the LoRA's first values and training draw from `seed`, or from `run.seed` where there is none: another one
    trains anew on the same images.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    method: Literal["lora", "full"] = "lora"
    loss: Literal["dpo", "ipo", "hinge", "robust", "sft"] = "dpo"
    beta: Annotated[float, Field(gt=0)]
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    reference: Literal["base", "last_round"] = "base"
    guidance_range: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None = None
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit`: block-wise 8-bit moments, a quarter of the memory."""
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    global_batch_size: Annotated[int, Field(ge=1)]
    batch_size_per_worker: Annotated[int, Field(ge=1)] | None = None
    empty_prompt_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gradient_checkpointing: bool | Literal["auto"] = False
    """`auto`: on if the estimated peak memory without it exceeds the GPU's memory."""
    lora: LoraSection = LoraSection()
    num_workers: Annotated[int, Field(ge=1)] = 1
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    updates_per_commit: Annotated[int, Field(ge=1)] = 50
    keep_last: Annotated[int, Field(ge=1)] = 2
    keep_best: bool = False
    max_skipped_updates: Annotated[int, Field(ge=1)] = 20
    max_restarts: Annotated[int, Field(ge=0)] = 3
    collective_timeout_seconds: Annotated[int, Field(ge=1)] = 600

    @model_validator(mode="after")
    def _batch_divides(self) -> "TrainingSection":
        at_once = self.num_workers * (self.batch_size_per_worker or 1)
        if self.global_batch_size % at_once:
            raise ValueError(
                f"`global_batch_size` must be a multiple of `num_workers` x `batch_size_per_worker` = {at_once},"
                f" got {self.global_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _loss_has_its_options(self) -> "TrainingSection":
        if self.label_smoothing and self.loss != "robust":
            raise ValueError(f"`label_smoothing` belongs to `loss` 'robust', got it with {self.loss!r}")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("`loss` 'robust' needs `label_smoothing`, the share of labels thought wrong, above 0")
        if self.sft_weight and self.loss == "sft":
            raise ValueError("`sft_weight` mixes the chosen's error into another `loss`; 'sft' is that error alone")
        if self.method == "full" and "lora" in self.model_fields_set:
            raise ValueError("`lora` must not be given with `method` 'full', which trains the whole net")
        if self.optimizer == "adamw_8bit" and self.zero_stage:
            raise ValueError(
                f"`optimizer` 'adamw_8bit' needs `zero_stage` 0, because its 8-bit moments cannot be sharded, got"
                f" {self.zero_stage}; leave out one of them"
            )
        if self.guidance_range and self.guidance_range[0] > self.guidance_range[1]:
            raise ValueError(f"`guidance_range` must be [low, high], got {list(self.guidance_range)}")
        return self

    @property
    def outcome(self) -> dict[str, Any]:
        """What decides what is trained, as plain values."""
        return self.model_dump(mode="json", exclude=HOW_NOT_WHAT)

    @property
    def pairs_per_launch(self) -> int:
        """Pairs that one worker sends through the net at once."""
        return self.batch_size_per_worker or self.global_batch_size // self.num_workers
