"""Generation on many simulated nodes of one machine, with and without losses of nodes; actors wait instead of working.

    python benchmarks/simulated_cluster.py --nodes 16                       # is every actor busy, and memory constant?
    python benchmarks/simulated_cluster.py --nodes 8 --gpus 8 --seconds 20  # 64 actors
    python benchmarks/simulated_cluster.py --nodes 4 --losses 5             # is every image there once; what is redone?

A node is a real Ray node (raylet, agents, object store, workers) with logical GPUs, in `ray.cluster_utils.Cluster`.
The stream is the package's: calls, pool, parts and shards. Only the generator is replaced, by `Sleeper`. The exit code
is 1 if an image is missing or exists twice, if the driver's memory grows by `MAX_GROWTH`, or if an actor is busy less
than `MIN_BUSY` of the time (with losses: if more than `MAX_REDONE` of the calls are started again).
"""

import argparse
import json
import os
import random
import resource
import secrets
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

MIN_BUSY, MAX_REDONE, MAX_GROWTH = 0.90, 0.05, 0.10
START_SECONDS = 600.0
ATTEMPTS = 5
PIXELS = 8


class Sleeper:
    """Stands in for `Generator`: waits instead of computing, and returns rows of the same form with tiny images.

    Args:
        log_dir: folder with one log per actor, of the start and the end of each call.
        seconds: duration of a call.
        num_actors: number of actors that must be ready before the first call, so that start-up is not measured.
    """

    def __init__(self, log_dir: str, seconds: float, num_actors: int) -> None:
        self.log, self.seconds = Path(log_dir) / f"{time.time():.6f}-{os.getpid()}.log", seconds
        self._write("ready")
        until = time.monotonic() + START_SECONDS
        while len(list(Path(log_dir).glob("*.log"))) < num_actors and time.monotonic() < until:
            time.sleep(0.1)

    def __call__(self, rows: pa.Table) -> pa.Table:
        prompt, first, end = (rows[name][0].as_py() for name in ("prompt_index", "image_start", "image_stop"))
        self._write("start", prompt, first)
        time.sleep(self.seconds)
        images = np.arange(first, end)
        latents = (prompt * 1000 + images).astype(np.float32).reshape(1, -1, 1)
        pixels = np.broadcast_to(
            images.astype(np.uint8)[None, :, None, None, None], (1, len(images), 3, PIXELS, PIXELS)
        )
        for name, values in (("latents", latents), ("pixels", pixels)):
            column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
            rows = rows.append_column(name, column)
        self._write("end", prompt, first)
        return rows

    def _write(self, *what: Any) -> None:
        with self.log.open("a") as log:
            log.write(json.dumps([time.time(), *what]) + "\n")


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        num_calls: number of calls that the images need.
        calls: start and end of each call that was started, by actor; an end of `None`: lost with its node.
        seconds: from the first call's start until the shards are written.
        faults: images that are missing or exist twice.
        driver_cpu_seconds: processor time of the driver's process.
        ready_seconds: from the stream's start until its first actor is ready.
        rss_mib: private memory of the driver's process, once a second.
    """

    num_calls: int
    calls: dict[str, list[tuple[float, float | None]]]
    seconds: float
    faults: list[str]
    driver_cpu_seconds: float
    ready_seconds: float
    rss_mib: list[float] = field(default_factory=list)

    @property
    def num_started(self) -> int:
        return sum(map(len, self.calls.values()))

    @property
    def redone(self) -> float:
        """Calls that were started more often than needed, as a share of those needed."""
        return self.num_started / self.num_calls - 1

    @property
    def rate(self) -> float:
        """Calls per second between the first start and the last end."""
        starts, ends = zip(*(call for calls in self.calls.values() for call in calls), strict=True)
        return self.num_calls / (max(end for end in ends if end) - min(starts))

    def busy(self) -> list[float]:
        """Share of the time, from the first start to the last end of all calls, that each actor spent in calls."""
        every = [call for calls in self.calls.values() for call in calls]
        first, last = min(start for start, _ in every), max(end for _, end in every if end)
        return [sum((end or last) - start for start, end in calls) / (last - first) for calls in self.calls.values()]


def generate(
    num_prompts: int,
    images_per_prompt: int,
    images_per_batch: int,
    *,
    num_actors: int,
    seconds: float,
    log_dir: Path | None = None,
    **pool: float,
) -> Outcome:
    """Run a stream of calls through the package's pool and into shards, and check every image of the shards.

    Args:
        seconds: duration of a call.
        log_dir: empty folder for the actors' logs, which the caller may watch; `None`: a temporary one.
        pool: CPUs and GPUs per actor.
    """
    import ray.cloudpickle
    import ray.data

    from cdpo_ray.config import Pool
    from cdpo_ray.dataflow.parts import address_of
    from cdpo_ray.dataflow.streams import in_pool, write_shards
    from cdpo_ray.generation.generator import Sampling
    from cdpo_ray.generation.pool import calls_of
    from cdpo_ray.progress import Progress

    ray.cloudpickle.register_pickle_by_value(sys.modules[Sleeper.__module__])  # workers have no path to this folder
    with tempfile.TemporaryDirectory() as scratch:
        log_dir, output_dir = log_dir or Path(scratch) / "log", Path(scratch) / "samples"
        log_dir.mkdir(exist_ok=True)
        output_dir.mkdir()
        prompts = [f"prompt {number}" for number in range(num_prompts)]
        calls = calls_of(prompts, Sampling(0, images_per_prompt, 1, 1.0, None, None, images_per_batch), {}, set())
        began, before = time.time(), resource.getrusage(resource.RUSAGE_SELF)
        with memory_of_this_process() as rss_mib:
            rows = in_pool(
                ray.data.from_blocks(calls),
                Sleeper,
                Pool(num_actors=num_actors, **pool),  # type: ignore[arg-type]
                rows_per_call=None,
                num_calls=len(calls),
                log_dir=str(log_dir),
                seconds=seconds,
                num_actors=num_actors,
            )
            addresses = list(map(address_of, calls))
            write_shards(
                rows, output_dir, "samples", Progress(), expected=addresses, images_per_prompt=images_per_prompt
            )
        ended, after = time.time(), resource.getrusage(resource.RUSAGE_SELF)
        logged = calls_in(log_dir)
        first = min(start for found in logged.values() for start, _ in found)
        cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        faults = faults_of(output_dir, num_prompts, images_per_prompt)
        ready_seconds = min(float(path.stem.partition("-")[0]) for path in log_dir.glob("*.log")) - began
        return Outcome(len(calls), logged, ended - first, faults, cpu_seconds, ready_seconds, rss_mib)


def calls_in(log_dir: Path) -> dict[str, list[tuple[float, float | None]]]:
    """Calls by actor, of the actors that had any."""
    found: dict[str, list[tuple[float, float | None]]] = defaultdict(list)
    for path in log_dir.glob("*.log"):
        for at, what, *_ in map(json.loads, path.read_text().splitlines()):
            if what == "start":
                found[path.stem].append((at, None))
            elif what == "end":
                found[path.stem][-1] = (found[path.stem][-1][0], at)
    return dict(found)


def faults_of(output_dir: Path, num_prompts: int, images_per_prompt: int) -> list[str]:
    """Images of the shards that are missing, exist twice or are not those of their address."""
    latents: dict[int, list[Any]] = defaultdict(list)
    for shard in output_dir.glob("*.parquet"):
        table = pq.read_table(shard, columns=["prompt_index", "latents"])
        for index, values in zip(table["prompt_index"].to_pylist(), table["latents"].to_pylist(), strict=True):
            latents[index].append(np.ravel(values).astype(int) - index * 1000)
    counts = {index: Counter(np.concatenate(rows).tolist()) for index, rows in latents.items()}
    wanted = Counter(range(images_per_prompt))
    return [f"prompt {index}" for index in range(num_prompts) if counts.get(index) != wanted]


@contextmanager
def memory_of_this_process() -> Iterator[list[float]]:
    """Context manager that measures the private memory of this process once a second, in MiB."""
    found: list[float] = []
    done = threading.Event()

    def measure() -> None:
        while not done.wait(1.0):
            status = Path("/proc/self/status").read_text()
            found.append(int(status.partition("RssAnon:")[2].split()[0]) / 1024)

    thread = threading.Thread(target=measure, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def growth(rss_mib: list[float]) -> float:
    """Growth of memory from the second quarter of a run to the last one."""
    quarter = len(rss_mib) // 4
    return statistics.mean(rss_mib[-quarter:]) / statistics.mean(rss_mib[quarter : 2 * quarter]) - 1


@contextmanager
def simulated_cluster(num_nodes: int, add: Callable[[Any], Any]) -> Iterator[Any]:
    """Context manager around a head with two CPUs and ``num_nodes`` other nodes, see `add_node`.

    Nodes are started one after the other, and slowly, because each start takes seconds of the machine's CPU.
    """
    folder = tempfile.mkdtemp(prefix="sc-", dir="/tmp")  # paths of sockets must be short
    os.environ |= {
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_gcs_server_port_wait_time_s": "120",
        "RAY_agent_register_timeout_ms": "300000",
        "RAY_worker_register_timeout_seconds": "600",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # Agents of all nodes run on the one machine: at their default intervals they alone keep two cores busy, and
        # workers, whose priority is lower by default, do not start in time.
        "RAY_enable_metrics_collection": "0",
        "REPORTER_UPDATE_INTERVAL_MS": "120000",
        "DASHBOARD_AGENT_CHECK_PARENT_INTERVAL_S": "60",
        "RAY_worker_niceness": "0",
    }
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 2**29}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(num_nodes):
            add(cluster)
        yield cluster
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def add_node(cluster: Any, num_gpus: int) -> Any:
    """Start a node with one CPU per logical GPU.

    It is started again if its agents took more than the 15 s that Ray allows, as on a busy machine.
    """
    for attempt in range(ATTEMPTS):
        try:
            return cluster.add_node(num_cpus=num_gpus, num_gpus=num_gpus, object_store_memory=80 * 2**20)
        except Exception:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(10)
    return None


def memory_of_children() -> float:
    """Memory of all processes below this one, in GiB; pages that several share are divided among them."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 2**30


