"""`open_run`: values as the files hold them, and errors that say what to do."""

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from finished_runs import change, config_of, judged, policy_of, save_policy, write_run
from PIL import Image

from cdpo_ray import Run, open_run
from cdpo_ray.config import Config
from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.errors import StoreError
from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.progress.status import run_status
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.records import EVALUATION, SAMPLES, SCORES, STAGES, TRAINING
from cdpo_ray.store import copy_tree, describe, fingerprint_of

PROMPTS = ["a cat", "a dog", "<b>a fox</b>\x1b[31m"]
NUM_IMAGES = 2
METRICS = {"judges": {"clip": judged(0.5, 0.6)}, "num_prompts": 3, "images_per_prompt": NUM_IMAGES}
UPDATES = [
    {"update": number, "stage": 1 + number // 2, "loss": 0.7 / (number + 1), "margin": 0.1 * number}
    | dict.fromkeys(("implicit_accuracy", "policy_error_w", "policy_error_l"), 0.5)
    | dict.fromkeys(("reference_error_w", "reference_error_l"), 0.25)
    for number in range(3)
]


def png(shade: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (shade, 0, 255 - shade)).save(buffer, "PNG")
    return buffer.getvalue()


def shade_of(image: Image.Image) -> int:
    """The shade that `png` was given."""
    [(_, (red, _, blue))] = image.getcolors()
    assert red + blue == 255
    return red


def samples(indices: list[int], *, with_images: bool) -> pa.Table:
    latents = np.zeros((len(indices) * NUM_IMAGES, 4, 1, 1), np.float32)
    columns = {
        "prompt_index": indices,
        "prompt_id": [f"id{index}" for index in indices],
        "prompt": [PROMPTS[index] for index in indices],
        "latents": tensor_column(latents, NUM_IMAGES),
        "num_tokens_cut": indices,
        "score_clip": [[0.0] * NUM_IMAGES for _ in indices],
    }
    if with_images:
        columns["images"] = [[png(10 * index + image) for image in range(NUM_IMAGES)] for index in indices]
    return pa.table(columns)


def score_table(reward: str, values: list[float]) -> pa.Table:
    places = [(index, image) for index in reversed(range(len(PROMPTS))) for image in range(NUM_IMAGES)]
    return pa.table(
        {
            "prompt_index": [index for index, _ in places],
            "prompt_id": [f"id{index}" for index, _ in places],
            "sample_index": [image for _, image in places],
            f"score_{reward}": values,
        }
    )


def pair_table(stage: int, draws: list[int]) -> pa.Table:
    return pa.table(
        {
            "stage": [stage] * len(draws),
            "draw": draws,
            "prompt_index": draws,
            "chosen": [1] * len(draws),
            "rejected": [0] * len(draws),
            "rank_gap": [3 - stage] * len(draws),
            "score_gap": [0.5] * len(draws),
            "within_noise": pa.nulls(len(draws), pa.bool_()),
        }
    )


def comparison() -> pa.Table:
    places = [(index, image) for image in range(NUM_IMAGES) for index in range(len(PROMPTS))]  # not in order
    return pa.table(
        {
            "prompt_index": [index for index, _ in places],
            "prompt_id": [f"id{index}" for index, _ in places],
            "prompt": [PROMPTS[index] for index, _ in places],
            "sample_index": [image for _, image in places],
            "base_image": [png(10 * index + image) for index, image in places],
            "tuned_image": [png(100 + 10 * index + image) for index, image in places],
            "base_score_clip": [index + image / 10 for index, image in places],
            "tuned_score_clip": [index + image / 10 + 0.5 for index, image in places],
        }
    )


def contents(*, with_images: bool = True) -> Callable[[str, Path], None]:
    """Writes the files of every step."""

    def write(step: str, folder: Path) -> None:
        if step == SAMPLES:
            for number, indices in enumerate(([1, 0], [2])):
                table = samples(indices, with_images=with_images)
                table = table.replace_schema_metadata({"pandas": '{"index_columns": ["prompt"]}'})
                pq.write_table(table, folder / f"samples-{number:06d}.parquet")
        elif step == SCORES:
            (folder / "second").mkdir()
            for name, reward, values in (
                ("clip", "clip", [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]),
                ("own.judge:score", "own.judge:score", [50.0, np.nan, 30.0, 20.0, 10.0, 0.0]),
                ("second/clip", "clip", [-1.0] * 6),
            ):
                pq.write_table(score_table(reward, values), folder / f"{name}.parquet")
        elif step == STAGES:
            for stage, draws in ((1, [1, 0]), (2, [0, 2])):
                (folder / f"stage-{stage}").mkdir()
                pq.write_table(pair_table(stage, draws), folder / f"stage-{stage}" / "pairs-000000.parquet")
            pq.write_table(pa.table({"prompt_index": [0]}), folder / "prompts-1.parquet")
        elif step == TRAINING:
            (folder / "updates.jsonl").write_text("".join(f"{json.dumps(update)}\n" for update in UPDATES))
        else:
            pq.write_table(comparison(), folder / "comparison.parquet")

    return write


def finished(folder: Path, *, with_images: bool = True) -> Path:
    """Folder of a run with all files of `contents`."""
    config = config_of(folder, "embedded")
    write_run(config, lambda number, training_dir: None, lambda number: METRICS, contents(with_images=with_images))
    return folder / "tuned"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def run(run_dir: Path) -> Run:
    return open_run(run_dir)


@pytest.fixture
def copied(run_dir: Path, tmp_path: Path) -> Path:
    """Folder of a copy that the test may change."""
    return shutil.copytree(run_dir, tmp_path / "tuned")


def test_samples_are_the_prompts_of_all_shards_in_order_without_tensors(run: Run) -> None:
    expected = {"prompt_index": [0, 1, 2], "prompt_id": ["id0", "id1", "id2"], "prompt": PROMPTS}
    assert run.samples.to_dict("list") == expected | {"num_tokens_cut": [0, 1, 2]}


def test_scores_have_one_column_per_reward_and_nan_where_one_is_missing(run: Run) -> None:
    scores = run.scores
    assert [*scores] == ["prompt_index", "prompt_id", "sample_index", "clip", "own.judge:score"]
    assert scores["prompt_index"].tolist() == [0, 0, 1, 1, 2, 2]
    assert scores["sample_index"].tolist() == [0, 1] * 3
    assert scores["clip"].tolist() == [1.0, 0.0, 3.0, 2.0, 5.0, 4.0], "the first scores, not the second"
    np.testing.assert_equal(scores["own.judge:score"].to_numpy(), [10, 0, 30, 20, 50, np.nan])


def test_pairs_are_in_training_order_over_all_stages(run: Run) -> None:
    pairs = run.pairs
    assert list(zip(pairs["stage"], pairs["draw"], pairs["rank_gap"], strict=True)) == [
        (1, 0, 2),
        (1, 1, 2),
        (2, 0, 1),
        (2, 2, 1),
    ]
    assert pairs["within_noise"].isna().all()


def test_updates_and_metrics_are_those_of_the_files(run: Run) -> None:
    assert run.updates.to_dict("records") == UPDATES
    assert run.metrics == METRICS


def test_the_comparison_is_in_order_and_without_images(run: Run) -> None:
    rows = run.comparison
    assert not [name for name in rows if name.endswith("_image")]
    assert rows["prompt"].tolist() == [prompt for prompt in PROMPTS for _ in range(NUM_IMAGES)]
    assert rows["base_score_clip"].tolist() == pytest.approx([0, 0.1, 1, 1.1, 2, 2.1])
    assert (rows["tuned_score_clip"] - rows["base_score_clip"]).tolist() == pytest.approx([0.5] * 6)


def test_images_are_those_of_the_prompt_in_sample_order(run: Run) -> None:
    assert [[shade_of(image) for image in run.images(index)] for index in range(3)] == [[0, 1], [10, 11], [20, 21]]
    assert [(shade_of(base), shade_of(tuned)) for base, tuned in run.before_after(2)] == [(20, 120), (21, 121)]


@pytest.mark.parametrize("read", [Run.images, Run.before_after])
def test_an_unknown_prompt_is_named(run: Run, read: Callable[[Run, int], Any]) -> None:
    with pytest.raises(ValueError, match=r"`prompt_index` 3: .* has no such prompt; see `"):
        read(run, 3)


def test_images_that_were_not_kept_name_the_key_that_keeps_them(tmp_path: Path) -> None:
    run = open_run(finished(tmp_path, with_images=False))
    with pytest.raises(StoreError, match=r"1-samples: holds latents but no images; `generation.keep_images: true`"):
        run.images(0)
    assert run.dataset("samples").column_names == ["prompt_index", "prompt_id", "prompt", "num_tokens_cut"]


def test_the_grid_has_a_row_per_model_and_a_column_per_noise(run: Run) -> None:
    grid = np.asarray(run.grid(num_prompts=2))
    shades = [
        int(red)
        for red, green, blue in grid.reshape(-1, 3)
        if green == 0 and int(red) + int(blue) == 255  # no pixel of text or background
    ]
    assert sorted(set(shades)) == [0, 1, 10, 11, 100, 101, 110, 111]
    rows = [[*dict.fromkeys(row[(row[:, 1] == 0) & (row[:, 0] != row[:, 2])][:, 0].tolist())] for row in grid]
    found = [row for row in rows if len(row) == NUM_IMAGES]
    assert [*dict.fromkeys(map(tuple, found))] == [(0, 1), (100, 101), (10, 11), (110, 111)]
    assert shades.count(0) == 128**2, "small images are enlarged"
    with pytest.raises(ValueError, match=r"`num_prompts` must be >= 1, got 0"):
        run.grid(0)


def test_the_configuration_is_validated_and_the_status_is_that_of_the_command_line(
    tmp_path: Path, copied: Path
) -> None:
    folder = copied
    with pytest.raises(StoreError, match=r"config.yaml: is missing"):
        _ = open_run(folder).config
    config = config_of(tmp_path, "embedded")
    (folder / "config.yaml").write_text(json.dumps(config.plain()))
    run = open_run(str(folder))
    assert run.config == config
    assert isinstance(run.config, Config)
    assert run.status == run_status(folder).text
    (folder / "config.yaml").write_text(json.dumps(config.plain() | {"curriculum": {"num_stages": 7}}))
    with pytest.raises(StoreError, match=r"`curriculum.num_stages` was 3, the file says 7"):
        _ = open_run(folder).config


@pytest.mark.parametrize(
    ("missing", "read", "commands"),
    [
        (SAMPLES, "samples", "`generate` is not finished; `cdpo generate CONFIG` or `cdpo import CONFIG` finishes it"),
        (SCORES, "scores", "`score` is not finished; `cdpo score CONFIG` finishes it"),
        (STAGES, "pairs", "`pairs` is not finished; `cdpo pairs CONFIG` finishes it"),
        (TRAINING, "updates", "`train` is not finished; `cdpo train CONFIG` finishes it"),
        (EVALUATION, "metrics", "`evaluate` is not finished; `cdpo evaluate CONFIG` finishes it"),
        (EVALUATION, "comparison", "`evaluate` is not finished; `cdpo evaluate CONFIG` finishes it"),
    ],
)
def test_a_step_that_is_not_finished_names_the_command_that_finishes_it(
    copied: Path, missing: str, read: str, commands: str
) -> None:
    (copied / missing / "manifest.json").unlink()
    with pytest.raises(StoreError, match=rf"{missing}: the step {re.escape(commands)}$"):
        getattr(open_run(copied), read)


def test_the_last_round_is_opened_unless_another_is_given(tmp_path: Path, run_dir: Path) -> None:
    folder = tmp_path / "tuned"
    for number in range(1, 12):
        shutil.copytree(run_dir, folder / f"round-{number}")
    assert open_run(folder).path == folder / "round-11", "sorted by number"
    run = open_run(folder, round=2)
    assert run.path == folder / "round-2"
    assert repr(run) == f"Run('{folder}/round-2')"
    assert open_run(folder / "round-2").samples.equals(run.samples)
    assert "round 3/11" in run.status, "the status is that of the whole run"
    with pytest.raises(StoreError, match=r"tuned: has no round 12; its rounds are 1, 2, 3"):
        open_run(folder, round=12)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StoreError, match=r"is not a run's folder; give one, such as runs/<name>"):
            open_run(folder)


