"""Timeouts of collectives."""

import os
from datetime import timedelta
from pathlib import Path

import torch
from tiny_policies import training_section
from torch import nn
from torch.distributed import distributed_c10d
from worker_processes import FORKED

from cdpo_ray.training.engine import limit_waiting, start_engine

SECONDS = 7


def timeouts_under(zero_stages: tuple[int, ...], store: Path) -> list[tuple[int, list[timedelta]]]:
    """Timeouts of all process groups after starting an engine of each ZeRO stage; runs in a separate process."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    found = []
    for stage in zero_stages:
        net = nn.Linear(2, 2)
        section = training_section(weight_decay=0.0, global_batch_size=1, zero_stage=stage)
        engine = start_engine(net, list(net.parameters()), section, num_workers=1)
        limit_waiting(engine, SECONDS)
        groups = distributed_c10d._world.pg_map
        found.append((stage, [group._get_backend(torch.device("cpu")).options._timeout for group in groups]))
    return found


def test_every_process_group_of_an_engine_has_the_timeout(tmp_path: Path) -> None:
    with FORKED.Pool(1) as pool:
        found = pool.apply(timeouts_under, ((0, 2, 3), tmp_path / "store"))
    for stage, timeouts in found:
        assert len(timeouts) >= 2, "DeepSpeed makes a group of its own"
        assert set(timeouts) == {timedelta(seconds=SECONDS)}, f"ZeRO {stage}: a group that DeepSpeed made waits longer"
