"""Reports of a stage, against values computed by hand."""

import errno
import fcntl
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cdpo_ray.errors import LockHeldError
from cdpo_ray.search import trial_run
from cdpo_ray.search.trial_run import stage_report
from cdpo_ray.store import RunFolder
from cdpo_ray.store.lock import LOCK

BASE = {
    "clip": np.array([[0.1, 0.2], [0.5, 0.3], [0.4, 0.4]]),
    "oracle": np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]),
}
SUMMARY = {
    "stage": 2,
    "loss": 0.6,
    "validation": {
        "scores": {"clip": [[0.2, 0.2], [0.4, 0.5]], "oracle": [[1.0, float("nan")], [float("nan")] * 2]},
        "diversity": [0.2, 0.4],
        "implicit_values": [[-1.0, 2.0], [-3.0, -2.0]],
    },
}


def report_of(judge: str = "clip") -> dict:
    return stage_report(SUMMARY, BASE, judge, is_last=False, num_resamples=200, seed=0)


@pytest.fixture
def lock_of_another_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lock file of a process that cannot be seen from here, renewed now; waiting ages it, and takes no time."""
    lock, waited = tmp_path / f"{LOCK}.held", [0.0]

    def flock(descriptor: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    def sleep(seconds: float) -> None:
        waited[0] += seconds
        renewed = lock.stat().st_mtime - seconds
        os.utime(lock, (renewed, renewed))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr("cdpo_ray.store.lock.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(trial_run, "time", SimpleNamespace(monotonic=lambda: waited[0], sleep=sleep))
    lock.write_text(json.dumps({"pid": 7, "host": "a node that is gone", "id": "x"}))
    return lock


def test_fault_28_a_trial_that_is_restarted_on_another_node_waits_for_the_lock_of_its_dead_process(
    lock_of_another_node: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, ran = RunFolder(lock_of_another_node.parent), []

    def steps() -> None:
        with run.locked():
            ran.append(True)

    with pytest.raises(LockHeldError, match=r"another run is writing here \(pid 7 on a node that is gone, "):
        steps()
    trial_run.once_unlocked(steps)
    assert ran == [True] and caplog.text.count("waiting for the lock of the process that this one replaces") == 1


def test_fault_28_a_trial_whose_lock_is_renewed_is_refused_in_the_end(lock_of_another_node: Path) -> None:
    calls = []

    def steps() -> None:
        os.utime(lock_of_another_node)  # as its holder does
        calls.append(True)
        with RunFolder(lock_of_another_node.parent).locked():
            pytest.fail("the lock was taken from a living process")

    with pytest.raises(LockHeldError, match=r"another run is writing here"):
        trial_run.once_unlocked(steps)
    assert len(calls) > 1


def test_a_policy_is_compared_with_the_base_on_the_measured_prompts() -> None:
    report = report_of()
    assert (report["stage"], report["is_last"], report["num_prompts"]) == (2, False, 2)
    # By clip: +0.1 and 0 on the first prompt, -0.1 and +0.2 on the second.
    assert report["reward"] == pytest.approx((0.05 + 0.05) / 2)
    assert report["win_rate"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert report["diversity"] == pytest.approx(0.3)
    assert report["by_prompt"]["clip"] == pytest.approx([0.05, 0.05])
    assert report["judges"]["clip"]["difference"]["mean"] == report["reward"]
    assert report["training"] == {"stage": 2, "loss": 0.6}


def test_implicit_accuracy_is_the_share_of_the_bases_pairs_in_the_order_of_the_judge() -> None:
    assert report_of("clip")["implicit_accuracy"] == 0.5, "0.1 < 0.2 as -1 < 2, but 0.5 > 0.3 against -3 < -2"
    assert report_of("oracle")["implicit_accuracy"] == 1.0, "the second prompt's images have equal oracle scores"


def test_images_without_a_score_are_excluded() -> None:
    report = report_of("oracle")
    assert report["reward"] == pytest.approx(1.0)
    assert report["judges"]["oracle"]["num_missing"] == 3
    assert report["by_prompt"]["oracle"] == [pytest.approx(1.0), None]
