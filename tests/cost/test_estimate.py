"""Estimated hours against hand-computed values, and their dependence on the configuration."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cdpo_ray.config import Config, load_config
from cdpo_ray.cost.efficiency import COMPILE_SECONDS, EFFICIENCY, GRAPHS, START_SECONDS
from cdpo_ray.cost.estimate import NumPrompts, StepCost, Workload, estimate, pays_to_compile, step_cost, training_peak
from cdpo_ray.cost.gpus import GPUS
from cdpo_ray.cost.published import published_footprint
from cdpo_ray.cost.sentences import cost_lines, memory_faults

CONFIGS = Path(__file__).parents[2] / "configs"
SD15, SDXL = published_footprint("sd15"), published_footprint("sdxl")


def workload(*overrides: str, config: str = "sd15", gpu: str = "h100", prompts: int = 100) -> Workload:
    plain = () if config in ("sdxl", "flux") else ("training.gradient_checkpointing=false",)
    loaded: Config = load_config(CONFIGS / f"{config}.yaml", (*plain, *overrides))
    names = {"sd15": "sd15", "sdxl": "sdxl", "lcm": "lcm", "flux": "flux_dev"}
    teacher = SD15 if loaded.training.consistency_target == "teacher" else None
    return Workload(loaded, NumPrompts(prompts, 20), published_footprint(names[config]), GPUS[gpu], teacher)


def busy(load: Workload, verb: str, **options: bool) -> float:
    return step_cost(load, verb, **options).gpu_seconds  # type: ignore[arg-type]


def test_generation_takes_two_forward_passes_per_denoising_step_with_guidance_and_one_decoding() -> None:
    load = workload("model.compile=false", "rewards=[jpeg_size]", "rewards.rank_by=null")
    rate = 989e12
    denoising = 30 * 2 * SD15.forward_flops(4096) / (rate * EFFICIENCY["generate"].eager)
    decoding = SD15.decode_flops(4096) / (rate * EFFICIENCY["decode"].eager)
    encoding = 100 * SD15.text_flops / (rate * EFFICIENCY["generate"].eager)
    assert busy(load, "generate") == pytest.approx(encoding + 100 * 50 * (denoising + decoding))
    unguided = workload(
        "model.compile=false", "rewards=[jpeg_size]", "rewards.rank_by=null", "generation.guidance_scale=1"
    )
    assert busy(unguided, "generate") == pytest.approx(encoding + 100 * 50 * (denoising / 2 + decoding))


def test_a_lora_pair_takes_two_forward_and_two_backward_passes_and_two_of_the_reference() -> None:
    load = workload("model.compile=false")
    flops = 2 * (2 * SD15.forward_flops(4096) + SD15.backward_flops["lora"](4096))
    assert flops / 1e12 == pytest.approx(5.17, rel=0.01)  # published table of the project
    pairs = 5 * 400 * 32
    assert busy(load, "train") == pytest.approx(pairs * flops / (989e12 * EFFICIENCY["train"].eager))
    more = 2 * SD15.forward_flops(4096) * pairs / (989e12 * EFFICIENCY["train"].eager)
    assert busy(load, "train", checkpointing=True) == pytest.approx(busy(load, "train") + more)


@pytest.mark.parametrize(("target", "num_forward"), [("image", 4), ("teacher", 10)])
def test_a_consistency_pair_takes_ten_forward_and_two_backward_passes_with_a_teacher_else_four_and_two(
    target: str, num_forward: int
) -> None:
    """Policy: 2, reference: 2; with a teacher, reference at both timesteps: 4, guided teacher: 4."""
    source = {"teacher": ["model.teacher.path=embedded"], "image": []}[target]
    load = workload("model.compile=false", f"training.consistency_target={target}", *source, config="lcm")
    forward = SD15.forward_flops(96 * 96)
    flops = num_forward * forward + 2 * published_footprint("lcm").backward_flops["lora"](96 * 96)
    seconds = 5 * 400 * 32 * flops / (989e12 * EFFICIENCY["train"].eager)
    assert busy(load, "train") == pytest.approx(seconds, rel=1e-3)


def test_evaluation_samples_base_and_tuned_model_and_computes_implicit_values() -> None:
    given = ("model.compile=false", "evaluation.judges=[jpeg_size]", "rewards=[jpeg_size]", "rewards.rank_by=null")
    without, with_values = (workload(*given, f"evaluation.num_margin_draws={draws}") for draws in (0, 4))
    encoding = SD15.text_flops / (989e12 * EFFICIENCY["generate"].eager)
    image = (busy(workload(*given), "generate") - 100 * encoding) / (100 * 50)
    assert busy(without, "evaluate") == pytest.approx(20 * encoding + 2 * 20 * 8 * image)
    values = 20 * 8 * 4 * 2 * SD15.forward_flops(4096) / (989e12 * EFFICIENCY["generate"].eager)
    assert busy(with_values, "evaluate") - busy(without, "evaluate") == pytest.approx(values)


def test_processes_share_the_work_and_gpu_hours_count_every_gpu() -> None:
    one, four = (workload(f"resources.generators.num_actors={num}", "model.compile=false") for num in (1, 4))
    single, together = (step_cost(load, "generate") for load in (one, four))
    assert together.gpu_seconds == single.gpu_seconds
    starting = single.wall_seconds - single.gpu_seconds
    assert starting > START_SECONDS
    assert together.wall_seconds - starting == pytest.approx(single.gpu_seconds / 4)
    assert together.gpu_hours == pytest.approx(4 * together.wall_seconds / 3600)


def test_half_a_gpu_takes_twice_the_time_and_the_same_gpu_hours() -> None:
    whole, half = (workload(f"resources.generators.gpus_per_actor={gpus}") for gpus in (1, 0.5))
    full, shared = (step_cost(load, "generate") for load in (whole, half))
    starting = START_SECONDS + COMPILE_SECONDS["stable_diffusion"]
    assert shared.wall_seconds - starting == pytest.approx(2 * (full.wall_seconds - starting), rel=0.01)
    assert shared.gpu_hours == pytest.approx(full.gpu_hours - starting / 2 / 3600, rel=0.01)
    (generator, _, _) = estimate(half).memory
    assert generator.available_bytes == GPUS["h100"].memory_bytes / 2


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("generate", "generation.images_per_prompt=51"),
        ("generate", "generation.num_denoising_steps=31"),
        ("generate", "generation.height=576"),
        ("train", "curriculum.updates_per_stage=401"),
        ("train", "training.global_batch_size=48"),
        ("train", "training.gradient_checkpointing=true"),
        ("evaluate", "evaluation.images_per_prompt=9"),
        ("evaluate", "evaluation.judges=[clip,hpsv2]"),
    ],
)
def test_more_work_takes_more_time(verb: str, more: str) -> None:
    before, after = (estimate(load).step(verb) for load in (workload(), workload(more)))
    assert before and after and before.wall_seconds < after.wall_seconds


def test_a_faster_gpu_takes_less_time_and_memory_does_not_change() -> None:
    found = {name: estimate(workload(gpu=name)) for name in ("l4", "a100", "h100")}
    hours = [found[name].gpu_hours for name in ("l4", "a100", "h100")]
    assert hours == sorted(hours, reverse=True)
    assert len({each.memory[1].peak for each in found.values()}) == 1


def test_compile_auto_compiles_only_beyond_the_break_even() -> None:
    """SD1.5: time saved per prompt times number of prompts, against compilation time."""
    auto = workload("model.compile=auto", prompts=1)
    saving = step_cost(auto, "generate").saved_seconds
    enough = int(COMPILE_SECONDS["stable_diffusion"] / saving) + 1
    for prompts, compiled in ((enough - 1, False), (enough, True)):
        load = workload("model.compile=auto", prompts=prompts)
        assert step_cost(load, "generate").compiled is compiled is pays_to_compile(load, "generate")
    many = replace(load, config=load.config.model_copy(update={"resources": _actors(load, 4)}))
    assert not pays_to_compile(many, "generate"), "each of four compiles and saves a quarter"


def _actors(load: Workload, num: int) -> object:
    resources = load.config.resources
    return resources.model_copy(update={"generators": resources.generators.model_copy(update={"num_actors": num})})


@pytest.mark.parametrize("setting", [True, False])
def test_compile_follows_the_config_unless_it_is_auto(setting: bool) -> None:
    for prompts in (1, 10_000):
        found = estimate(workload(f"model.compile={setting}".lower(), prompts=prompts))
        assert [step.compiled for step in found.steps] == [setting] * 3


def test_checkpointing_auto_is_on_if_the_peak_without_it_is_too_large() -> None:
    auto = "training.gradient_checkpointing=auto"
    assert not estimate(workload(auto)).checkpointing
    on = estimate(workload(auto, gpu="l4"))
    assert on.checkpointing and on.memory[1].fits
    assert estimate(workload(auto, config="sdxl")).checkpointing


@pytest.mark.parametrize(
    ("config", "gpu"), [("sd15", "l4"), ("sd15", "t4"), ("sdxl", "l4"), ("flux", "4090"), ("lcm", "3090")]
)
def test_the_advised_changes_fit(config: str, gpu: str) -> None:
    load = workload(config=config, gpu=gpu)
    found = estimate(load)
    assert not found.fits
    for role in found.memory:
        assert role.fits or role.advice, role.role
        for advice in role.advice:
            overrides = [
                each.strip(" `").replace(": ", "=") for part in advice.split(" and ") for each in part.split(",")
            ]
            changed = estimate(workload(*overrides, config=config, gpu=gpu))
            assert {each.role: each.fits for each in changed.memory}[role.role], advice


def test_the_advised_batch_is_the_largest_that_fits() -> None:
    load = workload("training.gradient_checkpointing=true", gpu="t4", config="sdxl")
    found = estimate(load).memory[1]
    batches = [size for size in (8, 4, 2, 1) if _trainer_fits(size)]
    first = found.advice[0] if found.advice else ""
    assert found.fits == (8 in batches)
    if batches and not found.fits:
        assert first == f"`training.batch_size_per_worker: {batches[0]}`"


def _trainer_fits(size: int) -> bool:
    given = ("training.gradient_checkpointing=true", f"training.batch_size_per_worker={size}")
    load = workload(*given, gpu="t4", config="sdxl")
    return training_peak(load, checkpointing=True, validates=False).fits(load.gpu.memory_bytes)


def test_a_gpu_without_bfloat16_is_noted() -> None:
    assert any("does not support bfloat16" in note for note in estimate(workload(gpu="t4")).notes)
    assert not estimate(workload("model.dtype=float16", gpu="t4")).notes


def test_lines_give_hours_memory_and_verdict_as_estimates() -> None:
    lines = cost_lines(estimate(workload(gpu="l4")), "the published sizes of sd15")
    assert lines[0] == "  cost         estimated, not measured, for l4 (22 GiB), the published sizes of sd15"
    text = "\n".join(lines)
    assert text.count("GPU-hours") == 4 and "DOES NOT FIT" in text and "would fit: `training." in text
    assert lines[-1] == "  verdict      does not fit l4"
    (fault,) = memory_faults(estimate(workload(gpu="l4")))
    assert fault.startswith("trainer: estimated peak ")
    assert " does not fit 22.0 GiB of l4, of which 95% is usable; would fit: " in fault
    assert memory_faults(estimate(workload())) == []


def test_gpu_hours_count_all_gpus_for_the_whole_step() -> None:
    step = StepCost("train", 7200.0, 3600.0, 4, 0.5, False, 0.0, 0.0)
    assert step.gpu_hours == 2.0


def test_rounds_multiply_the_hours_but_not_the_memory() -> None:
    once, thrice = (estimate(workload(f"rounds={rounds}")) for rounds in (1, 3))
    assert thrice.gpu_hours == pytest.approx(3 * once.gpu_hours)
    assert (thrice.steps, thrice.memory) == (once.steps, once.memory)
    assert any(line.startswith("    all") and line.endswith(" in 3 rounds") for line in cost_lines(thrice, "sd15"))


def resident(load: Workload, role: str) -> float:
    (found,) = (each for each in estimate(load).memory if each.role == role)
    return found.peak.weights


@pytest.mark.parametrize(("judge", "num_bytes"), [("hpsv2", 4 * 986_109_441), ("hpsv3", 2 * 7_748_610_610)])
@pytest.mark.parametrize(("placement", "role"), [("fused", "generator"), ("pool", "scorer")])
def test_judges_take_4_bytes_per_parameter_and_hpsv3_the_2_of_its_stored_weights(
    placement: str, role: str, judge: str, num_bytes: int
) -> None:
    given = (f"rewards.placement={placement}", "resources.scorers.gpus_per_actor=1", "rewards.rank_by=null")
    without, with_judge = (resident(workload(*given, f"rewards=[{name}]"), role) for name in ("jpeg_size", judge))
    assert with_judge - without == num_bytes


def test_samples_of_another_run_cost_nothing() -> None:
    found = estimate(workload("run.samples_from=runs/other"))
    assert found.step("generate") is None
    assert [role.role for role in found.memory] == ["trainer", "evaluator"]


def test_evaluation_compiles_base_and_tuned_model() -> None:
    steps = {step.verb: step.compile_seconds for step in estimate(workload()).steps}
    assert steps == {verb: num * COMPILE_SECONDS["stable_diffusion"] for verb, num in GRAPHS.items()}
    assert steps["evaluate"] == 2 * steps["generate"]


def test_a_search_trains_every_point_of_a_grid_the_papers_schedule_and_two_confirmations_per_seed() -> None:
    common = (
        "prompts.validation={fraction: 0.1}",
        "model.compile=false",
        "curriculum.order=none",
    )  # the paper's schedule is extra
    space = "space: {training.beta: [2500, 5000], training.learning_rate: [1e-5, 1e-4]}"
    grid, sampled = (
        replace(workload(*common, f"search={{{how}, {space}}}"), prompts=NumPrompts(100, 20, 10))
        for how in ("algorithm: grid, confirm_seeds: 2", "num_trials: 8, confirm_seeds: 0")
    )
    values = 4 * 2 * SD15.forward_flops(4096) / (989e12 * EFFICIENCY["generate"].eager)
    of_base = 4 * 10 + 8 * 20
    for name, load, num_trainings, in_trials in (
        ("grid", grid, 5 + 4, 5 * 5 * 10 * 4 + 4 * 20 * 8),
        ("sampled", sampled, 8, 8 * 5 * 10 * 4),
    ):
        per_image = busy(load, "evaluate") - load.seconds("generate", 20 * SD15.text_flops)
        per_image = (per_image - 20 * 8 * values) / (2 * 20 * 8)
        seconds = num_trainings * step_cost(load, "train").wall_seconds
        seconds += (in_trials + of_base) * per_image + in_trials * values
        assert estimate(load).search_gpu_hours == pytest.approx(seconds / 3600), name


def test_a_search_costs_what_its_largest_batch_its_margins_and_its_early_prompts_take() -> None:
    def hours(more: str = "", *given: str, space: str = "training.beta: [2500, 5000]") -> float:
        search = f"search={{num_trials: 8, confirm_seeds: 1, space: {{{space}}}{more}}}"
        load = workload("prompts.validation={fraction: 0.1}", "model.compile=false", search, *given)
        found = estimate(replace(load, prompts=NumPrompts(100, 20, 10))).search_gpu_hours
        assert found is not None
        return found

    plain = workload("model.compile=false")
    of_training = 10 * (busy(plain, "train")) / 3600
    larger = hours(space="training.global_batch_size: [16, 32, 96]")
    assert larger - hours() == pytest.approx(2 * of_training), "three times the pairs of the config's 32"
    margin = ("curriculum.measure=margin", "curriculum.boundaries=equal_count")
    measuring = 10 * (busy(workload("model.compile=false", *margin), "train") - busy(plain, "train")) / 3600
    assert hours("", *margin) - hours() == pytest.approx(measuring) and measuring > 0
    values = 4 * 2 * SD15.forward_flops(4096) / (989e12 * EFFICIENCY["generate"].eager)
    judged = ("model.compile=false", "evaluation.num_margin_draws=0")
    per_image = (busy(workload(*judged), "evaluate") - plain.seconds("generate", 20 * SD15.text_flops)) / (2 * 20 * 8)
    saved = 8 * 4 * (10 - 3) * 4 * (per_image + values) / 3600  # 8 trials, 4 stages before the last, 4 images
    assert hours() - hours(", early_prompts: 3") == pytest.approx(saved)


SEARCH = "search={num_trials: 8, space: {training.beta: [2500, 5000]}}"
VALIDATION = "prompts.validation={fraction: 0.1}"


def test_a_trainer_of_a_search_holds_the_judges_and_decodes_a_batch_of_images() -> None:
    given = ("evaluation.judges=[hpsv2,pickscore]", "generation.images_per_batch=128", VALIDATION)
    load = workload(*given, SEARCH)
    plain, found = (training_peak(load, checkpointing=False, validates=validates) for validates in (False, True))
    assert found.weights - plain.weights == 2 * 4 * 986_109_441
    assert found.work == 128 * SD15.decode_bytes(4096) > plain.work
    assert estimate(load).memory[1].peak == found
    assert estimate(workload(*given)).memory[1].peak == plain


def test_a_smaller_batch_of_images_is_advised_to_a_trainer_of_a_search() -> None:
    given = ("training.gradient_checkpointing=true", "generation.images_per_batch=256", VALIDATION, SEARCH)
    load = workload(*given, gpu="4090")
    decoding = SD15.decode_bytes(4096)
    trainer = estimate(load).memory[1]
    assert not trainer.fits
    (advised,) = (each for each in trainer.advice if each.startswith("`generation.images_per_batch"))
    rest = trainer.peak.total - trainer.peak.work
    largest = int((0.95 * GPUS["4090"].memory_bytes - rest) / decoding)
    assert advised == f"`generation.images_per_batch: {largest}`"


def test_large_hours_have_thousands_separators() -> None:
    lines = cost_lines(estimate(workload("curriculum.updates_per_stage=400000", gpu="l4")), "sd15")
    (train,) = (line for line in lines if line.startswith("    train "))
    assert re.search(r"train +\d,\d{3} GPU-hours, ", train)
    assert "compiling takes" in train and "eager (compiling would take " in "".join(
        cost_lines(estimate(workload("model.compile=false")), "sd15")
    )
