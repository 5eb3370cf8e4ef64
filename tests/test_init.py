"""`cdpo init` writes commented configs that `cdpo check` accepts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from preference_sets import pickapic_rows, write_parquet

from cdpo_ray.cli import main
from cdpo_ray.config import load_config, shipped_configs
from cdpo_ray.config.commented import commented_yaml
from cdpo_ray.config.reference import all_keys

PROMPTS = "".join(
    f"{colour} {animal}\n" for colour in ("red", "blue", "old", "big") for animal in ("cat", "dog", "cow")
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with prompts and a reward of the user."""
    (tmp_path / "animals.txt").write_text(PROMPTS)
    (tmp_path / "judges_of_init.py").write_text(
        "def redness(images, prompts):\n    return images[:, 0].float().mean((1, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_config_for_own_prompts_and_reward_passes_check_without_an_edit(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--prompts", "animals.txt", "--reward", "judges_of_init:redness"]
    assert main(["init", "mine.yaml", *given]) == 0
    assert capsys.readouterr().out == "mine.yaml\nnext: cdpo check mine.yaml\n"
    config = load_config("mine.yaml")
    assert (config.run.name, config.prompts.train.source, config.prompts.heldout.fraction) == (
        "mine",
        "animals.txt",
        0.2,
    )
    assert config.rewards.names == ("judges_of_init:redness",)
    assert config.evaluation.judges == ("clip",), "the oracle does not understand these prompts"
    assert config.training == load_config("quickstart").training
    assert main(["check", "mine.yaml"]) == 0


@pytest.mark.parametrize("reward", ["judges_of_init:redness", "pickscore", "hpsv2"])
@pytest.mark.parametrize("like", ["sd15", "sdxl", "flux"])
def test_the_judges_of_the_config_keep_their_models_when_the_reward_changes(
    like: str, reward: str, folder: Path
) -> None:
    assert main(["init", "mine.yaml", "--like", like, "--prompts", "animals.txt", "--reward", reward]) == 0
    judges, expected = load_config("mine.yaml").evaluation_judges, load_config(like).evaluation_judges
    assert judges["clip"] == expected["clip"] and judges["clip"]["architecture"] != "embedded"


@pytest.mark.parametrize("name", ["paper_d1", "paper_d2", "paper_d3"])
def test_the_overrides_for_the_papers_other_rewards_leave_the_judges_models_as_they_are(
    name: str, folder: Path
) -> None:
    (folder / "sac+logos+ava1-l14-linearMSE.pth").touch()
    commands = [line for line in shipped_configs()[name].read_text().split("\n") if "rewards.names=[" in line]
    assert len(commands) == 2
    expected = load_config(name).evaluation_judges["clip"]
    for command in commands:
        command = command.replace("URL", "http://localhost:8000/v1")
        given = [word for word in shlex.split(command.removeprefix("#")) if word.startswith("rewards.")]
        judges = load_config(name, given).evaluation_judges
        assert judges["clip"] == expected and expected["architecture"] != "embedded"
        assert {"vlm_alignment", "aesthetic"} & {*judges}


def test_every_key_has_a_comment_with_its_description(folder: Path) -> None:
    assert main(["init", "mine.yaml", "--like", "sd15"]) == 0
    lines = (folder / "mine.yaml").read_text().split("\n")
    keys = [(number, line) for number, line in enumerate(lines) if re.match(r" *[a-z_]+:", line)]
    assert len(keys) > 30
    assert all(lines[number - 1].lstrip().startswith("# ") for number, _ in keys)
    beta = lines.index("  beta: 5000")
    assert lines[beta - 1] == f"  # {all_keys()['training.beta'].summary}"


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name not in ("pickapic", "tune", "tune_sd15")])
def test_a_commented_config_is_the_one_that_it_starts_from(name: str, folder: Path) -> None:
    assert main(["init", f"{name}.yaml", "--like", name]) == 0
    assert load_config(f"{name}.yaml") == load_config(shipped_configs()[name])


