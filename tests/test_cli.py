"""The command line: verbs in pipeline order, errors without tracebacks."""

import argparse
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from caption_server import CaptionServer, saying
from finished_runs import config_of, write_run
from hollow_models import build_hollow, change
from preference_sets import pickapic_rows, write_parquet

from cdpo_ray.cli import GROUPS, VERBS, main, parser
from cdpo_ray.cli.arguments import config_of as config_of_command
from cdpo_ray.config import load_config
from cdpo_ray.prompts.questions import read_questions
from cdpo_ray.steps import IMPORT, STEPS

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def test_check_prints_all_faults_of_a_config_and_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        QUICKSTART.read_text().replace("beta: 200", "bta: 200").replace("images_per_prompt: 8", "images_per_prompt: 1")
    )
    assert main(["check", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.split("\n") == [
        f"ConfigError: {path}: 3 faults",
        "  `generation.images_per_prompt` must be >= 2, got 1",
        "  `training.beta` is missing",
        "  unknown key `training.bta`; did you mean `training.beta`?",
        "",
    ]


def test_a_missing_config_is_reported_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("ConfigError: nowhere.yaml: cannot be read: ")


def test_check_reports_a_missing_prompt_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "none.txt"
    assert main(["check", str(QUICKSTART), f"prompts.train={{source: {source}}}"]) == 2
    assert capsys.readouterr().err.startswith(f"PromptError: `prompts.train.source` {source}: No such file")


def test_too_large_a_count_of_scenes_is_reported_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(QUICKSTART), "prompts.train.count=10000000"]) == 2
    assert capsys.readouterr().err.startswith("PromptError: `prompts.train.source` scenes: ")


def test_help_lists_the_verbs_by_group_with_an_example_each(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    lines = capsys.readouterr().out.split("\n")
    listed = [line.split()[0] for line in lines[lines.index("before a run:") :] if re.match(r"  \w", line)]
    assert listed == list(VERBS)
    generate, *others = (step.verb for step in STEPS)
    assert list(GROUPS["the pipeline"]) == ["run", generate, IMPORT.verb, *others, "report", "tune"]
    examples = [line.split("$ ")[1] for line in lines if "$ " in line]
    assert len(examples) == len(VERBS)
    for verb, example in zip(VERBS, examples, strict=True):
        words = shlex.split(example.removeprefix('eval "$(').removesuffix(')"'))
        assert words[:2] == ["cdpo", verb]
        assert parser().parse_args(words[1:]).verb == verb


def test_a_misspelt_verb_and_an_override_with_dashes_are_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["chek", "quickstart"], "unknown verb `chek`; did you mean `check`?"),
        (["dance"], "unknown verb `dance`; verbs are init, configs, "),
        (
            ["check", "quickstart", "--training.beta=3"],
            "--training.beta=3; a config value has no dashes: training.beta=3",
        ),
        (["run"], "the following arguments are required: CONFIG\n"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            main(arguments)
        assert message in capsys.readouterr().err


def test_a_config_of_the_package_is_taken_by_its_name_and_listed_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart") == load_config(QUICKSTART)
    assert main(["configs"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(listed) == {path.stem for path in QUICKSTART.parent.glob("*.yaml")}
    assert listed["smoke"] == "Every step at the smallest size, to test that the pipeline runs."
    assert main(["configs", "quickstart"]) == 0
    assert (tmp_path / "quickstart.yaml").read_text() == QUICKSTART.read_text()
    assert main(["configs", "quickstart"]) == 2, "an edited copy is not overwritten"
    assert main(["configs", "quickstrt"]) == 2
    assert capsys.readouterr().err.split("\n")[:2] == [
        "ConfigError: quickstart.yaml: exists and is not overwritten; choose another name, or delete it",
        "ConfigError: quickstrt: is not a config of the package; did you mean quickstart?",
    ]


def test_the_folder_of_a_run_is_a_config_wherever_it_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "runs", "embedded", training={"beta": 123})
    write_run(config, lambda number, folder: None, lambda number: {})
    run = tmp_path / "elsewhere"
    (tmp_path / "runs" / "tuned").rename(run)
    (run / "config.yaml").write_text(yaml.safe_dump(config.plain()))
    monkeypatch.chdir(run)
    for given in (str(run), "."):
        found = config_of_command(argparse.Namespace(config=given, overrides=["resources.generators.num_actors=3"]))
        assert (found.run.dir, found.run.name) == (str(tmp_path), "elsewhere")
        assert (found.training.beta, found.resources.generators.num_actors) == (123, 3)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(found.plain()))
    capsys.readouterr()
    assert main(["status", str(tmp_path / "mine.yaml")]) == 0
    assert capsys.readouterr().out.startswith(f"{run}\n"), "a config stands for its run"
    (run / "config.yaml").write_text(yaml.safe_dump(config.plain()).replace("123", "124"))
    assert main(["check", str(run)]) == 2
    assert "config.yaml: is not the configuration that 4-training was made with" in capsys.readouterr().err


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"ConfigError: {tmp_path}: is a folder without config.yaml, which a finished run has; give the path of a YAML"
        " file\n"
    )


