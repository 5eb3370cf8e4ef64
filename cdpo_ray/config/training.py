"""Training of a LoRA, or of all weights of the denoiser."""

import os
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cdpo_ray.config.losses import DpoLoss, Loss
from cdpo_ray.config.section import LocalPath, Section, looked_for


class LoraSection(Section):
    """The LoRA of `method: lora`. Its rank and its layers can grow from stage to stage (arXiv:2602.13055), but only in
    the first round; later rounds start from the full LoRA."""

    rank: Annotated[int, Field(ge=1)] = 8
    """Rank of the LoRA. The default is the published value for Stable Diffusion; LCM is published with 64."""

    initial_rank: Annotated[int, Field(ge=1)] | None = None
    """Rank in the first stage; it grows linearly to `rank` in the last. Published for Stable Diffusion: 6 to 16.
    `null`: constant `rank`, as in the original paper. In the embedded world, growing the rank gained nothing."""

    unfreeze: Literal["at_once", "from_input", "from_output"] = "at_once"
    """Blocks whose LoRA is trained. `at_once`: all blocks, in every stage. `from_input`, `from_output`: an equal share
    of further blocks in each stage, starting at that end of the denoiser."""

    alpha: Annotated[float, Field(gt=0)] | None = None
    """The LoRA's output is scaled by `alpha / rank`. `null`: `rank`, so that the scale is 1, as published."""

    use_rslora: bool = False
    """Scale the LoRA's output by `alpha / sqrt(rank)` (rsLoRA, arXiv:2312.03732), which keeps the size of updates when
    the rank changes. Suited to large ranks. Needs `alpha`."""

    use_dora: bool = False
    """Also learn the norm of each row of the adapted weights (DoRA, arXiv:2402.09353), which takes more time and memory
    per update. `weight_decay` also shrinks these norms. Not supported with `model.quantization`, `zero_stage: 3` and
    `cdpo export --format kohya`."""

    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names, or ends of names, of the linear and convolution layers that get a LoRA. The default is all attention
    layers, as published for Stable Diffusion; `configs/lcm.yaml` and `configs/flux.yaml` have those of other
    families."""

    @model_validator(mode="after")
    def _initial_rank_is_smaller(self) -> "LoraSection":
        if self.initial_rank is not None and self.initial_rank > self.rank:
            raise ValueError(
                f"`initial_rank` must be at most `rank` = {self.rank}, which it grows to, got {self.initial_rank}"
            )
        return self

    @model_validator(mode="after")
    def _scale_is_known(self) -> "LoraSection":
        if self.use_rslora and self.alpha is None:
            raise ValueError("`use_rslora` needs `alpha`: the scale is alpha / sqrt(rank); 8 at rank 64 gives 1")
        return self

    @property
    def layers(self) -> dict[str, Any]:
        """Keyword arguments of `cdpo_ray.models.lora.attach_lora`."""
        keys = {"rank", "targets", "use_rslora", "use_dora"}
        return self.model_dump(include=keys) | {"alpha": self.alpha or float(self.rank)}

    @property
    def growth(self) -> dict[str, Any]:
        """Keyword arguments of `cdpo_ray.curriculum.capacity.stage_capacities`."""
        return {"initial_rank": self.initial_rank, "sequential": self.unfreeze != "at_once"}

    @property
    def grows(self) -> bool:
        """Whether rank or layers grow from stage to stage."""
        return self.initial_rank not in (None, self.rank) or self.unfreeze != "at_once"


class TimestepRange(Section):
    """Smallest and largest timestep that training draws."""

    low: Annotated[int, Field(ge=0, le=1000)] = 0
    """Smallest timestep."""

    high: Annotated[int, Field(ge=0, le=1000)] = 1000
    """Largest timestep; 1000, or 999 for diffusion models, is pure noise."""

    @model_validator(mode="after")
    def _is_a_range(self) -> "TimestepRange":
        if self.low >= self.high:
            raise ValueError(f"`low` must be less than `high`, got {self.low} and {self.high}")
        return self


TimestepList = Annotated[tuple[Annotated[int, Field(ge=0, le=999)], ...], Field(min_length=1)]


class ScheduleSection(Section):
    """Schedule of the learning rate over the updates of a run, or of each round."""

    warmup_updates: Annotated[int, Field(ge=0)] = 10
    """Number of updates over which the learning rate rises linearly to `learning_rate`. Without a warm-up, AdamW's
    first updates have full size, whatever the gradient. The default is the number of gradients that its first moment
    averages over. Published: 500 for Stable Diffusion and 200 for SDXL, of a few thousand updates. 0: no warm-up, as in
    the released code."""

    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up. `constant`: the published choice. `cosine`: falls to 0 at the end of the run.
    Try it if the last updates undo gains. A longer run is then not a continuation of a shorter one."""