def test_preferences_replace_prompts_and_generated_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parquet(pickapic_rows(12), folder / "pairs.parquet")
    given = ["--like", "quickstart", "--preferences", "pairs.parquet", "--format", "pickapic"]
    assert main(["init", "mine.yaml", *given]) == 0
    config = load_config("mine.yaml")
    assert config.preferences is not None
    assert (config.preferences.path, config.preferences.format) == ("pairs.parquet", "pickapic")
    assert config.prompts.train is None
    assert config.curriculum.measure == "score_gap_quantile"


def test_held_out_prompts_replace_those_of_the_config_also_without_training_prompts(folder: Path) -> None:
    assert main(["init", "mine.yaml", "--heldout", "animals.txt"]) == 0
    config, like = load_config("mine.yaml"), load_config("quickstart")
    assert (config.prompts.train, config.prompts.heldout.source) == (like.prompts.train, "animals.txt")
    assert config.evaluation.judges == ("clip",), "the oracle does not understand these prompts"
    write_parquet(pickapic_rows(12), folder / "pairs.parquet")
    given = ["--preferences", "pairs.parquet", "--format", "pickapic", "--heldout", "animals.txt"]
    assert main(["init", "labelled.yaml", *given]) == 0
    heldout = load_config("labelled.yaml").prompts.heldout
    assert (heldout.source, heldout.fraction) == ("animals.txt", None)


def test_a_model_folder_selects_the_config_of_its_family(folder: Path, tiny_lcm: Path) -> None:
    assert main(["init", "mine.yaml", "--model", str(tiny_lcm)]) == 0
    config = load_config("mine.yaml")
    assert (config.model.family, config.model.path, config.model.revision) == (
        "latent_consistency",
        str(tiny_lcm),
        None,
    )
    assert config.generation == load_config("lcm").generation


def test_a_gpu_selects_the_variant_that_fits_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "small.yaml", "--like", "flux", "--gpu", "4090"]) == 0
    assert capsys.readouterr().out.startswith("flux needs more memory than 4090 has; starting from flux_24gb\n")
    assert load_config("small.yaml").model == load_config("flux_24gb").model
    assert main(["init", "large.yaml", "--like", "flux", "--gpu", "h100"]) == 0
    assert load_config("large.yaml").model == load_config("flux").model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["mine.txt"], "ConfigError: mine.txt: must end in .yaml or .yml\n"),
        (["mine.yaml", "--like", "sdx"], "ConfigError: sdx: is not a config of the package; did you mean sdxl?\n"),
        (
            ["mine.yaml", "--model", "org/name"],
            "ConfigError: --model org/name: is neither a folder nor a file; for a",
        ),
        (
            ["mine.yaml", "--format", "pickapic"],
            "ConfigError: --format pickapic: is the format of --preferences, which is missing; give both\n",
        ),
        (["mine.yaml", "--reward", "clipp"], "ConfigError: mine.yaml: 1 fault\n  `rewards.names.0` must be one of"),
        (["no/such/mine.yaml"], "ConfigError: no/such/mine.yaml: cannot be written: No such file or directory; "),
    ],
)
def test_wrong_arguments_are_reported_and_write_nothing(
    given: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    assert main(["init", *given]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("given", [["init"], ["-v", "init"]])
def test_questions_are_asked_in_a_terminal_and_an_empty_answer_is_the_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    answers = iter(["", "smoke", "", "animals.txt", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert main(given) == 0
    assert next(answers, None) is None
    config = load_config("my_run.yaml")
    assert (config.prompts.train.source, config.curriculum) == ("animals.txt", load_config("smoke").curriculum)


def test_the_end_of_input_at_a_question_is_an_error_in_one_line_and_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter(["mine.yaml"])
    before = sorted(folder.iterdir())

    def answer(question: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", answer)
    assert main(["init"]) == 2
    assert re.fullmatch(
        r"ConfigError: standard input: ended before .* nothing was written; .*\n", capsys.readouterr().err
    )
    assert sorted(folder.iterdir()) == before


def test_values_that_yaml_could_misread_are_quoted() -> None:
    values = {"run": {"name": "no", "dir": "a: b # c"}, "training": {"learning_rate": 1e-5}}
    assert yaml.safe_load(commented_yaml(values, "head").replace("1.0e-05", "0.00001")) == values
