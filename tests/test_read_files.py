"""What a step reads is what earlier steps wrote and what the configuration named when they ran, or it is refused."""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from finished_runs import config_of

from cdpo_ray.config import Config
from cdpo_ray.cost.gpus import DEFAULT_GPU
from cdpo_ray.errors import PromptError, StoreError
from cdpo_ray.records import EVALUATION, LABEL, SAMPLES, SCORES, STAGES, STEP_FOLDERS, TRAINING, score_file
from cdpo_ray.run import perform_step, read_prompts, round_folders, run_steps, warn_of_edited_config
from cdpo_ray.steps import STEPS, Context, Step, steps_of
from cdpo_ray.store import RunFolder, describe

ADAPTER = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with all that a configuration may name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the folders of other tests hold a package of the same name
    monkeypatch.setattr("cdpo_ray.run.check_model", lambda *_, **__: None)  # it would refuse these stand-ins
    for side, prompts in {"train": ["a cat", "a dog"], "heldout": ["a fox", "a hen"]}.items():
        Path(f"{side}.txt").write_text("\n".join(prompts))
    Path("model/unet").mkdir(parents=True)
    for name in ("model_index.json", "unet/model.safetensors", "unet/weights.bin", "unet/.hidden.json"):
        Path("model", name).write_bytes(b"0123456789")
    Path("own_judge.py").write_text("score = 1")
    Path("judges").mkdir()
    for name in ("__init__.py", "best.py", "helper.py"):
        Path("judges", name).write_text("score = 1")
    Path("clip").mkdir()
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        Path("clip", name).write_bytes(b"0123456789")
    return tmp_path


def made_config(**sections: Any) -> Config:
    prompts = {side: {"source": f"{side}.txt"} for side in ("train", "heldout")}
    rewards = {"names": ["own_judge:score", "judges.best:score", "clip"]}
    rewards |= {"clip": {"architecture": "ViT-B-32", "checkpoint": "clip"}}
    return config_of(
        Path("runs"),
        "model",
        prompts=prompts,
        rewards=rewards,
        evaluation={"judges": ["own_judge:score", "judges.best:score", "clip"]},
        **sections,
    )


def finish(config: Config, *folders: str) -> RunFolder:
    """Finish these steps with small files in place of what they make."""
    (run,) = round_folders(config)
    run.path.mkdir(parents=True)
    for step in steps_of(config):
        if step.folder in folders:
            with run.writing(
                step.folder, step.settings(config), step.fingerprints(config, run), seed=3, resumable=False
            ) as (path, _):
                for name in {
                    SAMPLES: ("samples-0.parquet", "samples-1.parquet"),
                    SCORES: [score_file(name) for name in (*config.rewards.names, LABEL)],
                    STAGES: ("stage-1/pairs-000000.parquet", "stages.json"),
                    TRAINING: (ADAPTER, "stages.json"),
                    EVALUATION: ("metrics.json",),
                }[step.folder]:
                    (path / name).parent.mkdir(exist_ok=True)
                    pq.write_table(pa.table({"chosen": [0, 1], "rejected": [1, 0]}), path / name)
    return run


def step_of(folder: str) -> Step:
    return next(step for step in STEPS if step.folder == folder)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(
        table.rename_columns({"chosen": "rejected", "rejected": "chosen"}).select(["chosen", "rejected"]), path
    )


def change(path: Path) -> None:
    path.write_text("score = 2" if path.suffix == ".py" else path.read_text()[::-1])


def add(path: Path) -> None:
    shutil.copy(path, path.with_name("another.parquet"))


@pytest.mark.parametrize(
    ("alter", "name", "later", "message"),
    [
        (flip, "1-samples/samples-1.parquet", SCORES, "samples-1.parquet: was altered"),
        (flip, "1-samples/samples-1.parquet", TRAINING, "samples-1.parquet: was altered"),
        (Path.unlink, "1-samples/samples-0.parquet", TRAINING, "samples-0.parquet: is missing"),
        (add, "1-samples/samples-0.parquet", TRAINING, "another.parquet: is not in the manifest"),
        (flip, "2-scores/own_judge:score.parquet", STAGES, "own_judge:score.parquet: was altered"),
        (swap, "3-stages/stage-1/pairs-000000.parquet", TRAINING, "pairs-000000.parquet: was altered"),
        (add, "3-stages/stage-1/pairs-000000.parquet", TRAINING, "another.parquet: is not in the manifest"),
        (flip, f"4-training/{ADAPTER}", EVALUATION, "pytorch_lora_weights.safetensors: was altered"),
        (Path.unlink, f"4-training/{ADAPTER}", EVALUATION, "pytorch_lora_weights.safetensors: is missing"),
    ],
)
def test_fault_43_a_later_step_alone_refuses_inputs_that_were_altered(
    alter: Callable[[Path], Any], name: str, later: str, message: str, folder: Path
) -> None:
    config = made_config()
    run = finish(config, *STEP_FOLDERS[: STEP_FOLDERS.index(later)])
    alter(run.path / name)
    with pytest.raises(StoreError, match=rf"{message}.*; delete .*{name.partition('/')[0]} to regenerate it"):
        run_steps(config, [step_of(later)])


