"""Config, footprint and GPU -> GPU-hours per step, peak memory per role, and changes that make roles fit."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from cdpo_ray.config import Config
from cdpo_ray.config.model import GUIDANCE_EMBEDDED
from cdpo_ray.cost.efficiency import (
    COMPILE_SECONDS,
    EFFICIENCY,
    GRAPHS,
    LOAD_SECONDS_PER_GIB,
    START_SECONDS,
    Work,
)
from cdpo_ray.cost.footprint import Footprint
from cdpo_ray.cost.gpus import GIB, Gpu
from cdpo_ray.cost.judges import judges_cost
from cdpo_ray.cost.memory import (
    DenoiserStorage,
    Peak,
    generator_peak,
    trainer_peak,
    use_checkpointing,
)
from cdpo_ray.models.sizes import sizes_of

Verb = Literal["generate", "train", "evaluate"]
VERBS: tuple[Verb, ...] = ("generate", "train", "evaluate")


@dataclass(frozen=True)
class NumPrompts:
    """Number of prompts for training, evaluation and validation."""

    train: int
    heldout: int
    validation: int = 0


@dataclass(frozen=True)
class Workload:
    """A run and the GPU to estimate it for.

    Attributes:
        teacher: footprint of a consistency model's teacher; `None`: there is none.
    """

    config: Config
    prompts: NumPrompts
    footprint: Footprint
    gpu: Gpu
    teacher: Footprint | None = None

    @property
    def positions(self) -> int:
        """Latent positions of a sample."""
        generation, model = self.config.generation, self.config.model
        sizes = sizes_of(model.family, model.layout.path, generation.height, generation.width)
        return sizes.num_latent_values // sizes.latent_channels if sizes else self.footprint.native_positions

    @property
    def passes(self) -> int:
        """Number of the denoiser's forward passes per denoising step."""
        guidance_conditioned = self.config.model.family in GUIDANCE_EMBEDDED
        return 2 if self.config.generation.guidance_scale > 1 and not guidance_conditioned else 1

    @property
    def storage(self) -> DenoiserStorage:
        model = self.config.model
        return DenoiserStorage(model.dtype, model.quantization, model.offload)

    @property
    def lora(self) -> tuple[int, tuple[str, ...]] | None:
        training = self.config.training
        return (training.lora.rank, training.lora.targets) if training.method == "lora" else None

    @property
    def can_be_quantized(self) -> bool:
        """Whether `model.quantization` is another option."""
        return bool(self.lora) and not self.config.training.lora.use_dora and self.config.model.quantization is None

    def seconds(self, work: Work, flops: float, *, compiled: bool = False) -> float:
        """Time of some work on one whole GPU."""
        peak = self.gpu.fp32_teraflops if self.config.model.dtype == "float32" else self.gpu.bf16_teraflops
        return flops / (peak * 1e12 * EFFICIENCY[work][compiled])


@dataclass(frozen=True)
class StepCost:
    """Time of one step.

    Attributes:
        gpu_seconds: work on whole GPUs, summed over processes, without start-up.
        wall_seconds: from start to finish, with start-up and compilation.
        num_processes: number of concurrent processes.
        gpus_per_process: number of GPUs, possibly fractional.
        compiled: whether the denoiser is compiled.
        saved_seconds: time per process that compiling saves or would save.
        compile_seconds: time per process that compiling takes or would take.
    """

    verb: Verb
    gpu_seconds: float
    wall_seconds: float
    num_processes: int
    gpus_per_process: float
    compiled: bool
    saved_seconds: float
    compile_seconds: float

    @property
    def gpu_hours(self) -> float:
        """Allocated GPU-hours: all GPUs for the whole step."""
        return self.wall_seconds * self.num_processes * self.gpus_per_process / 3600


@dataclass(frozen=True)
class RoleMemory:
    """Peak memory of one process of a role, and its share of a GPU.

    Attributes:
        share: share of one GPU, 0 to 1.
        advice: changes that would make it fit; empty if it fits.
    """

    role: str
    peak: Peak
    share: float
    gpu: Gpu
    advice: tuple[str, ...] = ()

    @property
    def available_bytes(self) -> float:
        return self.share * self.gpu.memory_bytes

    @property
    def fits(self) -> bool:
        return self.peak.fits(self.available_bytes)


