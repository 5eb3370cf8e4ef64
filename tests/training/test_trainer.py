"""`cdpo train` on a local Ray cluster, with workers and driver killed, stopped and interrupted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

CDPO = Path(sys.executable).with_name("cdpo")
SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
UPDATES_PER_STAGE, NUM_STAGES, UPDATES_PER_COMMIT = 60, 2, 7
COMMITS = Path("4-training.partial") / "commits"

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def config(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smoke run with its pairs drawn, ready for training."""
    folder = tmp_path_factory.mktemp("trainer")
    values = yaml.safe_load(SMOKE.read_text())
    values["run"] = {"name": "quiet", "dir": str(folder)}
    values["curriculum"] |= {"num_stages": NUM_STAGES, "updates_per_stage": UPDATES_PER_STAGE}
    values["training"] |= {
        "num_workers": 2,
        "updates_per_commit": UPDATES_PER_COMMIT,
        "max_restarts": 2,
        "collective_timeout_seconds": 20,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    for verb in ("generate", "score", "pairs"):
        subprocess.run([CDPO, verb, path], check=True, capture_output=True, env=environment(folder))
    return path


@pytest.fixture(scope="module")
def quiet(config: Path) -> dict[str, torch.Tensor]:
    """Weights of an undisturbed training."""
    subprocess.run([CDPO, "train", config], check=True, capture_output=True, env=environment(config.parent))
    return lora(config.parent / "quiet")


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}


def lora(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "4-training" / "lora" / "pytorch_lora_weights.safetensors")


def a_run(config: Path, name: str) -> Path:
    """Another run with the pairs of the quiet one."""
    run = config.parent / name
    run.mkdir()
    for step in ("1-samples", "2-scores", "3-stages"):
        (run / step).symlink_to(config.parent / "quiet" / step)
    return run