def test_fault_43_each_file_of_a_run_is_read_once_per_attempt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = made_config()
    run = finish(config, *STEP_FOLDERS[:-1])
    files = {run.path / step / name for step in STEP_FOLDERS[:-1] for name in run.manifest(step)["files"]}
    read = Counter[Path]()

    def counted(path: Path, *arguments: Any) -> dict[str, Any]:
        read[path] += 1
        return describe(path, *arguments)

    def start_ray() -> Any:
        raise RuntimeError("Ray starts here")

    monkeypatch.setattr("cdpo_ray.store.copies.describe", counted)
    context = Context(config, read_prompts(config), round_folders(config)[0])
    for step in STEPS[:-1]:
        perform_step(step, context, start_ray=start_ray)
    with pytest.raises(RuntimeError, match="Ray starts here"):
        perform_step(STEPS[-1], context, start_ray=start_ray)
    assert read == Counter(files)


def test_fault_43_scores_that_do_not_rank_are_not_read(folder: Path) -> None:
    config = made_config()
    run = finish(config, SAMPLES, SCORES)
    flip(run.path / "2-scores" / "clip.parquet")
    step_of(STAGES).refuse_damaged_inputs(config, RunFolder(run.path))


@pytest.mark.parametrize(
    ("path", "later", "key"),
    [
        ("train.txt", TRAINING, "prompts.train.sha256"),
        ("model/unet/model.safetensors", TRAINING, "model.sha256"),
        ("model/model_index.json", EVALUATION, "model.sha256"),
        ("own_judge.py", STAGES, "rewards.own_judge:score.sha256"),
        ("judges/helper.py", STAGES, "rewards.judges.best:score.sha256"),
        ("clip/open_clip_model.safetensors", EVALUATION, "rewards.clip.checkpoint.sha256"),
        ("clip/open_clip_config.json", EVALUATION, "rewards.clip.checkpoint.sha256"),
    ],
)
def test_fault_47_a_later_step_alone_refuses_a_file_that_was_changed_since_an_earlier_one(
    path: str, later: str, key: str, folder: Path
) -> None:
    config = made_config()
    finish(config, *STEP_FOLDERS[: STEP_FOLDERS.index(later)])
    change(Path(path))
    with pytest.raises(
        StoreError, match=rf"was made with `{key}` = \w+, the file has \w+; restore the file, or delete"
    ):
        run_steps(config, [step_of(later)])


@pytest.mark.parametrize(
    ("path", "made"),
    [
        ("train.txt", SAMPLES),
        ("heldout.txt", EVALUATION),
        ("own_judge.py", SCORES),
        ("judges/best.py", EVALUATION),
        ("clip/open_clip_config.json", SCORES),
        ("model/unet/model.safetensors", TRAINING),
    ],
)
def test_fault_47_a_finished_step_is_not_done_already_for_files_of_other_content(
    path: str, made: str, folder: Path
) -> None:
    config = made_config()
    finish(config, *STEP_FOLDERS[: STEP_FOLDERS.index(made) + 1])
    change(Path(path))
    with pytest.raises(StoreError, match=rf"{made} was made with `[\w.:]+\.sha256` = \w+, config says \w+"):
        run_steps(config, [step_of(made)])


@pytest.mark.parametrize(("later", "changed"), [(SAMPLES, "pairs.jsonl"), (TRAINING, "7.png"), (EVALUATION, "7.png")])
def test_fault_47_preferences_that_were_changed_in_place_are_refused_by_every_step(
    later: str, changed: str, folder: Path
) -> None:
    rows = [{"prompt": f"cat {row}", "chosen": f"{row}.png", "rejected": f"{row + 1}.png"} for row in range(9)]
    for row in range(10):
        Path(f"{row}.png").write_bytes(b"an image")
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = made_config().model_dump(mode="json", exclude_unset=True) | {
        "prompts": {"heldout": {"fraction": 0.3}},
        "preferences": {"path": "pairs.jsonl", "format": "pairs"},
        "curriculum": {"measure": "score_gap_quantile", "num_stages": 2, "updates_per_stage": 5},
    }
    config = Config.model_validate(given)
    finish(config, SAMPLES, SCORES, STAGES, TRAINING)
    if later == TRAINING:
        shutil.rmtree(Path("runs/tuned/4-training"))
    content = Path(changed).read_bytes()
    Path(changed).write_bytes(content.replace(b"cat 4", b"cow 4").replace(b"an image", b"no image"))
    with pytest.raises(StoreError, match=r"1-samples was made with `preferences\.files` = \w+, (config|the file)"):
        run_steps(config, [step for step in steps_of(config) if step.folder == later])