def test_a_run_in_an_object_store_is_read_by_its_uri(s3: Path, run_dir: Path, run: Run) -> None:
    copy_tree(run_dir, s3 / "runs" / "tuned")
    remote = open_run(str(s3 / "runs" / "tuned"))
    for table in ("samples", "scores", "pairs", "updates", "comparison"):
        pd.testing.assert_frame_equal(getattr(remote, table), getattr(run, table))
    assert shade_of(remote.images(2)[1]) == 21


def test_a_step_that_is_a_link_out_of_the_run_is_refused(tmp_path: Path, copied: Path) -> None:
    (copied / SCORES).rename(tmp_path / "elsewhere")
    (copied / SCORES).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"2-scores: is a symbolic link that leads out of"):
        _ = open_run(copied).scores


def altered(run_dir: Path, name: str, table: pa.Table) -> Run:
    """The run with another table, whose manifest agrees with it."""
    path = run_dir / name
    pq.write_table(table, path)
    manifest_path = run_dir / name.partition("/")[0] / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    manifest["files"][name.partition("/")[2]] = describe(path)
    manifest["fingerprint"] = fingerprint_of(manifest["files"])
    manifest_path.write_text(json.dumps(manifest))
    return open_run(run_dir)


def test_an_altered_file_is_refused_before_it_is_read(copied: Path) -> None:
    path = copied / SCORES / "clip.parquet"
    pq.write_table(score_table("clip", [1.0] * 6), path)
    with pytest.raises(StoreError, match=r"clip.parquet: was altered"):
        _ = open_run(copied).scores