@contextmanager
def training(config: Path, name: str, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    command = [CDPO, "train", config, f"run.name={name}", *overrides]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment(config.parent), start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(what: Callable[[], object], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def committed(run: Path, num_updates: int) -> bool:
    return (run / COMMITS / f"update-{num_updates:06d}" / "manifest.json").is_file()


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = [child for child in descendants(process) if "RayTrainWorker" in "".join(child.cmdline())]
    assert len(found) == 2
    return found


def assert_same(run: Path, expected: dict[str, torch.Tensor]) -> None:
    found = lora(run)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.nightly
def test_fault_01_a_killed_worker_is_replaced_and_the_weights_are_identical(
    config: Path, quiet: dict[str, torch.Tensor]
) -> None:
    run = a_run(config, "worker-killed")
    with training(config, run.name) as process:
        wait_for(lambda: committed(run, 2 * UPDATES_PER_COMMIT))
        workers(process)[1].kill()
        _, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    assert "training resumes after update" in log
    assert_same(run, quiet)


@pytest.mark.nightly
def test_fault_16_a_stopped_worker_is_reported_and_replaced_after_the_collective_timeout(
    config: Path, quiet: dict[str, torch.Tensor]
) -> None:
    run = a_run(config, "worker-stopped")
    with training(config, run.name, "training.collective_timeout_seconds=8") as process:
        wait_for(lambda: committed(run, 2 * UPDATES_PER_COMMIT))
        stopped = workers(process)[1]
        stopped.suspend()
        _, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    assert f"(pid {stopped.pid} on " in log and "no heartbeat for" in log
    assert_same(run, quiet)
    assert_gone([stopped])


@pytest.mark.nightly
def test_fault_03_and_13_training_resumes_from_our_checkpoints_after_a_killed_driver_whatever_ray_stored(
    config: Path, quiet: dict[str, torch.Tensor]
) -> None:
    run = a_run(config, "driver-killed")
    with training(config, run.name) as process:
        wait_for(lambda: committed(run, 2 * UPDATES_PER_COMMIT))
        left = workers(process)
        process.kill()
        process.wait()
    assert_gone(left)  # two of Ray's agents notice only after a minute
    for kept in config.parent.rglob("*snapshot*.json"):
        kept.write_text("")
    with training(config, run.name) as process:
        _, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    assert "training resumes after update" in log
    assert_same(run, quiet)


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_fault_04_one_signal_writes_a_checkpoint_and_leaves_no_process(
    config: Path, quiet: dict[str, torch.Tensor], number: signal.Signals
) -> None:
    run = a_run(config, number.name)
    with training(config, run.name) as process:
        wait_for(lambda: committed(run, UPDATES_PER_COMMIT))
        left = descendants(process)
        process.send_signal(number)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 128 + number, log
    assert "stopping at the end of this update" in log and "run the same command again to resume" in log
    (*_, newest) = sorted(path.name for path in (run / COMMITS).iterdir())
    assert int(newest.removeprefix("update-")) % UPDATES_PER_COMMIT, "committed out of turn"
    assert_gone(left)
    with training(config, run.name) as process:
        _, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    assert f"resumes after update {int(newest.removeprefix('update-'))} " in log
    assert_same(run, quiet)


@pytest.mark.nightly
def test_fault_57_sigterm_to_the_process_group_acts_as_one_ctrl_c(config: Path, quiet: dict[str, torch.Tensor]) -> None:
    run = a_run(config, "group")
    with training(config, run.name) as process:
        wait_for(lambda: committed(run, UPDATES_PER_COMMIT))
        left = descendants(process)
        os.killpg(process.pid, signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 143, log
    assert "stopping at the end of this update" in log and "run the same command again to resume" in log
    (*_, newest) = sorted(path.name for path in (run / COMMITS).iterdir())
    assert int(newest.removeprefix("update-")) % UPDATES_PER_COMMIT, "committed out of turn"
    assert_gone(left)


@pytest.mark.nightly
def test_fault_57_sigterm_to_every_process_keeps_the_last_checkpoint(
    config: Path, quiet: dict[str, torch.Tensor]
) -> None:
    run = a_run(config, "everyone")
    with training(config, run.name) as process:
        wait_for(lambda: committed(run, UPDATES_PER_COMMIT))
        left = descendants(process)
        for each in (*left, process):  # as systemd does
            each.send_signal(signal.SIGTERM)
        started = time.monotonic()
        _, log = process.communicate(timeout=90)
    # If the driver loses its raylet before it handles the signal, Ray's library exits with 1 and logs nothing.
    assert process.returncode in (143, 1), log
    assert ("run the same command again to resume" in log) == (process.returncode == 143) and "Traceback" not in log
    assert time.monotonic() - started < 40
    assert_gone(left)
    with training(config, run.name) as process:
        _, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    assert "training resumes after update" in log
    assert_same(run, quiet)


@pytest.mark.nightly
def test_fault_04_a_second_signal_exits_at_once(config: Path, quiet: dict[str, torch.Tensor]) -> None:
    run = a_run(config, "twice")
    with training(config, run.name) as process:
        wait_for(lambda: committed(run, UPDATES_PER_COMMIT))
        left = descendants(process)
        for worker in workers(process):
            worker.suspend()  # so that the first signal has no effect
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, log = process.communicate(timeout=60)
    assert process.returncode == 130, log
    assert time.monotonic() - started < 20
    assert_gone(left)


@pytest.mark.nightly
def test_fault_15_training_started_with_another_beta_is_refused_with_the_difference_unless_allowed(
    config: Path, quiet: dict[str, torch.Tensor]
) -> None:
    run = a_run(config, "beta")
    with training(config, run.name) as process:
        wait_for(lambda: committed(run, UPDATES_PER_COMMIT))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    with training(config, run.name, "training.beta=150") as process:
        _, log = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "`training.beta` = " in log and "config says 150.0" in log
    with training(config, run.name, "training.beta=150", "--allow-config-change") as process:
        _, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    assert any(not torch.equal(value, quiet[name]) for name, value in lora(run).items())
    manifest = yaml.safe_load((run / "4-training" / "manifest.json").read_text())
    assert "`training.beta`" in str(manifest["details"]["settings_changed"])
