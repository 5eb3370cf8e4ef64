"""Actor pools on GPUs that exist only in Ray's resources: scheduling is tested, not computation."""

import subprocess
import sys

import pytest

POOL = """
import os, secrets
from cdpo_ray.session import _ENVIRONMENT
os.environ |= _ENVIRONMENT | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
import pyarrow as pa, ray, ray.data
ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         resources={"accelerator_type:L4": 1}, labels={"market": "spot"})
from cdpo_ray.config import Pool
from cdpo_ray.run import cluster_gpu
from cdpo_ray.session import cluster_nodes, map_on_nodes
from cdpo_ray.dataflow.streams import in_pool

class Sizes:
    def __call__(self, rows):
        import ray
        return rows.append_column("size", pa.array([rows.num_rows] * rows.num_rows)).append_column(
            "gpus", pa.array([len(ray.get_gpu_ids())] * rows.num_rows))

ray.data.DataContext.get_current().enable_progress_bars = False
ray.data.DataContext.get_current().execution_options.preserve_order = True
blocks = [pa.table({"row": [0, 1, 2]}), pa.table({"row": [3]}), pa.table({"row": [4, 5, 6]})]
found = in_pool(ray.data.from_blocks(blocks), Sizes, Pool(gpus_per_actor=1, node_labels={"market": "spot"}),
                rows_per_call=None).take_all()
nodes, _ = cluster_nodes()
assert nodes[0].labels["market"] == "spot"
elsewhere = ray.remote(num_cpus=0, label_selector={"market": "on-demand"})(lambda: None).remote()
assert not ray.wait([elsewhere], timeout=2)[0], "labels are enforced"
pids = [*map_on_nodes(lambda item: (item, os.getpid()), range(5))]  # one after another on one node, in order
assert [item for item, _ in pids] == [*range(5)] and os.getpid() not in dict(pids).values()
print([(one["row"], one["size"], one["gpus"]) for one in found], cluster_gpu(cluster_nodes()[0]).name)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_pool_on_gpus_receives_whole_blocks_and_the_gpu_model_is_known() -> None:
    found = subprocess.run([sys.executable, "-c", POOL], capture_output=True, text=True, timeout=300)
    sizes = [(0, 3), (1, 3), (2, 3), (3, 1), (4, 3), (5, 3), (6, 3)]
    assert found.stdout.strip().endswith(f"{[(row, size, 1) for row, size in sizes]} l4"), found.stderr[-2000:]