def test_the_completion_script_of_bash_completes_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    ask = (
        f"source {script}; COMP_WORDS=(cdpo co); COMP_CWORD=1; COMP_LINE='cdpo co'; COMP_POINT=7; _shtab_cdpo;"
        " printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert {word.strip() for word in done.stdout.split()} == {verb for verb in VERBS if verb.startswith("co")}


@pytest.mark.parametrize("verb", VERBS)
def test_the_module_of_a_verb_has_its_help_arguments_and_implementation(verb: str) -> None:
    module = import_module(VERBS[verb])
    assert module.HELP and callable(module.add_arguments) and callable(module.run)


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["dance", "x.yaml"], ["run"], ["compare", "runs/one"], ["compare", "runs/one", "--out", "a"]),
        *(
            ["status", "runs/one", "a=b"],
            ["config", "training", "model"],
            ["run", "x.yaml", "--address", "a:1", "beta"],
        ),
    ],
)
def test_an_invalid_command_exits_with_2_and_prints_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    assert capsys.readouterr().err.startswith("usage: cdpo")


def test_compare_takes_run_folders_around_its_options_and_names_one_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", f"{tmp_path}/one", "--out", str(tmp_path), f"{tmp_path}/two"]) == 2
    assert capsys.readouterr().err.startswith(f"StoreError: {tmp_path}/one/5-evaluation: is missing or not finished")
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_changed_after_a_step_read_them_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"train": tmp_path / "train.txt", "heldout": tmp_path / "heldout.txt"}
    for path, lines in zip(files.values(), ("a cat\na dog\n", "a cow\n"), strict=True):
        path.write_text(lines)
    config = config_of(
        tmp_path / "runs",
        "embedded",
        prompts={side: {"source": str(path)} for side, path in files.items()},
        run={"name": "kept", "dir": str(tmp_path / "runs")},
    )
    write_run(config, lambda number, folder: None, lambda number: {})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    for verb, side, folder in (("evaluate", "heldout", "5-evaluation"), ("generate", "train", "1-samples")):
        assert main([verb, str(tmp_path / "config.yaml")]) == 0
        with files[side].open("a") as handle:
            handle.write("a bird\n" if side == "train" else "a fish\n")
        capsys.readouterr()
        assert main([verb, str(tmp_path / "config.yaml")]) == 2
        assert (
            capsys.readouterr()
            .err.split("\n")[-2]
            .startswith(f"StoreError: {tmp_path}/runs/kept/{folder} was made with `prompts.{side}.sha256` = ")
        )


def test_steps_read_only_what_earlier_steps_wrote() -> None:
    written: set[str] = set()
    for step in STEPS:
        assert set(step.inputs) <= written
        written.add(step.folder)
    assert [step.folder for step in STEPS] == sorted(written)


