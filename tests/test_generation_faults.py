"""Actors, nodes and drivers that die while images are made: every image once, the same bytes."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.nightly]

NUM_PROMPTS, PIECES = 24, 2


class Generation:
    """`cdpo generate` in a process of its own, whose actors tell what they make."""

    def __init__(self, model: Path, folder: Path, name: str, *, num_actors: int = 1, **environment: str) -> None:
        values: dict[str, Any] = {
            "run": {"name": name, "dir": ".", "seed": 3},
            "prompts": {
                "train": {"source": "animals", "count": NUM_PROMPTS},
                "heldout": {"source": "scenes", "count": 2},
            },
            "model": {"path": str(model)},
            "generation": {
                "images_per_prompt": 4,
                "num_denoising_steps": 2,
                "guidance_scale": 2.0,
                "images_per_batch": 2,
            },
            "rewards": {"names": ["own_rewards:slow_and_logged"]},
            "curriculum": {"num_stages": 2, "updates_per_stage": 1},
            "training": {"beta": 500, "learning_rate": 1e-3, "global_batch_size": 4},
            "evaluation": {"images_per_prompt": 2, "judges": ["jpeg_size"]},
            "resources": {"generators": {"num_actors": num_actors}},
        }
        folder.mkdir(exist_ok=True)
        self.config_path, self.num_started = folder / f"{name}.json", 0
        self.config_path.write_text(json.dumps(values))
        self.step_dir, self.aside = folder / name / "1-samples", folder / name / "1-samples.partial"
        self.environment = os.environ | environment
        self.process: subprocess.Popen[str] | None = None

    @property
    def log_path(self) -> Path:
        """Each attempt has its own: for a moment, actors outlive a driver that was killed."""
        return self.config_path.with_suffix(f".{self.num_started}.log")

    def start(self) -> None:
        self.num_started += 1
        self.log_path.write_text("")
        command = [Path(sys.executable).with_name("cdpo"), "generate", self.config_path]
        tests = Path(__file__).parent
        environment = self.environment | {"PYTHONPATH": str(tests), "OWN_REWARDS_LOG": str(self.log_path)}
        self.process = subprocess.Popen(
            command, cwd=self.config_path.parent, env=environment, stderr=subprocess.PIPE, text=True
        )

    def wait(self) -> None:
        assert self.process is not None
        _, stderr = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, stderr

    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_path.read_text().splitlines(keepends=True) if line[-1] == "\n"]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1200):
            if condition():
                return
            assert self.process is not None
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
            time.sleep(0.1)
        raise TimeoutError

    def shards(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.step_dir.glob("*.parquet")}


@pytest.fixture(scope="module")
def undisturbed(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    generation = Generation(tiny_sd15, tmp_path_factory.mktemp("undisturbed"), "quiet")
    generation.start()
    generation.wait()
    shards = generation.shards()
    assert list(shards) == ["samples-000000000000.parquet"]
    assert [len(call["prompts"]) for call in generation.calls()] == [1] * PIECES * NUM_PROMPTS
    return shards


def test_fault_06_an_actor_that_is_killed_changes_no_byte(
    undisturbed: dict[str, bytes], tiny_sd15: Path, tmp_path: Path
) -> None:
    generation = Generation(tiny_sd15, tmp_path, "actor")
    generation.start()
    generation.wait_until(lambda: len(generation.calls()) >= 5)
    os.kill(generation.calls()[-1]["pid"], signal.SIGKILL)
    generation.wait()
    assert len({call["pid"] for call in generation.calls()}) == 2, "another actor took over"
    assert generation.shards() == undisturbed


def test_fault_03_a_killed_driver_goes_on_by_the_same_command_and_makes_nothing_twice(
    undisturbed: dict[str, bytes], tiny_sd15: Path, tmp_path: Path
) -> None:
    generation = Generation(tiny_sd15, tmp_path, "driver")
    generation.start()
    parts = generation.aside / "parts"
    generation.wait_until(lambda: len(list(parts.glob("*.parquet"))) >= 6)
    assert generation.process is not None
    generation.process.send_signal(signal.SIGKILL)
    generation.process.wait()
    assert not generation.step_dir.exists()
    made = Counter(prompt for path in parts.glob("*.parquet") for prompt in pq.read_table(path)["prompt"].to_pylist())
    assert made.total() >= 6
    generation.start()
    generation.wait()
    made_again = Counter(prompt for call in generation.calls() for prompt in call["prompts"])
    assert made_again and made + made_again == Counter(dict.fromkeys(made + made_again, PIECES))
    assert len(made + made_again) == NUM_PROMPTS
    assert generation.shards() == undisturbed


def test_fault_05_a_node_lost_midway_loses_and_doubles_no_image(
    undisturbed: dict[str, bytes], tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short_dir:
        monkeypatch.setenv("RAY_TMPDIR", short_dir)  # else its address becomes every other program's "auto"
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # of the nodes' workers
        monkeypatch.setenv("OWN_REWARDS_LOG", str(tmp_path / "node.1.log"))
        shards, table = one_node_lost(tiny_sd15, tmp_path)
    assert table["prompt_index"].to_pylist() == list(range(NUM_PROMPTS))
    assert shards == undisturbed


def one_node_lost(model: Path, folder: Path) -> tuple[dict[str, bytes], pa.Table]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
        cluster.wait_for_nodes()
        generation = Generation(model, folder, "node", num_actors=3, RAY_ADDRESS=cluster.address)
        generation.start()
        generation.wait_until(
            lambda: (
                len(generation.calls()) >= 6
                and any(call["node"] == node.node_id for call in generation.calls() for node in nodes)
            )
        )
        at_work = [call["node"] for call in generation.calls()]
        lost = next(node for node in nodes if node.node_id in at_work)
        num_before = len(at_work)
        cluster.remove_node(lost, allow_graceful=False)
        generation.wait()
        assert len(generation.calls()) > num_before
    finally:
        cluster.shutdown()
    (shard,) = generation.step_dir.glob("*.parquet")
    return generation.shards(), pq.read_table(shard, columns=["prompt_index", "latents"])