@dataclass(frozen=True)
class Estimate:
    """Cost of a run on one kind of GPU.

    Attributes:
        steps: steps of one round.
        checkpointing: whether training checkpoints activations.
        on_gpu: whether the configuration requests a GPU.
        notes: costs that are not included, and other problems.
        search_gpu_hours: of `cdpo tune`, not included in the steps; `None`: no search.
        rounds: number of rounds of all steps.
    """

    gpu: Gpu
    steps: tuple[StepCost, ...]
    memory: tuple[RoleMemory, ...]
    checkpointing: bool
    on_gpu: bool
    notes: tuple[str, ...] = ()
    search_gpu_hours: float | None = None
    rounds: int = 1

    @property
    def fits(self) -> bool:
        return all(role.fits for role in self.memory)

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all steps in all rounds, without the search."""
        return self.rounds * sum(step.gpu_hours for step in self.steps)

    def step(self, verb: str) -> StepCost | None:
        """Cost of a verb's step; `None`: not estimated, or not part of the run."""
        return next((step for step in self.steps if step.verb == verb), None)


def estimate(load: Workload) -> Estimate:
    """Cost of a run; a role without GPUs in `resources` is estimated as if each process had one."""
    config = load.config
    checkpointing = _checkpointing(load)
    verbs = [verb for verb in VERBS if verb != "generate" or _generates(config)]
    steps = tuple(step_cost(load, verb, checkpointing=checkpointing) for verb in verbs)
    generators, trainers = config.resources.generators, config.resources.trainers
    on_gpu = generators.gpus_per_actor > 0 or trainers.gpus_per_worker > 0
    notes = []
    if config.model.dtype == "bfloat16" and not load.gpu.has_bf16:
        notes.append(f"{load.gpu.name} does not support bfloat16; use `model.dtype: float16`")
    if config.model.quantization:
        notes.append(f"hours do not include dequantization of the {config.model.quantization} weights")
    if unknown := judges_cost(config.evaluation_judges).unknown:
        notes.append(f"hours and memory do not include judges of unknown cost: {', '.join(unknown)}")
    if config.rewards.placement == "pool" and config.resources.scorers.gpus_per_actor:
        notes.append("hours do not include the GPUs of `resources.scorers`")
    if config.preferences:
        encoding = load.seconds("decode", 1000 * load.footprint.encode_flops(load.positions)) / 3600
        notes.append(f"hours do not include the import, whose VAE takes {encoding:.2g} GPU-hours per 1,000 images")
    search = None
    if config.search:
        search = _search_gpu_seconds(load, checkpointing=checkpointing) / 3600
    memory = tuple(_memory(load))
    return Estimate(load.gpu, steps, memory, checkpointing, on_gpu, tuple(notes), search, config.rounds)


def _generates(config: Config) -> bool:
    """Whether the run generates samples."""
    return not (config.preferences or config.run.samples_from)


def step_cost(load: Workload, verb: Verb, *, checkpointing: bool = False) -> StepCost:
    """Time of one step."""
    config = load.config
    if verb == "train":
        num_processes, gpus = config.training.num_workers, config.resources.trainers.gpus_per_worker or 1
    else:
        num_processes, gpus = _num_actors(load, verb), config.resources.generators.gpus_per_actor or 1
    compile_seconds = COMPILE_SECONDS[config.model.family] * GRAPHS[verb]
    speed = num_processes * min(1.0, gpus)
    eager, fast = (_gpu_seconds(load, verb, compiled=each, checkpointing=checkpointing) for each in (False, True))
    saved_seconds = (eager - fast) / speed  # per process: each compiles, and has a share of the work
    setting = config.model.compile
    compiled = saved_seconds > compile_seconds if setting == "auto" else setting
    busy = fast if compiled else eager
    starting_up = START_SECONDS + LOAD_SECONDS_PER_GIB * _weights_bytes(load, verb) / GIB
    wall = busy / speed + starting_up + compiled * compile_seconds
    return StepCost(verb, busy, wall, num_processes, gpus, compiled, saved_seconds, compile_seconds)