def test_tables_that_no_run_has_are_refused(copied: Path) -> None:
    twice = pa.concat_tables([score_table("clip", [1.0] * 6)] * 2)
    with pytest.raises(StoreError, match=r"clip.parquet: has a sample twice"):
        _ = altered(copied, "2-scores/clip.parquet", twice).scores
    with pytest.raises(StoreError, match=r"clip.parquet: is damaged .*one column `score_clip` of numbers"):
        _ = altered(copied, "2-scores/clip.parquet", score_table("other", [1.0] * 6)).scores
    pairs = pair_table(1, [0]).drop_columns("rank_gap")
    with pytest.raises(StoreError, match=r"one column `rank_gap` of integers"):
        _ = altered(copied, "3-stages/stage-1/pairs-000000.parquet", pairs).pairs
    table = samples([0, 1], with_images=True)
    place = table.schema.get_field_index("images")
    with pytest.raises(StoreError, match=r"one column `images` of lists"):
        altered(copied, "1-samples/samples-000000.parquet", table.set_column(place, "images", [[1, 2]])).images(0)
    missing = pa.array([[None], [b""]], pa.list_(pa.binary()))
    run = altered(copied, "1-samples/samples-000000.parquet", table.set_column(place, "images", missing))
    for read in (lambda: run.images(0), lambda: run.dataset("samples")):
        with pytest.raises(StoreError, match=r"is not a readable PNG \(must be bytes"):
            read()
    pickled = pa.large_binary()  # in a process where Ray Data has registered the type, another is read as it is
    field = pa.field("prompt", pickled, metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"})
    objects = samples([0, 1], with_images=True)
    objects = objects.set_column(2, field, objects["prompt"].cast(pickled))
    with pytest.raises(StoreError, match=r"column 'prompt' may hold pickled objects"):
        _ = altered(copied, "1-samples/samples-000000.parquet", objects).samples


def test_a_dataset_holds_the_table_and_decodes_its_images(run: Run) -> None:
    found = run.dataset("comparison")
    assert found.features["tuned_image"] == datasets.Image()
    assert [shade_of(image) for image in found["tuned_image"]] == [100, 101, 110, 111, 120, 121]
    assert found.remove_columns(["base_image", "tuned_image"]).to_pandas().to_dict() == run.comparison.to_dict()
    assert [[shade_of(image) for image in row] for row in run.dataset("samples")["images"]] == [
        [0, 1],
        [10, 11],
        [20, 21],
    ]
    assert run.dataset("scores")["clip"][:] == run.scores["clip"].tolist()
    assert run.dataset("pairs")["within_noise"][:] == [None] * 4
    with pytest.raises(ValueError, match=r"`table` must be one of 'samples', 'scores', 'pairs', .*got 'updates'"):
        run.dataset("updates")


def test_a_dataset_with_images_of_another_format_is_refused(copied: Path) -> None:
    table = comparison()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "GIF")
    images = [*table["tuned_image"].to_pylist()[:-1], buffer.getvalue()]
    place = table.schema.get_field_index("tuned_image")
    run = altered(copied, "5-evaluation/comparison.parquet", table.set_column(place, "tuned_image", [images]))
    with pytest.raises(StoreError, match=r"comparison: `tuned_image` of row 5: is not a readable PNG"):
        run.dataset("comparison")


