"""All steps of a run, on a real local Ray where it is part of the claim: SD1.5's architecture at reduced width."""

import functools
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tiny_models import poisoned

from benchmarks.testbed.measure import load_pipeline
from cdpo_ray.cli import main
from cdpo_ray.config import Config, validate
from cdpo_ray.curriculum.reliability import low_reliability
from cdpo_ray.dataflow.images import decode_png
from cdpo_ray.dataflow.parts import write_part
from cdpo_ray.dataflow.quarantine import Quarantine
from cdpo_ray.errors import CurriculumError, GenerationError, StoreError, TrainingError
from cdpo_ray.evaluation.appearance_columns import add_appearance
from cdpo_ray.evaluation.comparison import Comparer
from cdpo_ray.generation.generator import Sampling
from cdpo_ray.models import load_model
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.randomness.numbers import seed_of
from cdpo_ray.records import PREVIEWS, preview_file, score_file
from cdpo_ray.rewards.score_table import read_scores
from cdpo_ray.rewards.scorer import Scorer
from cdpo_ray.run import round_folders, run_steps, write_reports
from cdpo_ray.steps import STEPS
from cdpo_ray.store import RunFolder, read_shards
from cdpo_ray.testbed import PIPELINE_DIR

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

CDPO = Path(sys.executable).with_name("cdpo")


def make_config(model: Path, folder: Path, name: str = "run", **changes: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder), "seed": 3},
        "prompts": {"train": {"source": "animals", "count": 5}, "heldout": {"source": "scenes", "count": 3}},
        "model": {"path": str(model)},
        "generation": {
            "images_per_prompt": 4,
            "num_denoising_steps": 2,
            "guidance_scale": 2.0,
            "images_per_batch": 4,
        },
        "rewards": {"names": ["jpeg_size"]},
        "curriculum": {"num_stages": 2, "updates_per_stage": 5},
        "training": {
            "beta": 500,
            "learning_rate": 1e-3,
            "global_batch_size": 4,
            "num_workers": 2,
            "empty_prompt_fraction": 0.25,
            "lora": {"rank": 4, "alpha": 8},
        },
        "evaluation": {"images_per_prompt": 2, "judges": ["jpeg_size"], "num_bootstrap_resamples": 200},
    }
    for key, value in changes.items():
        section, _, knob = key.partition("__")
        if not knob:
            values[section] = value
        elif value is None:
            del values[section][knob]
        else:
            values.setdefault(section, {})[knob] = value
    return validate(values, where="test")


def steps_until(verb: str) -> list[Any]:
    verbs = [step.verb for step in STEPS]
    return list(STEPS[: verbs.index(verb) + 1])


@pytest.fixture(scope="module")
def finished(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunFolder]:
    config = make_config(tiny_sd15, tmp_path_factory.mktemp("runs"))
    run = run_steps(config, STEPS)
    write_reports(config)
    return config, run


def pngs(run: RunFolder) -> list[list[bytes]]:
    return read_shards(run.step("1-samples"), ["images"])["images"].to_pylist()


def scores_of(run: RunFolder, reward: str) -> np.ndarray:
    return read_scores(run.step("2-scores") / score_file(reward), reward)[1]


def pairs(run: RunFolder) -> list[dict[str, list[Any]]]:
    return [pq.read_table(path).to_pydict() for path in sorted(run.step("3-stages").glob("stage-*/*.parquet"))]


def lora(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.step("4-training") / "lora" / "pytorch_lora_weights.safetensors")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_every_step_leaves_a_manifest_that_is_true(finished: tuple[Config, RunFolder]) -> None:
    config, run = finished
    for step in STEPS:
        assert run.is_complete(step.folder, step.settings(config), step.fingerprints(config, run))
    assert run.manifest("1-samples")["counts"]["images"] == 20
    assert run.manifest("4-training")["counts"] == {
        "updates": 10,
        "pairs": 40,
        "updates_skipped": 0,
        "preview_images": 9,
    }
    assert (run.path / "report.html").stat().st_size > 10_000


def test_stages_are_sorted_by_difficulty_and_hold_what_training_saw(finished: tuple[Config, RunFolder]) -> None:
    _, run = finished
    scores = scores_of(run, "jpeg_size")
    described = json.loads((run.step("3-stages") / "stages.json").read_text())
    for stage, smallest in ((1, 2), (2, 1)):
        table = pq.read_table(run.step("3-stages") / f"stage-{stage}").to_pydict()
        gaps = table["rank_gap"]
        assert gaps == sorted(gaps, reverse=True)
        assert min(gaps) >= smallest
        assert sorted(table["draw"]) == list(range(20))
        for prompt, chosen, rejected in zip(table["prompt_index"], table["chosen"], table["rejected"], strict=True):
            assert scores[prompt, chosen] > scores[prompt, rejected]
        assert described[stage - 1]["num_drawn_pairs"] == len(gaps) == 20