def pays_to_compile(load: Workload, verb: Verb) -> bool:
    """Whether compiling the denoiser saves more time per process than it takes."""
    auto = load.config.model_copy(update={"model": load.config.model.model_copy(update={"compile": "auto"})})
    return step_cost(replace(load, config=auto), verb, checkpointing=_checkpointing(load)).compiled


def training_peak(load: Workload, *, checkpointing: bool, validates: bool) -> Peak:
    """Peak memory of a training worker.

    Args:
        validates: whether it samples and judges images after each stage, as the trials of a search do.
    """
    config, training = load.config, load.config.training
    return trainer_peak(
        load.footprint,
        load.storage,
        positions=load.positions,
        pairs=training.pairs_per_launch,
        lora=load.lora,
        checkpointing=checkpointing,
        optimizer=training.optimizer,
        zero_stage=training.zero_stage,
        num_workers=training.num_workers,
        teacher=load.teacher,
        with_vae=validates or training.preview_prompts > 0,
        use_dora=training.lora.use_dora,
        validated_images=config.generation.images_per_batch if validates else 0,
        passes=load.passes,
        judges_bytes=judges_cost(config.evaluation_judges).weights_bytes if validates else 0,
    )


def _checkpointing(load: Workload) -> bool:
    share = min(1.0, load.config.resources.trainers.gpus_per_worker or 1)
    return use_checkpointing(
        load.config.training.gradient_checkpointing,
        training_peak(load, checkpointing=False, validates=load.config.search is not None).total,
        share * load.gpu.memory_bytes,
    )


def _gpu_seconds(load: Workload, verb: Verb, *, compiled: bool, checkpointing: bool) -> float:
    """Time of a whole step on one whole GPU."""
    config, evaluation = load.config, load.config.evaluation
    if verb == "generate":
        num_images = load.prompts.train * config.generation.images_per_prompt
        judges = config.rewards.judges if config.rewards.placement == "fused" else {}
        encoding = load.seconds("generate", load.prompts.train * load.footprint.text_flops)
        return encoding + num_images * _image_seconds(load, judges, compiled=compiled)
    if verb == "train":
        curriculum = config.curriculum
        num_pairs = curriculum.num_stages * curriculum.updates_per_stage * config.training.global_batch_size
        seconds = num_pairs * _pair_seconds(load, compiled=compiled, checkpointing=checkpointing)
        num_draws = curriculum.num_margin_draws or 0
        return seconds + _margin_seconds(load, curriculum.num_stages, num_draws, compiled=compiled)
    num_images = load.prompts.heldout * evaluation.images_per_prompt
    seconds = load.seconds("generate", load.prompts.heldout * load.footprint.text_flops)
    seconds += 2 * num_images * _image_seconds(load, config.evaluation_judges, compiled=compiled)
    return seconds + num_images * evaluation.num_margin_draws * _value_seconds(load, compiled=compiled)


def _image_seconds(load: Workload, judges: dict[str, dict[str, Any]], *, compiled: bool) -> float:
    """Time to sample, decode and judge one image."""
    footprint, steps = load.footprint, load.config.generation.num_denoising_steps
    return (
        load.seconds("generate", steps * load.passes * footprint.forward_flops(load.positions), compiled=compiled)
        + load.seconds("decode", footprint.decode_flops(load.positions))
        + load.seconds("judge", judges_cost(judges).flops)
    )


def _pair_seconds(load: Workload, *, compiled: bool, checkpointing: bool) -> float:
    """Time of one pair: both samples in policy and reference."""
    method = "lora" if load.lora else "full"
    forward = load.footprint.forward_flops(load.positions)
    policy = forward * (2 if checkpointing else 1) + load.footprint.backward_flops[method](load.positions)
    return load.seconds("train", 2 * (policy + _reference_flops(load)), compiled=compiled)


def _margin_seconds(load: Workload, num_stages: int, num_draws: int, *, compiled: bool) -> float:
    """Time to measure the margins of all samples before each stage."""
    num_samples = load.prompts.train * load.config.generation.images_per_prompt
    return num_stages * num_samples * num_draws * _value_seconds(load, compiled=compiled)


def _value_seconds(load: Workload, *, compiled: bool) -> float:
    """Time of one sample in policy and reference, without gradient."""
    forward = load.footprint.forward_flops(load.positions)
    return load.seconds("generate", forward + _reference_flops(load), compiled=compiled)


