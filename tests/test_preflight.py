"""Problems that a config's validation cannot know are found before a run starts, all at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from finished_runs import config_of, write_run

from cdpo_ray.cli import main
from cdpo_ray.config import Config
from cdpo_ray.errors import ConfigError, ModelError, PromptError, RewardError, StoreError
from cdpo_ray.plan import make_plan
from cdpo_ray.preflight import (
    missing_weights,
    refuse_problems,
    refuse_unavailable_weights,
    refuse_unwritable,
    try_rewards,
)
from cdpo_ray.prompts.questions import VqaQuestion, questions_line
from cdpo_ray.run import read_prompts, refuse_changes, run_steps
from cdpo_ray.steps import STEPS


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with modules of the user."""
    (tmp_path / "judges_of_mine.py").write_text(
        "def redness(images, prompts):\n    return images[:, 0].float().mean((1, 2))\n\n"
        "def pixels(images, prompts):\n    return images\n\n"
        "def failing(images, prompts):\n    raise KeyError(prompts[0])\n\n"
        "class Heavy:\n    def __init__(self):\n        raise MemoryError\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_with(folder: Path, *, rewards: list[str] | None = None, **sections: dict[str, object]) -> Config:
    return config_of(folder / "runs", "embedded", rewards={"names": rewards or ["clip"]}, **sections)


def problems_of(config: Config) -> None:
    refuse_problems(config, read_prompts(config), STEPS)


def test_fault_65_all_problems_are_reported_at_once_and_nothing_is_written(own_modules: Path) -> None:
    config = config_with(
        own_modules,
        rewards=["judges_of_mine:rednes", "clip"],
        training={"loss": "no_such_module:f"},
        prompts={
            "train": {"source": "animals", "count": 6},
            "heldout": {"source": "scenes", "count": 4},
        },
    )
    with pytest.raises(
        ConfigError, match=r"^2 problems\n  reward `judges_of_mine:rednes`.*\n  loss `no_such_module:f`"
    ):
        problems_of(config)
    with pytest.raises(ConfigError, match=r"^2 problems\n"):
        run_steps(config, STEPS)
    assert not (own_modules / "runs").exists()


@pytest.mark.parametrize(
    ("prompts", "rewards", "judges", "message"),
    [
        (
            ("animals", "animals"),
            ["clip"],
            ["oracle"],
            r"^`evaluation.judges`: `oracle` judges only prompts of the emb",
        ),
        (
            ("animals", "scenes"),
            ["oracle_strict"],
            ["clip"],
            r"^`rewards.names`: `oracle_strict` judges only prompts of the",
        ),
    ],
)
def test_fault_65_a_judge_of_the_embedded_world_is_refused_for_other_prompts(
    prompts: tuple[str, str], rewards: list[str], judges: list[str], message: str, tmp_path: Path
) -> None:
    train, heldout = prompts
    config = config_with(
        tmp_path,
        rewards=rewards,
        prompts={
            "train": {"source": train, "count": 4},
            "heldout": {"fraction": 0.2} if heldout == train else {"source": heldout, "count": 4},
        },
        evaluation={"judges": judges},
    )
    with pytest.raises(ConfigError, match=message):
        problems_of(config)


def test_fault_65_the_tiny_clip_is_refused_for_the_images_of_another_model(tmp_path: Path, tiny_sd15: Path) -> None:
    animals: dict[str, object] = {"train": {"source": "animals", "count": 4}, "heldout": {"fraction": 0.2}}
    sections = {"rewards": {"names": ["jpeg_size"]}, "prompts": animals, "evaluation": {"judges": ["clip"]}}
    problems_of(config_of(tmp_path / "runs", "embedded", **sections))
    with pytest.raises(ConfigError, match=r"`clip` judges only .* give `rewards.clip` an `architecture` and a"):
        problems_of(config_of(tmp_path / "runs", tiny_sd15, **sections))


def test_the_oracle_is_no_problem_for_prompts_of_its_world(tmp_path: Path) -> None:
    problems_of(config_with(tmp_path, rewards=["oracle"], evaluation={"judges": ["oracle_strict"]}))


def quoting(folder: Path, num_quoting: int, **rewards: object) -> Config:
    """A config with ten prompts to train on, some of which quote text, and two held-out prompts, one of which does."""
    prompts = [f'a sign "{number}"' if number < num_quoting else f"a dog's bowl {number}" for number in range(10)]
    (folder / "train.txt").write_text("\n".join(prompts))
    (folder / "heldout.txt").write_text('a door with "OPEN"\na door\n')
    files = {side: {"source": str(folder / f"{side}.txt")} for side in ("train", "heldout")}
    return config_of(
        folder / "runs",
        "embedded",
        rewards={"names": ["ocr"]} | rewards,
        prompts=files,
        evaluation={"judges": ["clip"]},
    )


@pytest.mark.parametrize(
    ("num_quoting", "message"),
    [
        (0, r"^`rewards.names`: `ocr` scores only images whose prompt .* none of the 10 training prompts has"),
        (
            7,
            r"^`rewards.names`: `ocr` ranks, .* of 3 of 10 training prompts, .* \"a dog's bowl 7\": more than `rewards",
        ),
    ],
)
def test_fault_65_ocr_is_refused_if_too_few_prompts_quote_the_text_to_render(
    num_quoting: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        problems_of(quoting(tmp_path, num_quoting))


@pytest.mark.parametrize("rewards", [{"names": ["clip", "ocr"]}, {"max_bad_fraction": 0.2}])
def test_prompts_without_quoted_text_are_a_warning_where_they_cannot_stop_the_run(
    rewards: dict[str, object], tmp_path: Path
) -> None:
    config = quoting(tmp_path, 9, **rewards)
    problems_of(config)
    lines = [line.strip() for line in make_plan(config, read_prompts(config)).lines if "`ocr`" in line]
    assert lines == [
        "warning: `ocr` gives no score to images of 1 of 10 training prompts, which have no text in quotes",
        "warning: `ocr` gives no score to images of 1 of 2 held-out prompts, which have no text in quotes",
    ]


def test_fault_65_ocr_without_its_packages_is_refused_with_the_command_that_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r'^`rewards.names`: `ocr` needs rapidocr and onnxruntime: pip install "cdpo_ray\[ocr\]"$'
    ):
        problems_of(quoting(tmp_path, 10))


def test_own_reward_functions_are_called_on_two_images_but_classes_and_gpu_rewards_are_not(own_modules: Path) -> None:
    config = config_with(own_modules, rewards=["judges_of_mine:redness", "judges_of_mine:Heavy"])
    (line,) = try_rewards(config, read_prompts(config))
    name, values = line.split(" of two images of random pixels: ")
    assert name == "judges_of_mine:redness"
    assert all(120 < float(value) < 135 for value in values.split(", ")), "the mean of uniform bytes is 127.5"
    on_gpus = config_with(
        own_modules, rewards=["judges_of_mine:failing"], resources={"generators": {"gpus_per_actor": 1}}
    )
    assert try_rewards(on_gpus, read_prompts(on_gpus)) == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("pixels", r"must return one score per image, .* got Tensor of shape \[2, 3, 64, 64\]"),
        ("failing", r"reward `judges_of_mine:failing` raised KeyError"),
    ],
)
def test_fault_65_a_wrong_reward_is_reported_with_what_it_did(function: str, message: str, own_modules: Path) -> None:
    config = config_with(own_modules, rewards=[f"judges_of_mine:{function}"])
    with pytest.raises(RewardError, match=message):
        try_rewards(config, read_prompts(config))