class HealthSection(Section):
    """Alarm when the policy predicts the chosen images much worse than the reference does. After that, images degrade
    while the margin still grows, because the error on rejected images rises even more."""

    max_error_rise: Annotated[float, Field(gt=0)] | None = 0.5
    """Alarm when the policy's error on chosen images exceeds the reference's by more than this share. In the embedded
    world (`docs/log.md`), a run with the paper's curriculum raises it by 0.2, and the schedule that lost all gain by
    0.65. The report shows the highest rise of a run. Lower the bound if images degrade without an alarm. `null`: no
    alarm."""

    window: Annotated[int, Field(ge=1)] = 50
    """Number of updates whose mean is compared with the bound, once every `window` updates and at the end. Errors of
    single updates are dominated by their timesteps."""

    on_alarm: Literal["warn", "stop"] = "warn"
    """`warn`: a warning in the log, in `cdpo status` and in the report. `stop`: training also ends, and its result is
    the LoRA of the last comparison without an alarm. Needs `method: lora` and `zero_stage` 0 to 2."""

    @model_validator(mode="after")
    def _an_alarm_has_a_bound(self) -> "HealthSection":
        if self.on_alarm == "stop" and self.max_error_rise is None:
            raise ValueError("`on_alarm` 'stop' needs `max_error_rise`, the bound of the alarm; give one of both")
        return self

    @property
    def stops(self) -> bool:
        """Whether an alarm ends training."""
        return self.on_alarm == "stop"

    def check_before(self, update: int) -> int:
        """Last update before this one at which errors were compared; 0: none."""
        return (update - 1) // self.window * self.window