def _reference_flops(load: Workload) -> float:
    """FLOPs of one sample in the reference; with a teacher, two passes of each of reference and teacher."""
    forward = load.footprint.forward_flops(load.positions)
    return 2 * forward + 2 * load.teacher.forward_flops(load.positions) if load.teacher else forward


def _search_gpu_seconds(load: Workload, *, checkpointing: bool) -> float:
    """Time of all trials of a search, of its confirmation, and of the base model's images that they are compared with.

    It assumes that no trial is stopped early and that each takes the largest values of the space. Other keys of the
    space that change the cost, such as `training.method`, have the config's values.
    """
    config, search = load.config, load.config.search
    assert search is not None, "the config must have a search"
    curriculum, evaluation, prompts = config.curriculum, config.evaluation, load.prompts
    num_trials, num_confirmations = search.max_trials(config.plain()), 2 * search.confirm_seeds
    num_stages = search.largest("curriculum.num_stages", curriculum.num_stages)
    num_draws = search.largest("curriculum.num_margin_draws", curriculum.num_margin_draws or 0)
    batch = search.largest("training.global_batch_size", config.training.global_batch_size)
    step = step_cost(load, "train", checkpointing=checkpointing)
    training = 3600 * step.gpu_hours - step.gpu_seconds  # start-up, because a worker has one GPU at most
    pair = _pair_seconds(load, compiled=step.compiled, checkpointing=checkpointing)
    training += search.max_updates(curriculum) * batch * pair
    training += _margin_seconds(load, num_stages, num_draws, compiled=step.compiled)
    num_measured = sum(search.validated_prompts(num_stages, prompts.validation))
    in_trials = num_trials * num_measured * search.images_per_prompt
    in_trials += num_confirmations * prompts.heldout * evaluation.images_per_prompt
    of_base = prompts.validation * search.images_per_prompt + prompts.heldout * evaluation.images_per_prompt
    image = _image_seconds(load, config.evaluation_judges, compiled=step.compiled)
    values = in_trials * evaluation.num_margin_draws * _value_seconds(load, compiled=step.compiled)
    return (num_trials + num_confirmations) * training + (in_trials + of_base) * image + values


def _num_actors(load: Workload, verb: Verb) -> int:
    """Number of generators with work: a call makes some prompts, or at most a batch of one prompt's images."""
    num_prompts = load.prompts.heldout if verb == "evaluate" else load.prompts.train
    prompts_per_call, images_per_prompt = _call_of(load, verb)
    pieces = math.ceil(images_per_prompt / load.config.generation.images_per_batch)
    calls = pieces * math.ceil(num_prompts / prompts_per_call)
    return max(1, min(load.config.resources.generators.num_actors, calls))


