"""A cluster with an autoscaler may have no node yet: the run says so, and waits."""

import secrets
import subprocess
import threading
import time
from pathlib import Path

import pytest
from ray_nodes import BIN, ROOT, environment, started, started_head

AUTOSCALED = {"RAY_enable_autoscaler_v2": "1", "RAY_NODE_TYPE_NAME": "head", "RAY_CLOUD_INSTANCE_ID": "i-0"}
"""What `ray up` sets for a head."""


@pytest.mark.ray
def test_only_an_autoscaler_that_has_groups_may_add_nodes() -> None:
    program = """if True:
        import json
        import ray
        from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
        from ray.experimental.internal_kv import _internal_kv_put
        from cdpo_ray.session import cluster_nodes
        ray.init(address="local", num_cpus=3, logging_level="ERROR")
        answers = [cluster_nodes()]
        for group in "node_" + ray.nodes()[0]["NodeID"], "head":
            status = {"autoscaler_report": {"active_nodes": {group: 1}}}  # as v1 writes it
            _internal_kv_put(DEBUG_AUTOSCALING_STATUS, json.dumps(status), overwrite=True)
            answers.append(cluster_nodes())
        print([(len(nodes), nodes[0].cpus, grows) for nodes, grows in answers])
    """
    done = subprocess.run(
        [BIN / "python", "-c", program],
        # v2 does not overwrite what is written here; with a token given, Ray writes none into the home folder
        env=environment(RAY_enable_autoscaler_v2="1", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)),
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[(1, 3.0, False), (1, 3.0, False), (1, 3.0, True)]"


@pytest.mark.ray
@pytest.mark.nightly
def test_a_run_waits_for_its_first_node_and_for_another_when_that_is_gone(tmp_path: Path) -> None:
    with started_head(tmp_path, num_cpus=0, **AUTOSCALED) as head:
        command = [BIN / "cdpo", "run", "configs/smoke.yaml", f"run.dir={tmp_path}", "--address", head.address]
        # Training requests its workers again after these seconds.
        environ = environment(**head.access, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="5")
        with subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True) as run:
            watchdog = threading.Timer(600, run.kill)
            watchdog.start()
            assert run.stderr is not None
            node = f"--address={head.address} --num-cpus=4"
            lines = []
            for line in run.stderr:
                lines.append(line)
                if "generate ..." in line:
                    break
            time.sleep(10)
            with started(node, tmp_path / "first.log", **head.access):
                for line in run.stderr:
                    lines.append(line)
                    if "train ..." in line:
                        break
            time.sleep(20)
            with started(node, tmp_path / "second.log", **head.access):
                lines += run.stderr
                run.wait()
            watchdog.cancel()
    log = "".join(lines)
    assert run.returncode == 0, log
    assert "`resources.generators`: generate needs 1 actor of 1 CPUs each, but the cluster has room for 0" in log
    assert "waiting for nodes from the autoscaler" in log
    assert (tmp_path / "smoke" / "report.html").is_file()