@pytest.mark.parametrize("name", ["unet/weights.bin", "unet/.hidden.json"])
def test_files_of_a_model_that_are_never_loaded_do_not_count(name: str, folder: Path) -> None:
    config = made_config()
    before = step_of(TRAINING).settings(config)
    (folder / "model" / name).write_bytes(b"other")
    assert step_of(TRAINING).settings(config) == before


def test_what_ships_with_the_package_or_is_pinned_by_a_revision_is_not_hashed(folder: Path) -> None:
    config = config_of(folder, "embedded")
    assert not [key for step in STEPS for key, value in step.settings(config).items() if "sha256" in key and value]
    hub = config_of(folder, "some/model", model={"path": "some/model", "revision": "0" * 40})
    assert "model.sha256" not in step_of(TRAINING).settings(hub)


def test_another_model_on_purpose_is_no_changed_file(folder: Path) -> None:
    """A configuration that names another folder is not refused; `config.yaml` is left unchanged, with a warning."""
    config = made_config()
    finish(config, SAMPLES, SCORES, STAGES)
    shutil.copytree("model", "other")
    flip(Path("other/unet/model.safetensors"))
    other = made_config(model={"path": "other"})
    with pytest.raises(RuntimeError, match="reached"):
        perform(step_of(TRAINING), other, read_prompts(other))


def perform(step: Step, config: Config, prompts: Any) -> None:
    """Up to where Ray would be started."""

    def start_ray() -> Any:
        raise RuntimeError("reached")

    (run,) = round_folders(config)
    perform_step(step, Context(config, prompts, run), start_ray=start_ray)


@pytest.mark.parametrize(("side", "later"), [("train", SAMPLES), ("heldout", EVALUATION)])
def test_fault_33_prompts_that_change_after_they_were_read_are_refused(side: str, later: str, folder: Path) -> None:
    config = made_config()
    finish(config, *STEP_FOLDERS[: STEP_FOLDERS.index(later)])
    prompts = read_prompts(config)
    Path(f"{side}.txt").write_text("a cow\nan owl")
    with pytest.raises(
        StoreError, match=rf"`prompts.{side}.source` {side}.txt: was changed after this command had read"
    ):
        perform(step_of(later), config, prompts)
    Path(f"{side}.txt").unlink()
    with pytest.raises(PromptError, match=rf"`prompts.{side}.source` {side}.txt: No such file"):
        perform(step_of(later), config, prompts)


def test_fault_33_a_file_that_changes_while_a_step_reads_it_leaves_the_step_unfinished(folder: Path) -> None:
    config = made_config()
    (run,) = round_folders(config)
    run.path.mkdir(parents=True)

    def change(context: Context, output_dir: Path, output: Any) -> None:
        flip(Path("model/unet/model.safetensors"))

    step = replace(step_of(SAMPLES), perform=change)
    context = Context(config, read_prompts(config), run)
    with pytest.raises(
        StoreError, match=r"generate: a file was changed .* \(`model.sha256` = .*\); restore the file and run"
    ):
        perform_step(step, context, start_ray=lambda: DEFAULT_GPU)
    assert not run.has(SAMPLES)
    flip(Path("model/unet/model.safetensors"))
    perform_step(replace(step, perform=lambda *_: None), context, start_ray=lambda: DEFAULT_GPU)
    assert run.has(SAMPLES)


def test_fault_33_held_out_prompts_that_are_a_share_of_the_training_file_are_identified_by_it(folder: Path) -> None:
    Path("train.txt").write_text("\n".join(f"prompt {number}" for number in range(50)))
    config = made_config()
    shared = config.model_copy(update={"prompts": config.prompts.model_copy(update={"heldout": {"fraction": 0.3}})})
    shared = Config.model_validate(shared.model_dump(mode="json", exclude_unset=True))
    settings = step_of(EVALUATION).settings(shared)
    assert settings["prompts.train.sha256"] == read_prompts(shared).sha256["train"]


def test_fault_59_an_edited_config_is_reported_and_another_path_of_the_same_folder_is_not(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = made_config()
    run = finish(config, SAMPLES)
    absolute = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder / "runs")})})
    (run.path / "config.yaml").write_text(yaml.safe_dump(config.plain()))
    warn_of_edited_config(absolute, run)
    assert not caplog.messages
    edited = config.plain() | {"training": config.plain()["training"] | {"beta": 7.0}}
    (run.path / "config.yaml").write_text(yaml.safe_dump(edited))
    warn_of_edited_config(absolute, run)
    (message,) = caplog.messages
    assert "differs from the configuration: `training.beta` = 7.0, config says" in message and "run.dir" not in message
