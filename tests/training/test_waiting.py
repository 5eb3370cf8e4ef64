"""How long a worker waits for another."""

import os
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.distributed import distributed_c10d
from worker_processes import FORKED

from cdpo_ray.training.engine import limit_waiting, start_engine
from cdpo_ray.training.job import Optimization

SECONDS = 7


def timeouts_under(zero_stages: tuple[int, ...], store: Path) -> list[tuple[int, list[timedelta]]]:
    """The timeout of every group that exists once an engine of each ZeRO stage was started; in a process of its own."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    found = []
    for stage in zero_stages:
        net = nn.Linear(2, 2)
        optimization = Optimization(1e-3, 0.0, 0.9, 0.999, 1.0, 1, 1, zero_stage=stage)
        engine = start_engine(net, list(net.parameters()), optimization, num_workers=1)
        limit_waiting(engine, SECONDS)
        groups = distributed_c10d._world.pg_map
        found.append((stage, [group._get_backend(torch.device("cpu")).options._timeout for group in groups]))
    return found


def test_every_group_of_an_engine_waits_as_long_as_it_is_let(tmp_path: Path) -> None:
    with FORKED.Pool(1) as pool:
        found = pool.apply(timeouts_under, ((0, 2, 3), tmp_path / "store"))
    for stage, timeouts in found:
        assert len(timeouts) >= 2, "DeepSpeed makes a group of its own"
        assert set(timeouts) == {timedelta(seconds=SECONDS)}, f"ZeRO {stage}: a group that DeepSpeed made waits longer"