class TrainingSection(Section):
    """Preference training of a LoRA, or of all weights of the denoiser, stage by stage."""

    HOW_NOT_WHAT: ClassVar[frozenset[str]] = frozenset(
        {
            "batch_size_per_worker",
            "gradient_checkpointing",
            "num_workers",
            "zero_stage",
            "updates_per_commit",
            "keep_last",
            "keep_best",
            "preview_prompts",
            "max_skipped_updates",
            "max_restarts",
            "collective_timeout_seconds",
        }
    )  # these may change when training resumes: its outcome changes by rounding errors at most

    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of drawn pairs, of the LoRA's initial values, and of training noise; `null`: `run.seed`. Another seed
    repeats the training on the same images."""

    method: Literal["lora", "full"] = "lora"
    """Weights to train. `lora`: a LoRA; the reference is the same model with the LoRA off. `full`: all weights of the
    denoiser, with a frozen copy as reference, which needs far more memory (see `zero_stage`)."""

    loss: Loss = DpoLoss()
    """Loss as a function of a pair's margin m: a name, or a mapping with `name` and the loss's options, such as `{name:
    robust, label_smoothing: 0.2}`."""

    beta: Annotated[float, Field(gt=0)]
    """Strength of the KL penalty towards the reference: large values keep the model close to it. The margin is -beta/2
    times a difference of errors that are averaged over latent values, so a value does not carry over to another latent
    size. Published values: 2000 to 5000 for Stable Diffusion, 100 to 2000 for flow matching, 400 for LCM; the embedded
    world needs 200. `cdpo check` prints it in other conventions."""

    adaptive_beta: Annotated[float, Field(gt=0)] | None = None
    """Strength a of the adaptation of `beta` to each pair (arXiv:2407.08639; published: 0.6). `beta` is multiplied by 1
    + a (m - m0), at least 0, where m is the pair's margin and m0 the running mean of margins. Pairs that the policy
    orders against their label get less weight. Try it with noisy labels. `null`: constant `beta`."""

    safeguard: Annotated[float, Field(ge=0, le=1)] | None = None
    """Scales down the gradient of a rejected image so that, to first order in the model's output, this share of the
    descent of the error on its chosen image remains (arXiv:2511.03317; published: 0.6 to 0.9). Try 0.5 if the error on
    chosen images rises. Values near 0 rarely have an effect; values near 1 train on the chosen images alone. In the
    embedded world (`docs/log.md`), 0.5 cut the rise to a quarter, and 0.9 also lost the gain. `null`: off."""

    reference: Literal["base", "start", "last_round"] = "base"
    """Frozen reference that the policy is compared with. `base`: the base model. `start`: the LoRA of `start_from`, in
    every round. `last_round`: the model that the round started from (needs `rounds` > 1)."""

    start_from: LocalPath | None = None
    """LoRA to start training from: a safetensors file in the format of diffusers or kohya (sd-scripts), or a folder
    with one. `training.lora` must have the same rank and layers; the scale may differ. All nodes must be able to read
    it. The images of the first round are still those of the base model. `null`: start from the base model."""

    guidance_range: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None = None
    """Bounds [low, high] of the guidance for training a guidance-conditioned family (`latent_consistency`, `flux`);
    drawn uniformly per pair. For LCM, this is w = `guidance_scale` - 1. `null`: `generation.guidance_scale`, with which
    the images are sampled. LCM is published with [5, 15]."""

    timesteps: Literal["all", "sampler"] | TimestepRange | TimestepList | None = None
    """Timesteps that training draws. `all`: the distribution that the model was trained with. `sampler`: those of the
    sampler with `generation.num_denoising_steps`, for few-step models; not for flow matching. `{low: 500, high: 999}`:
    the part of `all` in this range. A list, such as [249, 499, 749, 999] for Turbo models: these timesteps, uniformly.
    `null`: `sampler` for a consistency model with `consistency_target: image`, else `all`."""

    consistency_target: Literal["image", "teacher"] = "image"
    """Target of a consistency model's output; only for `latent_consistency`. `image`: the image itself. `teacher`: the
    published target, which is the reference's output one teacher step later. It needs `model.teacher`, takes twice the
    number of forward passes, and gained nothing in the embedded world."""

    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """Storage of AdamW's moments. `adamw_8bit`: 8 bits per value with one scale per block, which takes a quarter of the
    memory; needs bitsandbytes and `zero_stage: 0`. It saves little for a LoRA, and much for `method: full`."""

    learning_rate: Annotated[float, Field(gt=0)]
    """AdamW's learning rate after the warm-up of `schedule`. The configurations of published models use 1e-4, like the
    released code; the embedded world uses 5e-4. Lower it if updates are skipped because they are not finite, or if
    `health` warns."""

    schedule: ScheduleSection = ScheduleSection()

    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """AdamW's weight decay; the published value."""

    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of AdamW's first moment; PyTorch's default."""

    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay rate of AdamW's second moment; PyTorch's default."""

    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm; the published value."""

    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the LoRA, which is then the result of training. The first 1 / (1 -
    decay) updates are averaged equally. Try 0.95 to 0.99 if results vary from checkpoint to checkpoint. Needs `method:
    lora` and `zero_stage` 0 to 2. `null`: the last LoRA is the result."""

    health: HealthSection = HealthSection()

    global_batch_size: Annotated[int, Field(ge=1)]
    """Number of pairs per update, over all workers; a multiple of `num_workers` x `batch_size_per_worker`. The
    configurations of published models use 32."""

    batch_size_per_worker: Annotated[int, Field(ge=1)] | None = None
    """Number of pairs per forward pass of a worker; gradients are accumulated over several passes. `null`: a worker's
    whole share of an update. Lower it if memory does not suffice."""

    empty_prompt_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of pairs that are trained with an empty prompt, which keeps classifier-free guidance working. The released
    code uses 0.25 for Stable Diffusion. 0 suits models that are sampled without guidance, such as LCM and FLUX."""

    gradient_checkpointing: bool | Literal["auto"] = False
    """Recompute activations in the backward pass to save memory (SD 1.5: 0.14 instead of 0.97 GiB per sample). Training
    is then an estimated quarter slower. `auto`: enabled if the estimated peak memory without it exceeds the GPU's
    memory, or is unknown."""

    lora: LoraSection = LoraSection()

    num_workers: Annotated[int, Field(ge=1)] = 1
    """Number of training workers, each with its own GPU. It may change when training resumes."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage: shard nothing (0), the optimizer state (1), also gradients (2), or also weights (3). A
    LoRA's state is so small that it needs no sharding; use 1 to 3 for `method: full` on several workers. It may change
    when training resumes."""

    updates_per_commit: Annotated[int, Field(ge=1)] = 50
    """Number of updates between checkpoints; one is also written at the end of each stage. At most this many updates
    are lost when a process is killed. Lower it if updates are slow or machines are often preempted."""

    keep_last: Annotated[int, Field(ge=1)] = 2
    """Number of checkpoints to keep. With 2, training can resume from the previous checkpoint if the last one is
    damaged."""

    keep_best: bool = False
    """Also keep the adapter of the checkpoint with the lowest mean loss in the last stage, in `4-training/best`."""

    preview_prompts: Annotated[int, Field(ge=0, le=100)] = 4
    """Number of held-out prompts for which one image is sampled by the base model and at the end of each stage, always
    from the same noise. The images are in `4-training/previews`, the report, `cdpo watch` and the trackers. They do not
    affect the trained weights. 0: none. Trials of a search sample none."""

    max_skipped_updates: Annotated[int, Field(ge=1)] = 20
    """Training fails if this many consecutive updates, or all updates of a stage, are skipped because the loss or the
    gradient is not finite."""

    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Maximum number of times that training restarts from the last checkpoint after a failure; in a search, the limit
    applies to each trial. Raise it on preemptible machines."""

    collective_timeout_seconds: Annotated[int, Field(ge=1)] = 600
    """Time after which a worker that does not respond is replaced; until then, the others wait for it. A warning names
    the worker after half of this time. Raise it if slow machines time out."""

    @model_validator(mode="after")
    def _batch_is_divisible(self) -> "TrainingSection":
        at_once = self.num_workers * (self.batch_size_per_worker or 1)
        if self.global_batch_size % at_once:
            raise ValueError(
                f"`global_batch_size` must be a multiple of `num_workers` x `batch_size_per_worker` = {at_once},"
                f" got {self.global_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> "TrainingSection":
        if self.method == "full" and self.lora != type(self.lora)():  # `config.yaml` of a run holds the defaults
            raise ValueError("`lora` must not be given with `method` 'full', which trains all weights")
        if self.optimizer == "adamw_8bit" and self.zero_stage:
            raise ValueError(
                f"`optimizer` 'adamw_8bit' needs `zero_stage` 0, because its 8-bit moments cannot be sharded, got"
                f" {self.zero_stage}; leave out one of them"
            )
        if self.reference == "start" and not self.start_from:
            raise ValueError("`reference` 'start' needs `start_from`, a LoRA")
        if self.start_from and (self.method == "full" or self.lora.grows):
            raise ValueError(
                "`start_from` is a whole LoRA, so it must not be given with `method` 'full', `lora.initial_rank` or"
                " `lora.unfreeze`"
            )
        if self.start_from and not os.path.exists(self.start_from):
            raise ValueError(f"`start_from` must be an existing file or folder: no {looked_for(self.start_from)}")
        if self.method == "lora" and self.lora.use_dora and self.zero_stage == 3:
            raise ValueError(
                "`lora.use_dora` needs `zero_stage` 0 to 2, because it reads whole weights between layers, got 3"
            )
        if self.guidance_range and self.guidance_range[0] > self.guidance_range[1]:
            raise ValueError(f"`guidance_range` must be [low, high], got {list(self.guidance_range)}")
        return self

    @model_validator(mode="after")
    def _stability_fits_the_rest(self) -> "TrainingSection":
        faults: list[str] = []
        given: dict[str, Any]
        if self.loss.name == "sft":
            given = {"adaptive_beta": self.adaptive_beta, "safeguard": self.safeguard}
            faults += [
                f"`{key}` must not be given with `loss` 'sft', which has no rejected images"
                for key, value in given.items()
                if value is not None
            ]
        if self.method == "full" or self.zero_stage == 3:
            given = {"ema_decay": self.ema_decay, "health.on_alarm": "stop" if self.health.stops else None}
            faults += [
                f"`{key}` {value} keeps a copy of the LoRA, which needs `method` 'lora' and `zero_stage` 0 to 2, got"
                f" {self.method!r} and {self.zero_stage}; leave it out"
                for key, value in given.items()
                if value is not None
            ]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def outcome(self) -> dict[str, Any]:
        """The keys that decide the outcome of training; an alarm that only warns does not."""
        found = super().outcome
        if not self.health.stops:
            del found["health"]
        return found

    @property
    def pairs_per_launch(self) -> int:
        """Number of pairs per forward pass of a worker."""
        return self.batch_size_per_worker or self.global_batch_size // self.num_workers
