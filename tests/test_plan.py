"""A plan's numbers match counts by hand."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from cdpo_ray.config import Config, load_config
from cdpo_ray.config.search import StopEarly
from cdpo_ray.errors import ConfigError, PreferenceError
from cdpo_ray.plan import make_plan, same_beta_elsewhere
from cdpo_ray.prompts.sources import PromptSplit
from cdpo_ray.run import read_prompts, scan_preferences

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
PROMPTS = PromptSplit([f"t{i}" for i in range(6)], [f"h{i}" for i in range(4)], 17, num_doubled=2, num_empty=1)


def config(*overrides: str) -> Config:
    return load_config(QUICKSTART, overrides)


def numbers(line: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]


def line_of(text: str, word: str) -> str:
    (line,) = [line for line in text.split("\n") if line.strip().startswith(word)]
    return line


@pytest.mark.parametrize(("num_ranks", "num_stages"), [(8, 4), (9, 5), (2, 1), (13, 7)])
def test_the_pairs_of_each_stage_match_brute_force(num_ranks: int, num_stages: int) -> None:
    plan = str(
        make_plan(config(f"generation.images_per_prompt={num_ranks}", f"curriculum.num_stages={num_stages}"), PROMPTS)
    )
    for stage in range(1, num_stages + 1):
        low = Fraction((num_ranks - 1) * (num_stages - stage), num_stages)
        gaps = [rejected - chosen for chosen, rejected in itertools.combinations(range(num_ranks), 2)]
        admitted = [gap for gap in gaps if gap > low]
        expected = [stage, min(admitted), max(admitted), 6 * len(admitted), 50 * 16]
        assert numbers(line_of(plan, f"stage {stage} ")) == expected


@pytest.mark.parametrize(
    ("overrides", "gaps"),
    [
        (("pacing=one_stage",), [(6, 7), (4, 5), (2, 3), (1, 1)]),
        (("order=hard_to_easy", "pacing=sliding_window"), [(1, 1), (1, 3), (2, 5), (4, 7)]),
    ],
)
def test_the_gaps_of_a_stage_follow_the_pacing(overrides: tuple[str, ...], gaps: list[tuple[int, int]]) -> None:
    plan = str(make_plan(config(*(f"curriculum.{each}" for each in overrides)), PROMPTS))
    lines = [numbers(line_of(plan, f"stage {stage} ")) for stage in range(1, 5)]
    assert [tuple(line[1:3]) for line in lines] == gaps
    assert [line[3] for line in lines] == [6 * sum(8 - gap for gap in range(low, high + 1)) for low, high in gaps]


@pytest.mark.parametrize("other", ["measure=score_gap", "boundaries=equal_count", "order=random", "order=none"])
def test_rank_gaps_that_depend_on_scores_are_left_out(other: str) -> None:
    plan = str(make_plan(config(f"curriculum.{other}"), PROMPTS))
    assert "rank gaps" not in plan
    assert numbers(line_of(plan, "each stage")) == [50 * 16]


def test_the_schedule_is_described_in_one_line() -> None:
    assert line_of(str(make_plan(config(), PROMPTS)), "curriculum").split(";", 1)[1] == (
        " paper: easy_to_hard, cumulative; rank_gap, linear boundaries; uniform draws"
    )
    changes = ("preset=plain-dpo", "draws=by_measure", "max_pairs_per_prompt=9", "min_score_gap=0.5", "label_noise=0.5")
    plan = str(make_plan(config(*(f"curriculum.{change}" for change in changes)), PROMPTS))
    assert line_of(plan, "curriculum").split(";", 1)[1] == (
        " plain-dpo: none; rank_gap, linear boundaries; by_measure draws; score gaps above 0.5;"
        " at most 9 pairs per prompt; 50% of labels swapped"
    )


def test_a_growing_lora_has_one_line_per_stage() -> None:
    growing = ("training.lora.rank=16", "training.lora.initial_rank=6", "training.lora.unfreeze=from_input")
    plan = str(make_plan(config(*growing), PROMPTS))
    for stage, growth in enumerate(("6 in 1/4 of the", "9 in 1/2 of the", "12 in 3/4 of the", "16 in all"), start=1):
        assert f"stage {stage}    LoRA of rank {growth} blocks" in plan
    assert "in all blocks" not in str(make_plan(config("training.lora.initial_rank=8"), PROMPTS)), "8 is the final rank"


def test_images_updates_and_launches_match_counts_by_hand() -> None:
    plan = str(make_plan(config("training.batch_size_per_worker=4", "training.beta=250"), PROMPTS))
    assert numbers(line_of(plan, "prompts")) == [6, 4, 17, 2, 1, 17 - 6 - 4 - 2 - 1]
    assert numbers(line_of(plan, "generation"))[:3] == [6 * 8, 8, 10]
    updates, batch, workers, launches, pairs, zero = numbers(line_of(plan, "training"))
    assert (updates, batch, workers, pairs, zero) == (4 * 50, 16, 2, 4, 0)
    assert workers * launches * pairs == batch
    assert numbers(line_of(plan, "evaluation")) == [2 * 4 * 4, 4]
    assert "kappa = beta/2 = 125 " in plan


def test_categories_and_those_that_are_too_small_for_an_interval_are_counted() -> None:
    sizes = {"Colors": 10, "Rare": 9, "Text": 1}
    categories = {f"{name} {n}": name for name, size in sizes.items() for n in range(size)}
    prompts = replace(PROMPTS, heldout=[*categories, "h0"], categories=categories, num_recategorized=3)
    assert (
        "held-out prompts of 3 categories, 2 with fewer than 10 prompts, which is too few for an interval; 3 duplicates"
        " had another category, which is dropped\n"
    ) in str(make_plan(config(), prompts))
    assert "categor" not in str(make_plan(config(), PROMPTS))


def test_the_disk_space_is_that_of_latents_and_images(tiny_sd15: Path) -> None:
    plan = str(make_plan(config(f"model.path={tiny_sd15}", "model.dtype=bfloat16"), PROMPTS))
    latents, images = 48 * 4 * 8 * 8 * 2, 48 * 64 * 64 * 1.6
    assert (
        line_of(plan, "disk").split("disk")[1].strip()
        == f"latents {latents / 1000:.3g} KB, images up to {images / 1000:.3g} KB"
    )
    larger = f"model.path={tiny_sd15}", "generation.height=128", "generation.width=64", "generation.keep_images=false"
    plan = str(make_plan(config(*larger), PROMPTS))
    assert f"latents {48 * 4 * 16 * 8 * 4 / 1000:.3g} KB, images up to 0 B" in plan


@pytest.mark.parametrize(
    ("family", "channels", "side", "factor", "unit", "size"),
    [
        ("stable_diffusion_xl", 4, 8, 8, "KB", 1e3),
        ("stable_diffusion_3", 16, 8, 8, "KB", 1e3),
        ("flux", 16, 128, 8, "MB", 1e6),
        ("flux2", 32, 64, 16, "MB", 1e6),
        ("z_image", 16, 128, 8, "MB", 1e6),
        ("qwen_image", 16, 128, 8, "MB", 1e6),
        ("sana", 32, 2, 32, "KB", 1e3),
    ],
)
def test_the_size_of_latents_is_read_from_every_familys_folder(
    tiny_models: Callable[[str], Path], family: str, channels: int, side: int, factor: int, unit: str, size: float
) -> None:
    plan = str(make_plan(config(f"model.family={family}", f"model.path={tiny_models(family)}"), PROMPTS))
    latents, images = 48 * channels * side * side * 4, 48 * (factor * side) ** 2 * 1.6
    assert f"latents {latents / size:.3g} {unit}, images up to {images / size:.3g} {unit}" in plan


def test_latent_channels_of_a_hub_model_are_those_of_its_family() -> None:
    hub = ("model.path=someone/some-model", "model.revision='0123456789abcdef0123456789abcdef01234567'")
    per_pixel = {"stable_diffusion_xl": 4 / 64, "flux": 16 / 64, "flux2": 32 / 64, "z_image": 16 / 64}
    per_pixel |= {"qwen_image": 16 / 64, "sana": 32 / 1024}
    for family, values in per_pixel.items():
        sized = (*hub, f"model.family={family}", "generation.height=1024", "generation.width=512")
        assert f"latents {48 * values * 1024 * 512 * 4 / 1e6:.3g} MB" in str(make_plan(config(*sized), PROMPTS))


def test_disk_space_of_a_model_that_is_not_on_this_machine_needs_an_image_size() -> None:
    hub = ("model.path=someone/some-model", "model.revision='0123456789abcdef0123456789abcdef01234567'")
    assert "unknown; put the model on this machine, or set `generation.height`" in str(make_plan(config(*hub), PROMPTS))
    sized = (*hub, "generation.height=512", "generation.width=512")
    assert f"latents {48 * 4 * 64 * 64 * 4 / 1e6:.3g} MB" in str(make_plan(config(*sized), PROMPTS))


def test_published_betas_are_converted_to_their_own_conventions() -> None:
    """The same runs as each code writes them: Diffusion-DPO's 5000 is 2500 in diffusers' SD script and in kappa."""
    diffusion_dpo, diffusers_sd, released, by_sum = same_beta_elsewhere(5000, 4 * 64 * 64)
    assert diffusion_dpo.endswith("beta 5000")
    assert diffusers_sd.endswith("beta 2500")
    assert released.endswith("this is 2.5 times as strong")
    assert by_sum.endswith("kappa 0.152588 (N = 16,384)")  # 2500 / 16384
    assert same_beta_elsewhere(2000, None)[2].endswith(
        " this is 1 times as strong"
    )  # the released code's kappa is always 1000


def test_the_number_of_latent_values_is_that_of_the_embedded_model() -> None:
    assert "kappa 0.390625 (N = 256)" in str(make_plan(config(), PROMPTS))  # 100 / (4 x 8 x 8)


def test_method_loss_and_reference_are_printed(tmp_path: Path) -> None:
    assert "LoRA of rank 8; loss dpo; reference: base model\n" in str(make_plan(config(), PROMPTS))
    changed = config("rounds=2", "training.reference=last_round", "training.loss={name: ipo, sft_weight: 0.1}")
    plan = str(make_plan(changed, PROMPTS))
    assert "LoRA of rank 8; loss ipo (sft_weight 0.1); reference: previous round\n" in plan
    assert numbers(line_of(plan, "rounds")) == [2]
    started = str(make_plan(config(f"training.start_from={tmp_path}", "training.reference=start"), PROMPTS))
    assert f"LoRA of rank 8 from {tmp_path}; loss dpo; reference: `training.start_from`\n" in started


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "all timesteps"),
        (["training.timesteps=[499, 999]"], "timesteps 499, 999"),
        (["training.timesteps={low: 500}"], "timesteps 500 to 1000"),
        (
            ["model.family=latent_consistency", "generation.guidance_scale=3"],
            "timesteps of the sampler with 10 denoising steps; guidance 2",
        ),
        (["model.family=flux", "training.guidance_range=[1, 5]"], "all timesteps; guidance 1 to 5"),
    ],
)
def test_timesteps_and_guidance_of_training_are_printed(overrides: list[str], line: str) -> None:
    assert f"               {line}\n" in str(make_plan(config(*overrides), PROMPTS))


def test_guidance_of_training_that_images_are_not_sampled_with_is_a_warning() -> None:
    given = ["model.family=latent_consistency", "generation.guidance_scale=1", "training.guidance_range=[5, 15]"]
    assert (
        "warning: `training.guidance_range` [5.0, 15.0] does not include 0, the guidance that images are sampled with;"
        " leave it out, or widen it"
    ) in str(make_plan(config(*given), PROMPTS))
    assert "warning: `training.guidance" not in str(make_plan(config(*given, "generation.guidance_scale=9"), PROMPTS))


def test_pairs_that_are_drawn_many_times_and_few_held_out_prompts_are_warnings() -> None:
    few = str(make_plan(config(), PROMPTS))
    assert (
        "stage 1    rank gaps 6 to 7: up to 18 pairs, 800 drawn\n    warning: each pair is drawn 44 times; lower" in few
    )
    assert "    stage 2    rank gaps 4 to 7: up to 60 pairs, 800 drawn\n    stage 3" in few, (
        "13 draws per pair are not a warning"
    )
    assert "warning: with fewer than 10 held-out prompts, the report has no intervals and no verdict\n" in few
    prompts = [f"prompt {number}" for number in range(100)]
    assert "warning" not in str(make_plan(config(), PromptSplit(prompts, prompts[:10], 110)))


def test_a_plan_of_ranked_folders_leaves_out_rank_gaps_and_too_many_stages_are_refused(tmp_path: Path) -> None:
    for prompt in ("a cat", "a dog", "an ant", "a cow", "a pig", "a fly"):
        folder = tmp_path / prompt
        folder.mkdir()
        (folder / "prompt.txt").write_text(prompt)
        for rank in range(3):
            (folder / f"{rank}.png").touch()
    given = (
        "prompts.train=null",
        "prompts.heldout={fraction: 0.5}",
        f"preferences={{path: {tmp_path}, format: ranked_folders}}",
        "rewards=[preference]",
    )
    two_stages = config(*given, "curriculum.num_stages=2")
    plan = str(make_plan(two_stages, read_prompts(two_stages)))
    assert f"preferences  {tmp_path} (ranked_folders)" in plan
    assert "rank gaps" not in plan and "images (" not in plan
    with pytest.raises(
        ConfigError, match=r"is 3, but at most 3 images of a prompt were ranked, which have only 2 rank"
    ):
        read_prompts(config(*given, "curriculum.num_stages=3"))


def test_skipped_preferences_and_prompt_syntax_of_other_programs_are_printed(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.png").touch()
    rows = [{"caption": f"cat {number}", "jpg_0": "a.png", "jpg_1": "a.png"} for number in range(12)]
    for number, row in enumerate(rows):
        row |= {"label_0": 1 if number else 0.5, "label_1": 0 if number else 0.5, "has_label": int(number != 1)}
    rows[2] |= {"caption": None}
    rows[3] |= {"caption": "(cat:1.2)"}
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n\n" for row in rows))
    given = (
        "prompts.train=null",
        "prompts.heldout={fraction: 0.5}",
        f"preferences={{path: {tmp_path}, format: pickapic, max_bad_fraction: 0.1}}",
        "curriculum.order=none",
    )
    scanned = scan_preferences(config(*given), with_images=True)
    plan = str(make_plan(config(*given), read_prompts(config(*given), scanned), scanned=scanned))
    where = f"{tmp_path}/a.jsonl"
    for line in (
        "1 prompt contains weights, such as (cat:1.2) or ((cat)): read literally",
        "1 file, 12 rows: 9 with a preference, 1 tied, 1 unlabelled, 1 cannot be read",
        f"tied: {where}:1",
        f"unlabelled: {where}:3",
        f"cannot be read: {where}:5: `caption` must be a non-empty string, got None",
    ):
        assert f"               {line}\n" in plan
    with pytest.raises(PreferenceError, match=r"1 of 12 rows cannot be read, more than .* = 0\.05; fix or remove"):
        read_prompts(config(*given, "preferences.max_bad_fraction=0.05"))


SEARCHED = PromptSplit(PROMPTS.train, PROMPTS.heldout, 30, validation=[f"v{i}" for i in range(5)])
SEARCH = "num_trials: 12, space: {curriculum.num_stages: [1, 2, 4, 6], training.beta: {low: 50, high: 1000, log: true}}"


def search_lines(search: str, *overrides: str) -> list[str]:
    given = ("prompts.validation={source: scenes, count: 5}", f"search={{{search}}}", *overrides)
    lines = make_plan(config(*given), SEARCHED).lines
    return lines[next(i for i, line in enumerate(lines) if line.startswith("  search")) :]


def test_a_search_is_planned_before_it_starts() -> None:
    assert search_lines(SEARCH) == [
        "  search       12 trials by tpe for reward by clip; the first is the paper's schedule",
        "                 curriculum.num_stages: 1, 2, 4, 6",
        "                 training.beta: numbers from 50 to 1000, uniform in the logarithm",
        "               early stopping after stage 1, 2, 4: about one trial in 2 continues;"
        " concurrent trials: as many as fit",
        f"               at most {12 * 6 * 50:,} updates, 300 per trial",
        "  validation   20 images of 5 prompts after each stage",
        f"  confirmation 6 trainings: the best and the paper's schedule with 3 other seeds, at most {6 * 300:,}"
        " updates; half of the held-out prompts choose, half judge",
    ]
    validated = config("prompts.validation={source: scenes, count: 5}")
    assert "96 held out, 5 for validation (of 229; dropped: " in str(make_plan(validated, read_prompts(validated)))
    assert "validation" not in str(make_plan(config(), PROMPTS)) and "search" not in str(make_plan(config(), PROMPTS))


def test_a_searchs_plan_follows_its_settings() -> None:
    others = (
        "updates_per_trial: 160, objectives: [win_rate, diversity], stop_early: null, judge: oracle, early_prompts: 2,"
        " images_per_prompt: 2, confirm_seeds: 0, max_concurrent_trials: 2, algorithm: random, " + SEARCH
    )
    first, *_, stopping, updates, validation, confirmation = search_lines(others)
    assert "trials by random for win_rate by oracle, and diversity; the Pareto front is kept" in first
    assert stopping.strip() == "no early stopping; concurrent trials: 2"
    assert numbers(updates) == [12 * 160, 160]
    assert validation.strip().endswith("10 images of 5 prompts after each stage (before the last stage: 2 prompts)")
    assert confirmation == "  confirmation off, because `search.confirm_seeds` is 0"
    assert search_lines("confirm_seeds: 2, " + SEARCH)[-1].endswith("; no verdict, which needs at least 3 seeds")


def test_the_papers_schedule_counts_as_a_trial_if_it_is_not_in_the_grid() -> None:
    grid = (
        "algorithm: grid, space: {training.beta: [100, 200], curriculum.pacing: [cumulative, sliding_window],"
        " curriculum.window: {choices: [1, 2, 3], when: {curriculum.pacing: sliding_window}}}"
    )
    assert search_lines(grid)[0].startswith(f"  search       up to {2 * (1 + 3)} trials by grid for reward")
    assert search_lines(grid, "curriculum.order=none")[0].startswith("  search       up to 9 trials by grid")


@pytest.mark.parametrize(
    ("stop_early", "num_stages", "stages"),
    [
        ({}, 6, [1, 2, 4]),
        ({}, 4, [1, 2]),
        ({}, 1, []),
        ({"grace_stages": 2}, 9, [2, 4, 8]),
        ({"reduction_factor": 3}, 10, [1, 3, 9]),
        ({"reduction_factor": 1.1}, 4, [1, 2, 3]),
    ],
)
def test_trials_stop_after_stages_at_powers_of_the_reduction_factor(
    stop_early: dict[str, float], num_stages: int, stages: list[int]
) -> None:
    assert StopEarly(**stop_early).stages(num_stages) == stages


ENDPOINT = "endpoint: {url: 'http://localhost:8000/v1', model: m}"


@pytest.mark.parametrize(
    ("options", "per_prompt"),
    [("mode: rating", 8), ("mode: pairwise", 8 * 7), ("mode: pairwise, opponents: 4", 8 * 4), ("mode: yes_no", 8)],
)
def test_the_questions_of_a_vision_language_judge_are_counted(options: str, per_prompt: int) -> None:
    judged = ["rewards=[vlm_judge]", f"rewards.vlm_judge={{{options}, {ENDPOINT}}}", "rewards.noise_prompts=2"]
    line = line_of(str(make_plan(config(*judged), PROMPTS)), "questions")
    counts = [6 * per_prompt, 2 * per_prompt] + ([] if "pairwise" in options else [2 * 4 * 4])
    assert numbers(line.partition(" to http")[0]) == [sum(counts), *counts]
    assert line.endswith("to http://localhost:8000/v1, except for answers that are known")
    assert "questions" not in str(make_plan(config(), PROMPTS))


def test_the_questions_of_a_search_are_those_of_its_base_images_trials_and_confirmation() -> None:
    """10 trials of up to 6 stages: 3 prompts x 2 images after the last one, 2 prompts before it."""
    search = (
        "search={num_trials: 10, images_per_prompt: 2, early_prompts: 2, confirm_seeds: 3,"
        " space: {curriculum.num_stages: [4, 6]}}"
    )
    judged = ["rewards=[vlm_judge]", f"rewards.vlm_judge={{mode: rating, {ENDPOINT}}}"]
    prompts = replace(PROMPTS, validation=["v0", "v1", "v2"])
    plan = str(make_plan(config(*judged, "prompts.validation={source: scenes}", search), prompts))
    counts = [4 * 4 + 3 * 2, 10 * (5 * 2 + 3) * 2, 2 * 3 * 4 * 4]
    assert numbers(line_of(plan, "vlm_judge: at most")) == [sum(counts), *counts]
    assert "by `cdpo tune`" not in str(make_plan(config(*judged), prompts))


def test_questions_of_a_file_are_counted_and_prompts_without_any_are_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    asked = [{"question": "Cats?", "answer": "yes"}]
    rows = [{"prompt": "t0", "questions": asked * 3}, {"prompt": "h1", "questions": asked}]
    path.write_text("\n".join(map(json.dumps, rows)))
    plan = str(make_plan(config("rewards=[vqa]", f"rewards.vqa={{questions: {path}, checkpoint: .}}"), PROMPTS))
    assert numbers(line_of(plan, "questions")) == [3 * 8 + 2 * 4, 3 * 8, 2 * 4]
    assert line_of(plan, "warning: 8 of 10 prompts") == (
        f"               warning: 8 of 10 prompts have no questions in {path}; their images have no score"
    )


def test_validation_prompts_of_a_search_without_questions_are_a_warning_too(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "v0", "questions": [{"question": "Cats?", "answer": "yes"}]}))
    given = (
        "rewards=[vqa]",
        f"rewards.vqa={{questions: {path}, checkpoint: .}}",
        "prompts.validation={source: scenes}",
    )
    search = "search={num_trials: 2, confirm_seeds: 0, space: {training.beta: [100, 200]}}"
    prompts = replace(PROMPTS, validation=["v0", "v1"])
    assert "warning: 11 of 12 prompts have no questions" in str(make_plan(config(*given, search), prompts))
    assert "warning: 10 of 10 prompts have no questions" in str(make_plan(config(*given), prompts))