def lose_nodes(
    cluster: Any,
    count: int,
    every_seconds: float,
    generator: random.Random,
    done: threading.Event,
    log_dir: Path,
    num_gpus: int,
) -> None:
    """Kill a random node without warning, and start a new one, ``count`` times, from the first call on."""
    while count and not calls_in(log_dir) and not done.wait(1.0):
        pass
    for _ in range(count):
        if done.wait(every_seconds):
            return
        node = generator.choice(sorted(cluster.worker_nodes, key=lambda node: node.unique_id))
        cluster.remove_node(node, allow_graceful=False)
        add_node(cluster, num_gpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=1, help="logical GPUs per node, each with one actor")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--images", type=int, default=256, help="images per prompt")
    parser.add_argument("--batch", type=int, default=4, help="images per call")
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of a call")
    parser.add_argument("--losses", type=int, default=0, help="number of nodes to kill; each is replaced")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two losses")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes: list[float] = []
    num_actors = options.nodes * options.gpus

    def add(cluster: Any) -> None:
        add_node(cluster, options.gpus)
        sizes.append(memory_of_children())
        print(f"node {len(sizes)}: {sizes[-1]:.2f} GiB in all", flush=True)

    with tempfile.TemporaryDirectory() as logs, simulated_cluster(options.nodes, add) as cluster:
        import ray

        from cdpo_ray.session import ray_session

        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        while ray.available_resources().get("GPU", 0) < num_actors:  # the driver's view is seconds old
            time.sleep(1)
        found: list[Any] = []
        done = threading.Event()

        def work() -> None:
            try:
                with ray_session():
                    found.append(
                        generate(
                            options.prompts,
                            options.images,
                            options.batch,
                            num_actors=num_actors,
                            seconds=options.seconds,
                            log_dir=Path(logs),
                            cpus_per_actor=1,
                            gpus_per_actor=1,
                        )
                    )
            finally:
                done.set()

        thread = threading.Thread(target=work)
        thread.start()  # nodes are added from the main thread
        lose_nodes(cluster, options.losses, options.every, random.Random(options.seed), done, Path(logs), options.gpus)
        thread.join(5 if done.is_set() else None)
        at_end = memory_of_children()
    if not found:
        sys.exit("the run failed, see above")
    outcome: Outcome = found[0]
    busy, memory = sorted(outcome.busy()), outcome.rss_mib
    result = {
        "nodes": options.nodes,
        "actors": num_actors,
        "calls": outcome.num_calls,
        "calls_started": outcome.num_started,
        "seconds": round(outcome.seconds, 1),
        "goodput": round(outcome.num_calls / outcome.num_started, 4),
        "faults": outcome.faults,
        "busy_lowest_median_highest": [round(busy[0], 4), round(statistics.median(busy), 4), round(busy[-1], 4)],
        "driver_cpu_ms_per_call": round(1000 * outcome.driver_cpu_seconds / outcome.num_calls, 2),
        "driver_mib_first_highest_last": [round(each, 1) for each in (memory[0], max(memory), memory[-1])],
        "driver_memory_growth": round(growth(outcome.rss_mib), 4),
        "mib_per_node": round(1024 * (sizes[-1] - sizes[0]) / max(options.nodes - 1, 1)),
        "gib_at_end": round(at_end, 2),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    holds = not outcome.faults and result["driver_memory_growth"] < MAX_GROWTH
    holds &= outcome.redone < MAX_REDONE if options.losses else busy[0] > MIN_BUSY
    sys.exit(not holds)


if __name__ == "__main__":
    main()