def test_stages_are_explained_as_they_were_drawn(
    finished: tuple[Config, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = finished
    assert main(["pairs", str(run.path / "config.yaml"), "--explain"]) == 0
    head, *stages, picture = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "stage" and [line.split()[0] for line in stages] == ["1", "2"]
    described = json.loads((run.step("3-stages") / "stages.json").read_text())
    for line, stage in zip(stages, described, strict=True):
        assert str(stage["num_candidate_pairs"]) in line.split() and "20" in line.split()
    assert picture == str(run.path / "stages.png") and (run.path / "stages.png").stat().st_size > 10_000


def test_another_grid_only_writes_the_report_again(finished: tuple[Config, RunFolder]) -> None:
    config, run = finished
    page, made = run.path / "report.html", {step.folder: run.manifest(step.folder)["created"] for step in STEPS}
    for number in (0, config.evaluation.grid_prompts):
        before = page.read_text()
        evaluation = {**config.plain()["evaluation"], "grid_prompts": number}
        changed = validate(config.plain() | {"evaluation": evaluation}, where="test")
        for _ in range(2):
            run_steps(changed, STEPS)
            write_reports(changed)
        assert page.read_text() != before and ("not selected by hand" in page.read_text()) == (number > 0)
    assert {step.folder: run.manifest(step.folder)["created"] for step in STEPS} == made


def test_updates_are_recorded_and_begin_at_ln_2(finished: tuple[Config, RunFolder]) -> None:
    _, run = finished
    updates = [json.loads(line) for line in (run.step("4-training") / "updates.jsonl").read_text().splitlines()]
    assert [update["update"] for update in updates] == list(range(1, 11))
    assert [update["stage"] for update in updates] == [1] * 5 + [2] * 5
    assert updates[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert updates[0]["margin"] == 0
    assert updates[-1]["margin"] != 0


def test_previews_lead_from_the_base_models_image_to_the_one_that_is_evaluated(
    finished: tuple[Config, RunFolder],
) -> None:
    config, run = finished
    named = {name for name in run.manifest("4-training")["files"] if name.startswith(PREVIEWS)}
    assert len(named) == 1 + 3 * (1 + config.curriculum.num_stages)
    rows = pq.read_table(run.step("5-evaluation") / "comparison.parquet").to_pylist()
    for row in (row for row in rows if row["sample_index"] == 0):
        for stage, arm in ((0, "base"), (config.curriculum.num_stages, "tuned")):
            preview = decode_png((run.step("4-training") / preview_file(stage, row["prompt"])).read_bytes())
            judged = decode_png(row[f"{arm}_image"])
            assert np.abs(preview.astype(int) - judged.astype(int)).max() <= 1  # of another batch


@pytest.mark.nightly  # in one process without Ray: tests/training/test_previews.py
def test_the_lora_is_the_same_to_the_bit_without_previews(trained_embedded: RunFolder, embedded: Path) -> None:
    folder = beginning_as(trained_embedded, "no-previews", "1-samples", "2-scores", "3-stages")
    without = {"num_workers": 2, "updates_per_commit": 2, "keep_best": True, "preview_prompts": 0}
    run_steps(embedded_config(embedded, folder.path.parent, "no-previews", **without), steps_until("train"))
    assert largest_difference(lora(folder), lora(trained_embedded)) == 0
    assert not (folder.step("4-training") / PREVIEWS).exists()
    assert (trained_embedded.step("4-training") / PREVIEWS).exists()


def test_lora_loads_into_a_stock_pipeline_and_gives_the_same_images(
    finished: tuple[Config, RunFolder], tiny_sd15: Path
) -> None:
    config, run = finished
    stock = StableDiffusionPipeline.from_pretrained(tiny_sd15, safety_checker=None, requires_safety_checker=False)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    rows = pq.read_table(run.step("5-evaluation") / "comparison.parquet").to_pylist()[:2]
    latents = torch.stack(
        [noise_at((4, 8, 8), config.run.seed, "image", row["prompt"], row["sample_index"]) for row in rows]
    )

    def images() -> np.ndarray:
        prompts = [row["prompt"] for row in rows]
        made = stock(prompts, latents=latents.clone(), num_inference_steps=2, guidance_scale=2.0, output_type="np")
        return (made.images * 255).round().astype(int)

    def kept(column: str) -> np.ndarray:
        return np.stack([np.asarray(Image.open(io.BytesIO(row[column]))) for row in rows]).astype(int)

    assert abs(images() - kept("base_image")).max() <= 1
    stock.load_lora_weights(run.step("4-training") / "lora")
    assert abs(images() - kept("tuned_image")).max() <= 1
    assert abs(kept("tuned_image") - kept("base_image")).max() > 1


def test_second_run_computes_nothing_and_is_quick(finished: tuple[Config, RunFolder], tmp_path: Path) -> None:
    config, run = finished
    written = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file() and path.name[0] != "."}
    (tmp_path / "config.yaml").write_text(json.dumps(config.plain()))
    started = time.monotonic()
    done = subprocess.run([CDPO, "run", tmp_path / "config.yaml"], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 10
    assert done.stderr.count("done already") == len(STEPS) + 1
    now = {path: path.stat().st_mtime_ns for path in written}
    assert {path.name for path in written if now[path] != written[path]} <= {"config.yaml", "status.json"}


def test_images_and_pairs_do_not_depend_on_the_number_of_actors(
    finished: tuple[Config, RunFolder], tiny_sd15: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_sd15, tmp_path, resources__generators={"num_actors": 2})
    run = run_steps(config, steps_until("pairs"))
    assert pngs(run) == pngs(finished[1])
    assert pairs(run) == pairs(finished[1])


def test_generation_goes_on_with_the_parts_that_are_whole_and_makes_only_the_others(
    finished: tuple[Config, RunFolder], tiny_sd15: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_sd15, tmp_path, generation__max_bad_fraction=0.5)
    aside = tmp_path / "run" / "1-samples.partial"
    (aside / "parts").mkdir(parents=True)
    started_with = {"settings": STEPS[0].settings(config), "inputs": {}}
    (aside / "settings.json").write_text(json.dumps(started_with))
    (shard,) = finished[1].step("1-samples").glob("*.parquet")
    rows = pq.read_table(shard)
    marked = rows.set_column(rows.column_names.index("num_tokens_cut"), "num_tokens_cut", pa.array([9] * 5, pa.int64()))
    for row in (0, 1, 3):
        write_part(marked.slice(row, 1), parts_dir=aside / "parts")
    (cut_off,) = (aside / "parts").glob("000000000001-*")
    cut_off.write_bytes(cut_off.read_bytes()[:-9])
    (aside / "parts" / "000000000002.parquet.tmp").write_bytes(b"PAR1")
    run = run_steps(config, steps_until("generate"))
    files = sorted(path.name for path in run.step("1-samples").rglob("*"))
    assert files == ["manifest.json", "samples-000000000000.parquet"]
    made = pq.read_table(run.step("1-samples") / files[1])
    assert made["num_tokens_cut"].to_pylist() == [9, 0, 0, 9, 0], "the marked were not regenerated"
    assert made.drop_columns("num_tokens_cut").equals(rows.drop_columns("num_tokens_cut"))


def test_datasets_opens_the_samples_of_a_run(finished: tuple[Config, RunFolder], tmp_path: Path) -> None:
    files = str(finished[1].step("1-samples") / "*.parquet")
    opened = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    samples = read_shards(finished[1].step("1-samples"), ["prompt", "latents", "images"])
    assert opened["prompt"][:] == samples["prompt"].to_pylist()
    latents = samples["latents"].combine_chunks().to_numpy_ndarray()
    assert np.array_equal(np.array(opened["latents"][:], np.float32).reshape(latents.shape), latents)
    images = opened.cast_column("images", datasets.List(datasets.Image()))["images"][0]
    shown = [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in samples["images"][0].as_py()]
    assert all(np.array_equal(image, png) for image, png in zip(images, shown, strict=True))


def test_evaluation_goes_on_with_the_part_that_is_whole(finished: tuple[Config, RunFolder], tiny_sd15: Path) -> None:
    config, run = finished
    folder = beginning_as(run, "half-evaluated", "1-samples", "2-scores", "3-stages", "4-training")
    half = make_config(tiny_sd15, folder.path.parent, "half-evaluated")
    evaluate = STEPS[-1]
    aside = folder.path / f"{evaluate.folder}.partial"
    (aside / "parts").mkdir(parents=True)
    started_with = {"settings": evaluate.settings(half), "inputs": evaluate.fingerprints(half, folder)}
    (aside / "settings.json").write_text(json.dumps(started_with))
    comparer = Comparer(
        "stable_diffusion",
        {"path": str(tiny_sd15)},
        Sampling(3, 2, 2, 2.0, None, None, 4),
        training_dir=run.step("4-training"),
        make_scores=functools.partial(Scorer, {"jpeg_size": {"quality": 90}}),
        num_margin_draws=config.evaluation.num_margin_draws,
        quarantine=Quarantine(aside, 3, 0.0),
    )
    table = pq.read_table(run.step("5-evaluation") / "comparison.parquet")
    prompts = pa.table({name: table[name].take(pa.array([0, 2])) for name in ("prompt_index", "prompt_id", "prompt")})
    made = add_appearance(comparer(prompts))
    marked = made.set_column(made.column_names.index("base_diversity"), "base_diversity", pa.array([99.0, 99.0]))
    write_part(marked, parts_dir=aside / "parts")
    run_steps(half, STEPS)
    assert pq.read_table(folder.step("5-evaluation") / "comparison.parquet").equals(table)
    diversity = json.loads((folder.step("5-evaluation") / "metrics.json").read_text())["diversity"]["base"]
    assert 66 < diversity["mean"] < 67, "the part was not regenerated"
    assert sorted(path.name for path in folder.step("5-evaluation").iterdir()) == [
        "comparison.parquet",
        "manifest.json",
        "metrics.json",
    ]


@pytest.mark.nightly
def test_fault_07_a_poison_prompt_costs_itself_alone_on_the_whole_way(tiny_sd15: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na zebra\na dog\na lizard\na fox\n")
    config = make_config(
        poisoned(tiny_sd15, tmp_path / "no_z", letter="z"),
        tmp_path,
        prompts={
            "train": {"source": str(tmp_path / "prompts.txt")},
            "heldout": {"source": "animal_photos", "count": 7},  # the sixth is a zebra
        },
        generation__max_bad_fraction=0.5,
        generation__images_per_batch=8,  # two prompts per call
        curriculum__updates_per_stage=1,
    )
    run = run_steps(config, STEPS)
    write_reports(config)
    manifest = run.manifest("1-samples")
    assert manifest["counts"]["prompts_set_aside"] == 2 and manifest["counts"]["prompts"] == 3
    assert "2 prompts failed in the model; see set_aside.jsonl for each error" in manifest["warnings"]
    entries = [json.loads(line) for line in (run.step("1-samples") / "set_aside.jsonl").read_text().splitlines()]
    assert [(entry["prompt_index"], entry["prompt"]) for entry in entries] == [(1, "a zebra"), (3, "a lizard")]
    assert read_shards(run.step("1-samples"), ["prompt_index"])["prompt_index"].to_pylist() == [0, 2, 4]
    assert {index for stage in pairs(run) for index in stage["prompt_index"]} <= {0, 2, 4}
    assert run.manifest("5-evaluation")["counts"]["prompts_set_aside"] == 1
    judged = pq.read_table(run.step("5-evaluation") / "comparison.parquet")["prompt_index"].unique().to_pylist()
    assert judged == [0, 1, 2, 3, 4, 6]
    strict = make_config(Path(config.model.path), tmp_path, "strict", prompts=config.prompts.model_dump())
    with pytest.raises(GenerationError, match=r"1 of 5 prompts .* `generation.max_bad_fraction` = 0.01.* 'a zebra'"):
        run_steps(strict, steps_until("generate"))


@pytest.fixture(scope="module")
def trained_embedded(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Ten updates of a net that has learnt; a random one has gradients of pure rounding, which Adam enlarges."""
    often = {"updates_per_commit": 2, "keep_best": True}
    config = embedded_config(embedded, tmp_path_factory.mktemp("embedded"), "run", num_workers=2, **often)
    return run_steps(config, steps_until("train"))


def test_the_best_adapter_is_that_of_the_commit_with_the_lowest_loss_of_the_last_stage(
    trained_embedded: RunFolder,
) -> None:
    folder = trained_embedded.step("4-training")
    updates = [json.loads(line) for line in (folder / "updates.jsonl").read_text().splitlines()]
    losses = {last: [update["loss"] for update in updates if first <= update["update"] <= last]
              for first, last in ((6, 6), (7, 8), (9, 10))}  # fmt: skip
    means = {last: float(np.mean(few)) for last, few in losses.items()}
    best = json.loads((folder / "best" / "best.json").read_text())
    assert best["stage"] == 2 and best["update"] == min(means, key=means.__getitem__)
    assert best["loss"] == pytest.approx(means[best["update"]])
    kept = load_file(folder / "best" / "lora" / "pytorch_lora_weights.safetensors")
    assert (largest_difference(kept, lora(trained_embedded)) == 0) == (best["update"] == 10)
    assert not (folder / "commits").exists()


def embedded_config(embedded: Path, folder: Path, name: str, *, rounds: int = 1, **training: Any) -> Config:
    changes: dict[str, Any] = {f"training__{key}": value for key, value in training.items()}
    return make_config(
        embedded,
        folder,
        name,
        prompts__train={"source": "scenes", "count": 8},
        prompts__heldout={"source": "animals", "count": 8},
        generation__guidance_scale=1.0,
        training__beta=200,
        training__empty_prompt_fraction=0.1,
        rounds=rounds,
        **({"training__lora": None} if training.get("method") == "full" else {}),
        **{"training__learning_rate": 5e-4, **changes},
    )


@pytest.mark.nightly  # in one process without Ray: tests/training/test_loop.py
def test_fault_63_an_alarm_ends_training_with_the_last_healthy_lora_and_the_report_says_so(
    embedded: Path, tmp_path: Path
) -> None:
    """The first update has no rise, because the policy is the reference; a large learning rate raises the error."""
    health = {"max_error_rise": 1e-9, "window": 1, "on_alarm": "stop"}
    config = embedded_config(embedded, tmp_path, "stopped", learning_rate=1e-2, ema_decay=0.5, health=health)
    run = run_steps(config, STEPS)
    write_reports(config)
    manifest, (*_, last) = run.manifest("4-training"), updates_of(run)
    number = int(last["update"])
    assert manifest["counts"]["updates"] == number < 10
    assert json.loads((run.step("4-training") / "stages.json").read_text())[-1]["is_stopped"]
    sentence = f"Training stopped after update {number} of 10; the result is the LoRA after {number - 1}"
    assert manifest["warnings"] == [manifest["details"]["health"]["alarm"]] and sentence in manifest["warnings"][0]
    assert sentence in (run.path / "report.html").read_text()
    weights = lora(run)
    assert all(value.isfinite().all() for value in weights.values())
    assert max(float(value.abs().max()) for name, value in weights.items() if ".lora_B." in name or ".up." in name) > 0
    run_steps(config, STEPS)
    assert run.manifest("4-training")["created"] == manifest["created"]


def updates_of(run: RunFolder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.step("4-training") / "updates.jsonl").read_text().splitlines()]


def beginning_as(run: RunFolder, name: str, *steps: str) -> RunFolder:
    """A run beside another, which finds these of its steps done."""
    folder = RunFolder(run.path.parent / name)
    folder.path.mkdir()
    for step in steps:
        (folder.path / step).symlink_to(run.step(step).resolve())
    return folder


@pytest.mark.nightly  # in processes without Ray: tests/training/test_engine.py
@pytest.mark.parametrize(
    ("training", "tolerance"),
    [
        ({"num_workers": 1, "batch_size_per_worker": 2}, 1e-5),
        ({"num_workers": 2, "zero_stage": 3}, 5e-5),  # flattens before it adds up
    ],
    ids=lambda value: "-".join(f"{key}-{item}" for key, item in value.items()) if isinstance(value, dict) else "",
)
def test_adapter_does_not_depend_on_workers_accumulation_or_zero(
    training: dict[str, Any], tolerance: float, trained_embedded: RunFolder, embedded: Path
) -> None:
    """The same samples and pairs, ten updates in fp32."""
    name = "-".join(map(str, training.values()))
    folder = beginning_as(trained_embedded, name, "1-samples", "2-scores", "3-stages")
    run_steps(embedded_config(embedded, folder.path.parent, name, **training), steps_until("train"))
    assert largest_difference(lora(folder), lora(trained_embedded)) < tolerance
    assert max(float(value.abs().max()) for key, value in lora(folder).items() if "lora_B" in key) > 1e-3


@pytest.mark.slow
@pytest.mark.nightly
def test_a_lora_grows_alike_with_and_without_zero(trained_embedded: RunFolder, embedded: Path) -> None:
    growing = {"rank": 4, "alpha": 8, "initial_rank": 2, "unfreeze": "from_input"}
    grown = {}
    for zero_stage in (0, 3):
        folder = beginning_as(trained_embedded, f"growing-{zero_stage}", "1-samples", "2-scores", "3-stages")
        training = {"lora": growing, "num_workers": 2, "zero_stage": zero_stage}
        run_steps(embedded_config(embedded, folder.path.parent, folder.path.name, **training), steps_until("train"))
        grown[zero_stage] = lora(folder)
    for name, value in ((name, value) for name, value in grown[0].items() if "lora_B" in name):
        assert value.abs().amax(dim=0).min() > 1e-5, f"every column of {name} has learnt in the end"
    assert largest_difference(grown[3], grown[0]) < 5e-5
    assert largest_difference(grown[0], lora(trained_embedded)) > 1e-3, "which is not what a constant rank gives"


def test_scores_do_not_depend_on_where_judges_stand(
    finished: tuple[Config, RunFolder], tiny_sd15: Path, tmp_path: Path
) -> None:
    expected = pq.read_table(finished[1].step("2-scores") / "jpeg_size.parquet")
    pool = run_steps(make_config(tiny_sd15, tmp_path, "pool", rewards__placement="pool"), steps_until("score"))
    assert pq.read_table(pool.step("2-scores") / "jpeg_size.parquet").equals(expected)
    assert pngs(pool) == pngs(finished[1])


def test_another_reward_joins_a_run_and_ranks_another_without_generating_even_if_no_image_was_kept(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    def config_of(*names: str, **rewards: Any) -> Config:
        rewards = {"names": [*names], **rewards}
        return make_config(tiny_sd15, tmp_path, generation__keep_images=False, rewards=rewards)

    run = run_steps(config_of("jpeg_size"), steps_until("pairs"))
    assert "images" not in pq.read_schema(next(run.step("1-samples").glob("*.parquet"))).names
    made = {step: run.fingerprint(step) for step in ("1-samples", "3-stages")}
    first = scores_of(run, "jpeg_size")
    more = config_of("jpeg_size", "own_rewards:noisy", noise_prompts=3)
    run_steps(more, [step for step in STEPS if step.verb == "score"])
    assert run.manifest("2-scores")["counts"]["scores_computed_now"] == 20 + 2 * 3 * 4
    run_steps(config_of("jpeg_size"), steps_until("pairs"))
    assert {step: run.fingerprint(step) for step in made} == made
    assert (scores_of(run, "jpeg_size") == first).all()
    noise = run.manifest("2-scores")["details"]
    assert noise["noise_jpeg_size"] == 0
    assert 0.4e-3 < noise["noise_own_rewards:noisy"] < 2e-3  # a thousandth, as 12 differences tell it
    with pytest.raises(StoreError, match=r"2-scores was made with `rewards.jpeg_size.quality` = 90, config says 50"):
        run_steps(config_of("jpeg_size", jpeg_size={"quality": 50}), steps_until("score"))

    changes = {
        "rewards": {**more.rewards.model_dump(), "rank_by": "own_rewards:noisy"},
        "generation__keep_images": False,
    }
    other = make_config(tiny_sd15, tmp_path, "other", run__samples_from=str(run.path), **changes)
    reranked = run_steps(other, steps_until("pairs"))
    assert reranked.fingerprint("1-samples") == made["1-samples"]
    assert reranked.manifest("2-scores")["counts"]["scores_computed_now"] == 0
    marked = [pair for stage in pairs(reranked) for pair in zip(stage["score_gap"], stage["within_noise"], strict=True)]
    (gap_noise,) = {stage["gap_noise"] for stage in json.loads((reranked.step("3-stages") / "stages.json").read_text())}
    assert gap_noise > 0 and all(within == (gap <= gap_noise) for gap, within in marked)
    assert reranked.manifest("3-stages")["counts"]["pairs_drawn_within_noise"] == sum(within for _, within in marked)


def test_changed_setting_is_refused_with_the_difference(finished: tuple[Config, RunFolder], tiny_sd15: Path) -> None:
    config, _ = finished
    changed = make_config(tiny_sd15, Path(config.run.dir), training__beta=100)
    with pytest.raises(StoreError, match=r"4-training was made with `training.beta` = 500.0, config says 100.0"):
        run_steps(changed, STEPS)


def test_fault_19_scores_that_are_all_equal_name_the_stage(tiny_sd15: Path, tmp_path: Path) -> None:
    config = make_config(tiny_sd15, tmp_path, rewards__names=["own_rewards:same"])
    with pytest.raises(CurriculumError, match=r"stage 1 admits no pair: the scores of a prompt differ by at most 0 "):
        run_steps(config, steps_until("pairs"))
    assert not (tmp_path / "run" / "3-stages").exists()


def test_a_command_whose_reward_raises_names_it_in_one_line_and_leaves_no_samples_behind(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_sd15, tmp_path, rewards__names=["own_rewards:broken"])
    (tmp_path / "config.yaml").write_text(json.dumps(config.plain()))
    command = [CDPO, "run", tmp_path / "config.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RewardError: reward `own_rewards:broken` raised KeyError: 'no such thing' at ")
    assert "own_rewards.py:" in last and done.stdout == ""
    assert not (tmp_path / "run" / "1-samples").exists()


def test_fault_10_missing_scores_form_no_pair_and_too_many_stop_the_run(tiny_sd15: Path, tmp_path: Path) -> None:
    names = ["own_rewards:sometimes_missing"]
    config = make_config(tiny_sd15, tmp_path, rewards__names=names)
    with pytest.raises(CurriculumError, match=r"5 of 20 scores are not finite, more than `rewards.max_bad_fraction`"):
        run_steps(config, steps_until("pairs"))
    lenient = make_config(tiny_sd15, tmp_path, rewards__names=names, rewards__max_bad_fraction=0.5)
    run = run_steps(lenient, steps_until("pairs"))
    assert run.manifest("3-stages")["counts"]["scores_not_finite"] == 5
    bad = pq.read_table(run.step("3-stages") / "stage-2").to_pydict()
    assert 0 not in bad["chosen"] + bad["rejected"]


def test_a_users_own_reward_measure_and_loss_run_by_name_alone(tiny_sd15: Path, tmp_path: Path) -> None:
    def config_of(gamma: float) -> Config:
        return make_config(
            tiny_sd15,
            tmp_path,
            "own",
            rewards__names=["own_objectives:redness"],
            curriculum__measure="own_objectives:distance_of_indices",
            curriculum__pacing="one_stage",
            training__loss={"name": "own_objectives:focal_dpo", "options": {"gamma": gamma}},
            training__num_workers=1,
        )

    config = config_of(2.0)
    run = run_steps(config, steps_until("train"))
    images = [np.asarray(Image.open(io.BytesIO(png)), dtype=float) for row in pngs(run) for png in row]
    expected = [image[..., 0].mean() - image[..., 1:].mean() for image in images]
    np.testing.assert_allclose(scores_of(run, "own_objectives:redness").ravel(), expected)
    easy, hard = (np.abs(np.subtract(stage["chosen"], stage["rejected"])) for stage in pairs(run))
    assert ({*easy}, {*hard}) == ({3}, {1, 2}), "distances 1 to 3 of 4 images, cut above the middle"
    first = json.loads((run.step("4-training") / "updates.jsonl").read_text().split("\n")[0])
    assert first["loss"] == pytest.approx(0.25 * np.log(2)), "gamma 2 at margin 0"
    settings = run.manifest("4-training")["settings"]
    assert len(settings["training.loss.sha256"]) == 64
    assert len(run.manifest("3-stages")["settings"]["curriculum.measure.sha256"]) == 64
    with pytest.raises(
        StoreError, match=r"4-training was made with `training.loss.options.gamma` = 2.0, config says 1"
    ):
        run_steps(config_of(1.0), steps_until("train"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"curriculum__measure": "own_objectives:no"}, CurriculumError, r"^measure `own_objectives:no`: cannot be imp"),
        (
            {"training__loss": "no_such_module:f"},
            TrainingError,
            r"^loss `no_such_module:f`: cannot be imported: No mod",
        ),
    ],
)
def test_a_missing_measure_or_loss_is_reported_before_an_image_is_generated(
    changes: dict[str, str], error: type[Exception], message: str, tiny_sd15: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run_steps(make_config(tiny_sd15, tmp_path, **changes), STEPS)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def two_rounds(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[RunFolder]]:
    """Held to the round before: the second starts where the first ended."""
    config = embedded_config(
        embedded,
        tmp_path_factory.mktemp("rounds"),
        "rounds",
        num_workers=1,
        reference="last_round",
        rounds=2,
    )
    run_steps(config, STEPS)
    write_reports(config)
    return config, round_folders(config)


def test_each_round_has_its_folder_its_images_and_its_report(two_rounds: tuple[Config, list[RunFolder]]) -> None:
    _, (first, second) = two_rounds
    assert (first.path.name, second.path.name) == ("round-1", "round-2")
    assert pngs(first) != pngs(second)
    for run in (first, second):
        assert (run.path / "report.html").stat().st_size > 10_000
        assert run.manifest("4-training")["counts"]["updates"] == 10
    assert second.manifest("1-samples")["inputs"] == {"the round before": first.fingerprint("4-training")}


def test_a_round_is_sampled_from_the_adapter_of_the_round_before(two_rounds: tuple[Config, list[RunFolder]]) -> None:
    config, (first, second) = two_rounds
    row = read_shards(second.step("1-samples"), ["prompt", "latents"]).slice(0, 1)
    prompt, kept = row["prompt"][0].as_py(), row["latents"].combine_chunks().to_numpy_ndarray()[0]
    model = load_model("stable_diffusion", path="embedded", device="cpu")
    model.load_tuned(first.step("4-training"))
    seed = seed_of(config.run.seed, "round", 2)
    noise = torch.stack([noise_at((4, 8, 8), seed, "image", prompt, index) for index in range(4)])
    conditioning, _ = model.encode_prompts([prompt] * 4)
    expected = model.sample(conditioning, noise, num_denoising_steps=2, guidance_scale=1.0)
    np.testing.assert_allclose(kept, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_held_to_the_round_before_each_round_begins_at_ln_2_and_goes_on_from_its_weights(
    two_rounds: tuple[Config, list[RunFolder]],
) -> None:
    _, (first, second) = two_rounds
    for run in (first, second):
        update = json.loads((run.step("4-training") / "updates.jsonl").read_text().splitlines()[0])
        assert update["margin"] == pytest.approx(0, abs=1e-5)
        assert update["loss"] == pytest.approx(np.log(2), abs=1e-5)
    moved = largest_difference(lora(first), lora(second))
    assert 0 < moved < 0.02  # ten updates of 5e-4; two independent first factors would differ by some 0.5


def test_later_rounds_are_judged_on_the_same_noise_as_the_first(two_rounds: tuple[Config, list[RunFolder]]) -> None:
    _, runs = two_rounds
    columns = ["prompt_id", "sample_index", "base_image"]
    first, second = (pq.read_table(run.step("5-evaluation") / "comparison.parquet", columns=columns) for run in runs)
    assert first.equals(second)


def test_a_verb_alone_does_not_begin_a_round_before_the_last_is_trained(embedded: Path, tmp_path: Path) -> None:
    config = embedded_config(embedded, tmp_path, "alone", rounds=2)
    assert run_steps(config, steps_until("generate")).path.name == "round-1"
    assert not (tmp_path / "alone" / "round-2").exists()


@pytest.fixture(scope="module")
def trained_whole(trained_embedded: RunFolder, embedded: Path) -> tuple[Config, RunFolder]:
    folder = beginning_as(trained_embedded, "full", "1-samples", "2-scores", "3-stages")
    config = embedded_config(embedded, folder.path.parent, "full", method="full", num_workers=2, learning_rate=1e-5)
    return config, run_steps(config, STEPS)


def unet(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.step("4-training") / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.nightly
def test_the_whole_net_trained_loads_into_a_stock_pipeline_and_makes_the_images_that_were_judged(
    trained_whole: tuple[Config, RunFolder],
) -> None:
    config, run = trained_whole
    stock = load_pipeline(PIPELINE_DIR)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    stock.unet = UNet2DConditionModel.from_pretrained(run.step("4-training"), subfolder="unet")
    rows = pq.read_table(run.step("5-evaluation") / "comparison.parquet").to_pylist()[:2]
    noise = torch.stack(
        [noise_at((4, 8, 8), config.run.seed, "image", row["prompt"], row["sample_index"]) for row in rows]
    )
    prompts = [row["prompt"] for row in rows]
    made = stock(prompts, latents=noise, num_inference_steps=2, guidance_scale=1.0, output_type="np").images
    kept = np.stack([np.asarray(Image.open(io.BytesIO(row["tuned_image"]))) for row in rows]).astype(int)
    assert abs((made * 255).round().astype(int) - kept).max() <= 1
    assert not any(row["tuned_image"] == row["base_image"] for row in rows)


@pytest.mark.nightly
def test_the_whole_net_does_not_depend_on_workers_or_zero(
    trained_whole: tuple[Config, RunFolder], embedded: Path
) -> None:
    _, whole = trained_whole
    folder = beginning_as(whole, "zero-3", "1-samples", "2-scores", "3-stages")
    config = embedded_config(
        embedded, folder.path.parent, "zero-3", method="full", learning_rate=1e-5, num_workers=1, zero_stage=3
    )
    run_steps(config, steps_until("train"))
    assert largest_difference(unet(folder), unet(whole)) < 2e-6
    base = load_file(embedded / "unet" / "diffusion_pytorch_model.safetensors")
    assert largest_difference({name: value.float() for name, value in base.items()}, unet(whole)) > 5e-5


def trained_by_margin(num_workers: int, trained_embedded: RunFolder, embedded: Path) -> RunFolder:
    name = f"margin-{num_workers}"
    changes = {"measure": "margin", "boundaries": "equal_count", "pacing": "one_stage"}
    config = embedded_config(embedded, trained_embedded.path.parent, name, num_workers=num_workers)
    curriculum = {**config.curriculum.model_dump(exclude={"preset", "window", "num_margin_draws"}), **changes}
    config = validate({**config.plain(), "curriculum": curriculum}, where="test")
    folder = beginning_as(trained_embedded, name, "1-samples", "2-scores")
    run_steps(config, steps_until("train"))
    return folder


def pairs_of_stages(folder: RunFolder) -> list[dict[str, Any]]:
    return [stage["pairs"] for stage in json.loads((folder.step("4-training") / "stages.json").read_text())]


@pytest.fixture(scope="module")
def by_margin(trained_embedded: RunFolder, embedded: Path) -> RunFolder:
    return trained_by_margin(1, trained_embedded, embedded)


def test_with_margin_as_difficulty_each_stage_is_redrawn_by_the_margins_of_the_policy(by_margin: RunFolder) -> None:
    folder = by_margin
    planned = json.loads((folder.step("3-stages") / "stages.json").read_text())
    drawn = pairs_of_stages(folder)
    assert drawn[0]["drawn_by_rank_gap"] == planned[0]["drawn_by_rank_gap"]  # every margin is still zero
    assert drawn[1]["drawn_by_rank_gap"] != planned[1]["drawn_by_rank_gap"]
    assert drawn[1]["num_drawn_pairs"] == planned[1]["num_drawn_pairs"] == 20
    reliability = drawn[1]["margin_reliability"]
    assert drawn[0]["margin_reliability"] is None and 0 < reliability < 1
    expected = [warning] if (warning := low_reliability(2, reliability, 16)) else []
    assert folder.manifest("4-training")["warnings"] == expected


@pytest.mark.nightly
def test_with_margin_as_difficulty_two_workers_draw_and_train_like_one(
    by_margin: RunFolder, trained_embedded: RunFolder, embedded: Path
) -> None:
    folder = trained_by_margin(2, trained_embedded, embedded)
    assert pairs_of_stages(folder) == pairs_of_stages(by_margin)
    assert largest_difference(lora(folder), lora(by_margin)) < 2e-5


@pytest.mark.parametrize("placement", [pytest.param("fused", marks=pytest.mark.nightly), "pool"])
def test_images_ranked_by_how_much_of_their_prompt_was_masked_need_no_judge(
    placement: str, tiny_sd15: Path, tmp_path: Path
) -> None:
    names = ["perturbation"] if placement == "fused" else ["jpeg_size", "perturbation"]
    config = make_config(
        tiny_sd15, tmp_path, rewards__names=names, rewards__rank_by="perturbation", rewards__placement=placement
    )
    run = run_steps(config, steps_until("pairs"))
    assert run.manifest("2-scores")["counts"]["scores_computed_now"] == 0
    assert scores_of(run, "perturbation").tolist() == [[0, -23 / 77, -46 / 77, -69 / 77]] * 5
    pairs = pq.read_table(run.step("3-stages") / "stage-2").to_pydict()
    assert all(chosen < rejected for chosen, rejected in zip(pairs["chosen"], pairs["rejected"], strict=True))