@pytest.mark.skipif(os.geteuid() != 0, reason="/proc exists on Linux, and root may write elsewhere")
def test_fault_65_check_refuses_a_run_dir_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "quickstart", "run.dir=/proc/runs"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("StoreError: `run.dir` /proc/runs/quickstart: cannot be written (")


def test_the_probe_of_a_folder_leaves_nothing(tmp_path: Path) -> None:
    assert refuse_unwritable(tmp_path / "a" / "b", "run.dir") == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_weights_that_would_be_downloaded_are_named(tmp_path: Path) -> None:
    config = config_with(tmp_path, rewards=["pickscore"])
    assert missing_weights(config) == [
        "rewards.pickscore.checkpoint yuvalkirstain/PickScore_v1",
        "rewards.pickscore.processor laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ]
    assert missing_weights(config_with(tmp_path)) == []


def test_fault_25_weights_that_cannot_be_fetched_are_reported_before_ray_starts_if_a_step_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = config_with(tmp_path, rewards=["pickscore"])
    with pytest.raises(
        RewardError, match=r"^`rewards.pickscore.checkpoint` \S+ \(revision \w{40}\): is not on this machi"
    ):
        run_steps(config, STEPS)
    assert not (tmp_path / "runs" / "tuned" / "1-samples.partial").exists()
    refuse_unavailable_weights(config, [step for step in STEPS if step.verb in ("pairs", "train")])
    other_model = config_of(
        tmp_path / "runs", "org/name", model={"path": "org/name", "revision": "a" * 40, "family": "stable_diffusion"}
    )
    with pytest.raises(
        ModelError, match=r"^`model.path` org/name \(revision a+\): is not on this machine and cannot be"
    ):
        refuse_unavailable_weights(other_model, STEPS)
    refuse_unavailable_weights(other_model, [step for step in STEPS if step.verb in ("score", "pairs")])


def test_other_values_than_those_of_a_finished_run_are_refused_with_the_way_to_keep_its_images(tmp_path: Path) -> None:
    config = config_with(tmp_path)
    write_run(config, lambda number, folder: None, lambda number: {})
    refuse_changes(config)
    changed = config_with(tmp_path, training={"beta": 77, "learning_rate": 1e-4, "global_batch_size": 2})
    with pytest.raises(
        StoreError,
        match=r"4-training was made with `training.beta` = 500.0, config says 77.0; .*`run.samples_from=\S+/tuned`",
    ):
        refuse_changes(changed)


def test_an_attempt_that_was_started_with_other_values_is_refused_before_ray_starts(tmp_path: Path) -> None:
    config = config_with(tmp_path)
    write_run(config, lambda number, folder: None)
    training = tmp_path / "runs" / "tuned" / "4-training"
    (training / "manifest.json").unlink()
    (training / "settings.json").write_text('{"settings": {"model": {"path": "other"}}, "inputs": {}, "changes": []}')
    training.rename(training.with_name("4-training.partial"))
    with pytest.raises(StoreError, match=r"4-training\.partial was started with other inputs; delete it to start over"):
        refuse_changes(config)


def test_questions_that_cannot_be_read_or_are_for_no_prompt_are_refused_before_the_run(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    vqa = {"questions": str(path), "checkpoint": str(tmp_path)}
    config = config_of(tmp_path / "runs", "embedded", rewards={"names": ["clip", "vqa"], "vqa": vqa})
    with pytest.raises(PromptError, match=rf"^{path}: cannot be read: No such file"):
        problems_of(config)
    split = read_prompts(config)
    lines = {prompt: questions_line(prompt, [VqaQuestion("Cats?", "yes")]) for prompt in (*split.train, *split.heldout)}
    path.write_text(lines[split.train[0]])
    message = rf"^`rewards.vqa.questions` {path}: has questions for none of {len(split.heldout)} held-out prompts, the"
    with pytest.raises(ConfigError, match=message):
        problems_of(config)
    path.write_text(lines[split.train[0]] + lines[split.heldout[-1]])
    problems_of(config)
    path.write_text("{}\n[]")
    with pytest.raises(PromptError, match=r": 2 faults\n"):
        problems_of(config)