def test_a_missing_package_is_named_with_its_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(StoreError, match=r'needs the package datasets; pip install "cdpo_ray\[datasets\]"'):
        run.dataset("scores")


def trained(folder: Path, model_dir: Path, policy: TextToImageModel, config: Config) -> Run:
    """A run with the weights of the policy."""

    def save(number: int, training_dir: Path) -> None:
        if config.training.method == "full":
            policy.denoiser.save_pretrained(training_dir / "unet")
        else:
            save_policy(policy, training_dir)

    write_run(config, save)
    (folder / "tuned" / "config.yaml").write_text(json.dumps(config.plain()))
    return open_run(folder / "tuned")


def assert_draws_as(pipeline: Any, model: TextToImageModel) -> None:
    noise = noise_at((1, 4, 8, 8), 0, "noise")
    conditioning, _ = model.encode_prompts(["a cat"])
    expected = model.sample(conditioning, noise, num_denoising_steps=3, guidance_scale=1.0)
    settings = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    torch.testing.assert_close(pipeline("a cat", latents=noise, **settings).images, expected, rtol=1e-4, atol=1e-4)


def test_the_pipeline_draws_the_policys_images_and_the_bases_without_the_lora(tiny_sd15: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, tiny_sd15, training={"lora": {"rank": 4, "alpha": 8}})
    policy = policy_of(config)
    pipeline = trained(tmp_path, tiny_sd15, policy, config).pipeline(device="cpu")
    assert_draws_as(pipeline, policy)
    policy.denoiser.disable_adapters()
    with pytest.raises(AssertionError, match="not close"):
        assert_draws_as(pipeline, policy)
    pipeline.disable_lora()
    assert_draws_as(pipeline, policy)


def test_the_pipeline_has_the_weights_of_full_fine_tuning_in_the_requested_dtype(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path, tiny_sd15, training={"method": "full"})
    policy = load_model("stable_diffusion", path=str(tiny_sd15), device="cpu")
    change(list(policy.denoiser.parameters()), size=0.02)
    run = trained(tmp_path, tiny_sd15, policy, config)
    assert_draws_as(run.pipeline("cpu"), policy)
    assert run.pipeline("cpu", torch.bfloat16).unet.dtype == torch.bfloat16
    assert run.pipeline("cpu", "bfloat16").vae.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"`dtype` must be a torch dtype or its name, as 'bfloat16', got 'float17'"):
        run.pipeline("cpu", "float17")


def test_damaged_weights_are_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, tiny_sd15, training={"lora": {"rank": 4, "alpha": 8}})
    run = trained(tmp_path, tiny_sd15, policy_of(config), config)
    path = next((run.path / TRAINING).rglob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"safetensors: was altered"):
        run.pipeline("cpu")
