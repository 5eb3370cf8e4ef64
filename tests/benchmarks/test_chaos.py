"""Chaos benchmark: comparison of two runs, and selection of moments; starts no run."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chaos.py"
STEPS = {"generate", "score", "pairs", "train", "evaluate", "report", "export", "import", "tune"}


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chaos", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_every_step_has_moments_and_their_selection_depends_on_the_seed_only(chaos: ModuleType) -> None:
    everything = [moment for moments in chaos.chosen("", None, 0).values() for moment in moments]
    assert {moment.step for moment in everything} == STEPS
    some = [moment for moments in chaos.chosen("", 20, 3).values() for moment in moments]
    assert len(some) == 20 and [moment for moment in everything if moment in some] == some, "in order"
    assert chaos.chosen("", 20, 3) == chaos.chosen("", 20, 3) != chaos.chosen("", 20, 4)
    (moments,) = chaos.chosen("^tune: .*driver$", None, 0).values()
    assert {(moment.step, moment.victim) for moment in moments} == {("tune", "driver")}


def test_only_times_may_differ(chaos: ModuleType, tmp_path: Path) -> None:
    for root, seconds in (("quiet", 1.5), ("chaos", 9.25)):
        write(tmp_path / root / "run" / "4-training" / "stages.json", json.dumps([{"loss": 0.5, "seconds": seconds}]))
        write(tmp_path / root / "run" / "4-training" / "updates.jsonl", '{"loss": 0.5}\n')
        write(tmp_path / root / "run" / "status.json", json.dumps({"pid": seconds}))
        write(tmp_path / root / "run" / "report.html", f"<p>0.8125 in {seconds:.1f} s, 2026-11-26T12:00:0{seconds:.0f}")

    def found() -> list[str]:
        return chaos.compared(tmp_path / "quiet", tmp_path / "chaos")[1]

    assert found() == []
    run = tmp_path / "chaos" / "run"
    write(run / "4-training" / "updates.jsonl", '{"loss": 0.6}\n')
    write(run / "report.html", "<p>0.8126 in 9.2 s, 2026-11-26T12:00:09")
    write(run / "2-scores.partial" / "settings.json", "{}")
    write(run / "best.yaml.tmp", "")
    (run / "4-training" / "stages.json").unlink()
    assert found() == [
        "run/2-scores.partial: was left over",
        "run/2-scores.partial/settings.json: was left over",
        "run/4-training/stages.json: is missing",
        "run/4-training/updates.jsonl: differs",
        "run/best.yaml.tmp: was left over",
        "run/report.html: differs",
    ]


def test_an_event_is_a_change_since_its_watch_started(chaos: ModuleType, tmp_path: Path) -> None:
    log, old = write(tmp_path / "log", "train ...\n"), write(tmp_path / "1-samples.partial" / "parts" / "0.parquet", "")
    line, part = chaos.Logs(r"train \.\.\."), chaos.Appears("1-samples.partial/parts/*.parquet")
    rename = chaos.Renames("1-samples")
    logged, appeared, renamed = (event.watch(tmp_path, log) for event in (line, part, rename))
    assert not (logged() or appeared() or renamed())
    log.write_text("train ...\ntrain ...\n")
    os.utime(old, ns=(1, 1))  # as if rewritten
    write(tmp_path / "1-samples.partial" / "manifest.json", "{}")
    assert logged() and appeared() and renamed()
    assert chaos.state_of(tmp_path) == "1-samples.partial: manifest written, not renamed"


def test_a_rewritten_checkpoint_is_a_repeated_update(chaos: ModuleType, tmp_path: Path) -> None:
    commits = chaos.Commits(tmp_path)
    manifests = [tmp_path / f"4-training.partial/commits/update-00000{number}/manifest.json" for number in (1, 2)]
    for time_ns, path in enumerate((*manifests, manifests[1])):
        os.utime(write(path, "{}"), ns=(time_ns, time_ns))
        commits.look()
        commits.look()
    assert commits.num_repeated == 1