def _call_of(load: Workload, verb: Verb) -> tuple[int, int]:
    """Number of prompts per generator call, and of images per prompt."""
    config = load.config
    per_prompt = (config.evaluation if verb == "evaluate" else config.generation).images_per_prompt
    return max(1, config.generation.images_per_batch // per_prompt), per_prompt


def _weights_bytes(load: Workload, verb: Verb) -> float:
    """Bytes of the weights that each process of a step loads."""
    footprint, storage = load.footprint, load.storage
    others = footprint.text_parameters + (0 if verb == "train" else footprint.vae_parameters)
    teacher = load.teacher.parameters if load.teacher and verb != "generate" else 0
    return storage.denoiser_bytes(footprint) + (others + teacher) * storage.value_bytes


def _memory(load: Workload) -> Iterator[RoleMemory]:
    config, resources = load.config, load.config.resources
    generators = min(1.0, resources.generators.gpus_per_actor or 1)
    if _generates(config):
        judges = config.rewards.judges if config.rewards.placement == "fused" else {}
        yield _role(load, "generator", generators, lambda each: _sampling_peak(each, "generate", judges))
    yield _role(
        load,
        "trainer",
        min(1.0, resources.trainers.gpus_per_worker or 1),
        lambda each: training_peak(each, checkpointing=_checkpointing(each), validates=config.search is not None),
    )
    yield _role(load, "evaluator", generators, lambda each: _sampling_peak(each, "evaluate", config.evaluation_judges))
    if resources.scorers.gpus_per_actor and config.rewards.placement == "pool":
        weights_bytes = judges_cost(config.rewards.judges).weights_bytes
        share = min(1.0, resources.scorers.gpus_per_actor)
        yield RoleMemory("scorer", Peak(weights_bytes, 0.0), share, load.gpu)


def _sampling_peak(load: Workload, verb: Verb, judges: dict[str, dict[str, Any]]) -> Peak:
    config, generation = load.config, load.config.generation
    num_prompts, per_prompt = _call_of(load, verb)
    extra = 0
    if verb == "evaluate":
        extra += 0 if load.lora else load.footprint.parameters
        extra += load.teacher.parameters if load.teacher and config.evaluation.num_margin_draws else 0
    return generator_peak(
        load.footprint,
        load.storage,
        positions=load.positions,
        images=min(generation.images_per_batch, num_prompts * per_prompt),
        passes=load.passes,
        judges_bytes=judges_cost(judges).weights_bytes,
        extra_parameters=extra,
    )


def _role(load: Workload, role: str, share: float, peak_of: Callable[[Workload], Peak]) -> RoleMemory:
    found = RoleMemory(role, peak_of(load), share, load.gpu)
    if found.fits:
        return found
    kinds, sizes = _training_changes(load) if role == "trainer" else _sampling_changes(load)
    advice = []
    for kind in kinds:
        for size in sizes:  # largest first
            keys = (*kind.keys, *size.keys)
            changed = _changed(_changed(load, kind), size)
            if keys and peak_of(changed).fits(found.available_bytes):
                advice.append(" and ".join(keys))
                break
    return RoleMemory(role, found.peak, share, load.gpu, tuple(advice[:3]))


class Change(NamedTuple):
    """A change of the configuration: keys with new values as a user writes them, and the same values by section."""

    keys: tuple[str, ...]
    sections: dict[str, dict[str, Any]]


UNCHANGED = Change((), {})


def _change(**sections: dict[str, Any]) -> Change:
    keys = [
        f"`{section}.{key}: {str(value).lower()}`"
        for section, values in sections.items()
        for key, value in values.items()
    ]
    return Change(tuple(keys), sections)


def _training_changes(load: Workload) -> tuple[list[Change], list[Change]]:
    """Changes that save memory, fastest first; and smaller batches, largest first."""
    training = load.config.training
    sizes = [
        _change(training={"batch_size_per_worker": size})
        for size in range(training.pairs_per_launch - 1, 0, -1)
        if training.global_batch_size % (training.num_workers * size) == 0
    ]
    if load.config.search:
        sizes += _smaller_sampling_batches(load)
    lean = {} if training.gradient_checkpointing else {"gradient_checkpointing": True}
    kinds = [UNCHANGED]
    if lean:
        kinds.append(_change(training=lean))
    if load.can_be_quantized:
        kinds += [_quantized(kind, lean) for kind in ("int8", "nf4")]
    if training.method == "full":
        if training.num_workers > 1:
            kinds += [_change(training=lean | {"zero_stage": stage}) for stage in range(training.zero_stage + 1, 4)]
        if training.optimizer == "adamw":
            kinds.append(_change(training=lean | {"optimizer": "adamw_8bit"}))
    return kinds, [UNCHANGED, *sizes]


def _sampling_changes(load: Workload) -> tuple[list[Change], list[Change]]:
    """As `_training_changes`."""
    model = load.config.model
    kinds = [UNCHANGED]
    if not model.offload:
        kinds.append(_change(model={"offload": True}))
    if load.can_be_quantized:
        kinds += [_quantized(kind, {}) for kind in ("int8", "nf4")]
    return kinds, [UNCHANGED, *_smaller_sampling_batches(load)]


def _smaller_sampling_batches(load: Workload) -> list[Change]:
    images = load.config.generation.images_per_batch
    return [_change(generation={"images_per_batch": size}) for size in range(images - 1, 0, -1)]


def _quantized(kind: str, training: dict[str, Any]) -> Change:
    return _change(model={"quantization": kind, "offload": True}, training=training)


def _changed(load: Workload, change: Change) -> Workload:
    sections = {name: getattr(load.config, name).model_copy(update=keys) for name, keys in change.sections.items()}
    return replace(load, config=load.config.model_copy(update=sections))