def then_print_heavy_modules(arguments: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process of its own, which then prints the heavy packages that it has imported."""
    code = (
        "import atexit, sys; from cdpo_ray.cli import main; heavy = {'torch', 'ray', 'diffusers', 'transformers'};"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)))); sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder)


def test_help_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    done = then_print_heavy_modules(["--help"], tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]")


def test_check_needs_neither_torch_nor_ray_and_writes_nothing(tmp_path: Path) -> None:
    arguments = ["check", str(QUICKSTART), "run.name=second", f"run.dir={tmp_path}/runs"]
    done = then_print_heavy_modules(arguments, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"run second in {tmp_path}/runs/second\n")
    assert done.stdout.rstrip().endswith("[]")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted(QUICKSTART.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_check_prints_hours_memory_and_verdict_of_every_shipped_config(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = []
    if path.stem in ("pickapic", "paper_d3"):
        write_parquet(pickapic_rows(40), tmp_path / "rows.parquet")
        overrides = [f"preferences.path={tmp_path}/rows.parquet", "prompts.heldout={fraction: 0.2}"]
    if path.stem == "paper_d2":
        (tmp_path / "p.csv").write_text("Prompts,Category\n" + "".join(f"thing {n},Things\n" for n in range(40)))
        overrides = [f"prompts.train.path={tmp_path}/p.csv"]
    assert main(["check", str(path), *overrides]) == 0
    lines = capsys.readouterr().out.splitlines()
    cost = lines[next(place for place, line in enumerate(lines) if line.startswith("  cost ")) :]
    assert "estimated, not measured, for h100 (79 GiB)" in cost[0]
    named = [line.split()[0] for line in cost[1:-1]]
    assert {"train", "evaluate", "all", "trainer", "evaluator"} <= {*named}
    assert all("GPU-hours" in line for line in cost if line.split()[0] in ("generate", "train", "evaluate", "all"))
    assert all(" GiB of 79.0 GiB: fits" in line for line in cost if line.split()[0] in ("trainer", "evaluator"))
    assert cost[-1] == "  verdict      fits h100"


@pytest.mark.parametrize("path", sorted(QUICKSTART.parent.glob("*_24gb.yaml")), ids=lambda path: path.stem)
def test_a_config_for_24_gb_fits_a_4090_and_its_full_size_sibling_does_not(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(path), "--gpu", "4090"]) == 0
    assert capsys.readouterr().out.endswith("verdict      fits 4090\n")
    assert main(["check", str(path.with_stem(path.stem.removesuffix("_24gb"))), "--gpu", "4090"]) == 0
    assert capsys.readouterr().out.endswith("verdict      does not fit 4090\n")


def test_check_suggests_settings_that_fit_a_gpu_that_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(QUICKSTART.with_name("sdxl.yaml")), "--gpu", "t4", "training.lora.rank=16"]) == 0
    out = capsys.readouterr().out
    assert (
        "DOES NOT FIT (95% is usable)" in out
        and "would fit: `" in out
        and out.endswith("verdict      does not fit t4\n")
    )
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["check", str(QUICKSTART), "--gpu", "abacus"])


def test_check_prints_no_estimate_for_a_model_folder_that_cannot_be_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build_hollow(tmp_path / "model", "stable_diffusion")
    change(folder, "unet", down_block_types=["NoSuchBlock2D"])
    assert main(["check", str(QUICKSTART), f"model.path={folder}", f"run.dir={tmp_path}"]) == 0
    assert f"  cost         not estimated: `model.path` {folder}: its cost cannot be counted" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("family", ["latent_consistency", "stable_diffusion_xl"])
def test_fault_37_check_refuses_a_model_of_another_family_without_torch(family: str, tmp_path: Path) -> None:
    folder = build_hollow(tmp_path / "model", family)
    done = then_print_heavy_modules(["check", str(QUICKSTART), f"model.path={folder}"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr.startswith(f"ModelError: `model.path` {folder}: does not fit `model.family` stable_diffusion: ")
    assert done.stderr.endswith(f"; it fits `model.family` {family}\n")


def test_the_package_runs_as_a_module() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "cdpo_ray", "check", str(QUICKSTART), "training.beta=-1"],
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"ConfigError: {QUICKSTART}: 1 fault\n  `training.beta` must be > 0, got -1\n"


def test_questions_are_written_once_for_each_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cdpo_ray.rewards import kept_answers

    monkeypatch.setattr(kept_answers, "KEPT_DIR", tmp_path / "answers")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert main(["questions", str(QUICKSTART)]) == 2
    assert "`rewards.vqa.questions` is missing" in capsys.readouterr().err
    path = tmp_path / "q.jsonl"
    with CaptionServer(lambda _: saying('{"questions": [{"question": "Cats?", "answer": "yes"}]}')) as server:
        endpoint = f"{{url: '{server.url}', model: m, num_concurrent_requests: 1}}"
        prompts = ["prompts.train.count=12", "prompts.heldout.count=10"]
        command = ["questions", str(QUICKSTART), *prompts, f"rewards.vqa={{questions: {path}, endpoint: {endpoint}}}"]
        assert main(command) == 0
        assert len(server.requests) == 22 and len(read_questions(path)) == 22
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        assert main(command) == 0 and len(read_questions(path)) == 22
        assert len(server.requests) == 22, "the answer was kept"
    printed = capsys.readouterr().out.split("\n")
    assert printed[0].startswith(f"{path}: wrote the questions of 22 prompts, 0 prompts already had some; 22 req")
    assert printed[1].startswith(f"{path}: wrote the questions of 1 prompts, 21 prompts already had some; 0 req")
