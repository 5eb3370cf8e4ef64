"""All steps of a run without Ray: pools in this process, training in processes forked from one that is ready."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from worker_processes import run_workers

from cdpo_ray.records import COMMITS_DIR
from cdpo_ray.resources import Node
from cdpo_ray.training.commits import newest_of, state_of
from cdpo_ray.training.job import TrainingJob


class Rows:
    """What pools use of `ray.data.Dataset`: tables, made one after another when they are read."""

    def __init__(self, blocks: Iterable[pa.Table]) -> None:
        self.blocks = blocks

    def map_batches(self, call: Callable[..., pa.Table], *, fn_kwargs: Any = None, **options: Any) -> "Rows":
        return Rows(call(block, **(fn_kwargs or {})) for block in self.blocks)

    def set_name(self, name: str) -> None:
        pass

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for block in self.blocks:
            yield from block.to_pylist()


class _Remote:
    """An actor whose answers nobody reads."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: None)


def _in_pool(rows: Rows, plain_class: Callable[..., Any], pool: Any, *, rows_per_call: Any, **arguments: Any) -> Rows:
    from ray import cloudpickle

    arguments = cloudpickle.loads(cloudpickle.dumps(arguments))  # as they reach an actor
    return rows.map_batches(plain_class(**arguments))


def _train(rank: int, job: TrainingJob, num_workers: int, rendezvous: str) -> None:
    from cdpo_ray.training import worker

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_workers)}
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=num_workers)
    context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: num_workers)
    train = SimpleNamespace(get_context=lambda: context, report=lambda summary: None)
    worker.ray = SimpleNamespace(train=train)  # type: ignore[assignment]
    worker.Worker(job, _Remote()).train(lambda: False)
    torch.distributed.destroy_process_group()


def _train_adapter(job: TrainingJob, *_: Any, num_workers: int | None = None, **options: Any) -> dict[str, Any]:
    from cdpo_ray.training.trainer import write_history

    num_workers, output_dir = num_workers or job.training.num_workers, Path(job.output_dir)
    with tempfile.TemporaryDirectory() as folder:
        run_workers(_train, job, num_workers, f"file://{folder}/rendezvous", num_workers=num_workers)
    newest, _ = newest_of(output_dir / COMMITS_DIR)
    assert newest
    saved = state_of(newest)
    write_history(saved, output_dir)
    state: dict[str, Any] = saved["state"]
    return state


@contextmanager
def without_ray() -> Iterator[None]:
    """`run_steps` in the block starts no Ray; judges must be in the generators (fused)."""
    streams = SimpleNamespace(
        remote=lambda **options: lambda call: SimpleNamespace(remote=call), get=lambda results: results
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cdpo_ray.run.ray_session", lambda **options: nullcontext())
        patch.setattr("cdpo_ray.run.cluster_nodes", lambda: ([Node("this", 4.0)], False))
        patch.setattr("cdpo_ray.dataflow.streams.ray", streams)
        patch.setattr("cdpo_ray.generation.pool.ray", SimpleNamespace(data=SimpleNamespace(from_arrow=Rows)))
        for pool in ("generation", "evaluation"):
            patch.setattr(f"cdpo_ray.{pool}.pool.in_pool", _in_pool)
        patch.setattr("cdpo_ray.training.trainer.train_adapter", _train_adapter)
        yield
