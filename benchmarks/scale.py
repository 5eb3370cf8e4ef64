"""Model of a cluster, 1 to 1,024 GPUs: images and pairs per second, what limits them, and what failures cost.

    python benchmarks/scale.py                        # the table, from the constants in scale.json and the GPU's file
    python benchmarks/scale.py --preemptions 0.05     # with preemptions per node and hour, as on spot machines
    python benchmarks/scale.py --picture docs/pictures/scale.svg
    python benchmarks/scale.py --measure              # measure this machine's constants again: scale.json
    python benchmarks/scale.py --check                # predictions against runs on this machine: scale.json

Beyond one machine, this is a model, not a measurement. Its numbers are of three kinds, which `Cluster` keeps apart:
measured, taken from a source, and assumed.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

HERE = Path(__file__).parent
MEASURED = HERE / "scale.json"
OF_GPU = HERE / "gpu" / "nvidia-h200-2026-11-28.json"
GPU_COUNTS = (1, 8, 64, 256, 1024)
SCALES = 0.9
"""A rate scales up to the number of GPUs at which it is still this share of the rate of that many single GPUs."""


@dataclass(frozen=True)
class Cluster:
    """Constants of the model."""

    # Measured on a GPU, Stable Diffusion 1.5 at 512 px, compiled: `OF_GPU`.
    images_per_call: int
    call_seconds: float
    generator_compile_seconds: float
    update_seconds: Mapping[int, float]
    """Seconds of an update by number of pairs in its only launch, see `of_gpu`."""
    trainer_compile_seconds: float
    png_core_seconds: float
    png_bytes: float

    # Measured on the machine of `MEASURED`, which has slower cores than a server.
    driver_seconds: float
    """Processor time of the driver per call; its loop has one thread."""
    gap_seconds: float
    """Time between two calls of an actor."""
    write_core_seconds: float
    """Processor time of writing a part with encoded images: Parquet, SHA-256, file."""
    hash_bytes_per_second: float
    board_calls_per_second: float
    actor_start_seconds: float
    checkpoint_seconds: float

    # Sources.
    hours_per_failure: float = 50_700
    """GPU-hours: 419 unexpected interruptions of 16,384 GPUs in 54 days, arXiv:2407.21783, section 3.3.4."""
    write_requests_per_second: float = 3_500
    """PUT, COPY, POST and DELETE per second and prefix: the performance guidelines of Amazon S3."""
    request_seconds: float = 0.2
    """Latency of a small request; the same source names 100 to 200 ms."""
    reduce_latency_seconds: float = 60e-6
    """All-reduce of 8 bytes between nodes of 8 GPUs: github.com/NVIDIA/nccl/issues/318."""
    reduce_bytes_per_second: float = 12.9e9
    """Bus bandwidth of an all-reduce of 4 MiB over nodes, far below that of large messages: nccl/issues/1453."""

    # Assumptions.
    gpus_per_node: int = 8
    cores_per_gpu: float = 8
    node_bytes_per_second: float = 100e9 / 8
    """Network of a node, to the storage."""
    model_load_seconds: float = 30
    replacement_seconds: float = 300
    """Until a new node takes the place of a lost one; training waits for it, other generators do not."""
    preemptions_per_node_hour: float = 0
    adapter_bytes: float = 4 * 1_594_368
    """Gradients of a LoRA of rank 8 on the attention layers, fp32."""
    pairs_per_update: int = 2_048
    updates_per_checkpoint: int = 50
    max_pairs_per_launch: int = 16

    @property
    def failures_per_gpu_second(self) -> float:
        by_failure = 1 / self.hours_per_failure if self.hours_per_failure else 0.0
        return (by_failure + self.preemptions_per_node_hour / self.gpus_per_node) / 3600


def of_gpu(path: Path = OF_GPU) -> dict[str, Any]:
    """Constants of a GPU, from the results of `gpu_check.py`."""
    found: dict[str, Any] = {}
    for call in json.loads(path.read_text())["calls"]:
        found |= {name: result for name, result in call.items() if isinstance(result, dict)}
    generate = found["generate, stable_diffusion, 16 images, compiled"]
    train = found["train, stable_diffusion, 16 pairs, compiled"]
    eager = {pairs: found[f"train, stable_diffusion, {pairs} pairs, eager"]["seconds"] for pairs in (4, 8, 16)}
    png = found["host, png"]["512 px"]
    return {
        "images_per_call": 16,
        "call_seconds": generate["seconds"],
        "generator_compile_seconds": generate["first_seconds"] - generate["seconds"],
        # Compiled updates were measured with 16 pairs. Fewer pairs are assumed to take the same share as without
        # compilation, where 4 pairs take as long as 8: the host is the limit.
        "update_seconds": {pairs: train["seconds"] * seconds / eager[16] for pairs, seconds in eager.items()},
        "trainer_compile_seconds": train["first_seconds"] - train["seconds"],
        "png_core_seconds": png["ms_1_threads"] / 1000,
        "png_bytes": 1000 * png["kilobytes"],
    }


def cluster_of(measured: Path = MEASURED, gpu: Path = OF_GPU, **changes: Any) -> Cluster:
    """Constants of the model, from the two files."""
    here = json.loads(measured.read_text())["constants"]
    return dataclasses.replace(Cluster(**of_gpu(gpu), **here), **changes)


def stretch(work_seconds: float, failures_per_second: float, restart_seconds: float) -> float:
    """Expected time until a piece of work is done, relative to its time without failures.

    A failure loses the piece and costs a restart, during which another failure may occur. Exact for failures at random
    times: J. T. Daly, "A higher order estimate of the optimum checkpoint interval", 2006, equation 13 (without dump).
    """
    if failures_per_second == 0:
        return 1.0
    exponent = failures_per_second * work_seconds
    if failures_per_second * restart_seconds + exponent > 700:
        return math.inf
    return math.exp(failures_per_second * restart_seconds) * math.expm1(exponent) / exponent


class Rate(NamedTuple):
    """Items per second, what limits them, and the share of the time that failures cost."""

    per_second: float
    limit: str
    lost: float


def generation_limits(cluster: Cluster, gpus: float) -> dict[str, float]:
    """Calls per second that each resource allows, without failures."""
    bytes_per_call = cluster.images_per_call * cluster.png_bytes
    core_seconds = cluster.images_per_call * cluster.png_core_seconds + cluster.write_core_seconds
    core_seconds += 2 * bytes_per_call / cluster.hash_bytes_per_second  # to read a part, and to describe the shard
    nodes = max(gpus / cluster.gpus_per_node, 1 / cluster.gpus_per_node)
    return {
        "GPUs": gpus / (cluster.call_seconds + cluster.gap_seconds),
        "PNG encoding": gpus * cluster.cores_per_gpu / core_seconds if core_seconds else math.inf,
        "driver": 1 / cluster.driver_seconds if cluster.driver_seconds else math.inf,
        "storage requests": cluster.write_requests_per_second / 2,  # a part is written and deleted
        # The part, its way to the task that joins it, and the shard.
        "network": nodes * cluster.node_bytes_per_second / (3 * bytes_per_call) if bytes_per_call else math.inf,
    }


def generation_start_seconds(cluster: Cluster) -> float:
    return cluster.actor_start_seconds + cluster.model_load_seconds + cluster.generator_compile_seconds


def generation(cluster: Cluster, gpus: float) -> Rate:
    """Images per second after the start.

    A lost node repeats, on each of its GPUs, the call in progress and the one with unwritten images, and
    waits for its replacement and start; other nodes continue.
    """
    limits = generation_limits(cluster, gpus)
    limit = min(limits, key=lambda name: limits[name])
    nodes_failures = cluster.failures_per_gpu_second * min(gpus, cluster.gpus_per_node)
    restart = cluster.replacement_seconds + generation_start_seconds(cluster)
    slower = stretch(2 * cluster.call_seconds, nodes_failures, restart)
    rate = min(limits["GPUs"] / slower, limits[limit])
    return Rate(cluster.images_per_call * rate, limit, 1 - 1 / slower)


def generation_seconds(cluster: Cluster, gpus: float, num_images: float) -> float:
    """Duration of a step that generates this many images: start, and whole waves of calls."""
    calls = num_images / cluster.images_per_call
    steady = num_images / generation(cluster, gpus).per_second
    last_wave = (math.ceil(calls / gpus) - calls / gpus) * cluster.call_seconds
    return generation_start_seconds(cluster) + steady + last_wave


def launch_seconds(cluster: Cluster, pairs: float) -> float:
    """Seconds of a launch, interpolated between the measured sizes; fewer pairs than the smallest take as long."""
    sizes = sorted(cluster.update_seconds)
    return float(np.interp(pairs, sizes, [cluster.update_seconds[size] for size in sizes]))


def update_parts(cluster: Cluster, gpus: int, pairs_per_update: int | None = None) -> dict[str, float]:
    """Seconds of an update by cause, without failures; the first is the time that the GPUs need at their best rate."""
    pairs = (pairs_per_update or cluster.pairs_per_update) / gpus
    launches = math.ceil(pairs / cluster.max_pairs_per_launch)
    best = pairs * min(seconds / size for size, seconds in cluster.update_seconds.items())
    reduce_bytes = 2 * (gpus - 1) / gpus * cluster.adapter_bytes
    hops = math.ceil(math.log2(gpus)) / 3 if gpus > 1 else 0.0  # the source has 8 GPUs
    storage = 3 * cluster.request_seconds  # a share, the state and the manifest, one after the other
    return {
        "GPUs": best,
        "too few pairs per GPU": launches * launch_seconds(cluster, pairs / launches) - best,
        # The gradients, the flags of `Guard.verdict`; both wait for the slowest worker, which is not modelled.
        "all-reduce": reduce_bytes / cluster.reduce_bytes_per_second + 2 * hops * cluster.reduce_latency_seconds,
        "checkpoints": (cluster.checkpoint_seconds + storage) / cluster.updates_per_checkpoint,
    }


def training(cluster: Cluster, gpus: int, pairs_per_update: int | None = None) -> Rate:
    """Pairs per second after the start.

    A failure of any GPU stops all. They wait for the new node, start, and repeat the updates since the last checkpoint.
    """
    wanted = pairs_per_update or cluster.pairs_per_update
    if gpus > wanted:
        return Rate(0.0, "fewer pairs than GPUs", 0.0)
    parts = update_parts(cluster, gpus, wanted)
    seconds = sum(parts.values())
    restart = cluster.replacement_seconds + cluster.actor_start_seconds + cluster.model_load_seconds
    restart += cluster.trainer_compile_seconds
    slower = stretch(cluster.updates_per_checkpoint * seconds, cluster.failures_per_gpu_second * gpus, restart)
    parts["failures"] = (slower - 1) * seconds
    return Rate(wanted / (seconds * slower), max(parts, key=lambda name: parts[name]), 1 - 1 / slower)


def scales_to(rate: Callable[[int], float], largest: int = 2**17) -> int:
    """Largest power of two of GPUs whose rate is at least `SCALES` times that of as many single GPUs."""
    counts = itertools.takewhile(lambda count: count <= largest, (2**power for power in itertools.count()))
    return max(itertools.takewhile(lambda count: rate(count) >= SCALES * count * rate(1), counts))


def table(cluster: Cluster, num_images: int) -> str:
    """Markdown table of the model."""
    header = (
        "GPUs", "images/s", "limit", f"{num_images:,} images, hours", "lost to failures",
        f"pairs/s, {cluster.pairs_per_update:,} per update", "largest cost", "lost to failures",
        f"pairs/s, {cluster.max_pairs_per_launch} per GPU",
    )  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for gpus in GPU_COUNTS:
        made, trained = generation(cluster, gpus), training(cluster, gpus)
        grown = training(cluster, gpus, cluster.max_pairs_per_launch * gpus)
        hours = generation_seconds(cluster, gpus, num_images) / 3600
        cells = (
            f"{gpus:,}", f"{made.per_second:,.1f}", made.limit, f"{hours:,.2f}", share(made.lost),
            f"{trained.per_second:,.0f}", trained.limit, share(trained.lost), f"{grown.per_second:,.0f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share(value: float) -> str:
    return f"{value:.2%}".replace("%", " %")


def sentences(cluster: Cluster) -> list[str]:
    """Where the rates stop scaling, and how far the other limits are."""
    made = scales_to(lambda gpus: generation(cluster, gpus).per_second)
    fixed = scales_to(lambda gpus: training(cluster, gpus).per_second)
    grown = scales_to(lambda gpus: training(cluster, gpus, cluster.max_pairs_per_launch * gpus).per_second)
    limits = generation_limits(cluster, 1024)
    others = ", ".join(f"{name} {cluster.images_per_call * calls:,.0f}" for name, calls in limits.items())
    return [
        f"Generation scales ({SCALES:.0%}) to {made:,} GPUs; images/s that each resource allows at 1,024: {others}.",
        f"Training scales to {fixed:,} GPUs with {cluster.pairs_per_update:,} pairs per update, and to {grown:,} with"
        f" {cluster.max_pairs_per_launch} per GPU.",
        f"The board answers {cluster.board_calls_per_second:,.0f} heartbeats per second; 1,024 GPUs send"
        f" {1024 // cluster.gpus_per_node}, one per node.",
    ]


def picture(cluster: Cluster) -> str:
    """SVG of both rates by number of GPUs."""
    import matplotlib as mpl

    from cdpo_ray.pages.chart_style import BLUE, GREY, STYLE, VERMILLION
    from cdpo_ray.pages.svg import blank_figure, inline_svg

    counts = [2**power for power in range(13)]
    with mpl.rc_context(STYLE):
        figure = blank_figure(5.2, gap_inches=0.08)
        images, pairs = figure.subplots(2, 1, sharex=True)
        allowed = [generation_limits(cluster, gpus) for gpus in counts]
        for name, style in (("driver", "--"), ("storage requests", ":")):
            values = [cluster.images_per_call * limits[name] for limits in allowed]
            images.plot(counts, values, color=VERMILLION, ls=style, lw=1, label=f"limit: {name}")
        images.plot(counts, [gpus * generation(cluster, 1).per_second for gpus in counts], color=GREY, lw=1, ls="--")
        images.plot(
            counts, [generation(cluster, gpus).per_second for gpus in counts], color=BLUE, marker="o", markersize=3
        )
        images.set_title("images per second (model); grey: in proportion")
        images.legend(loc="lower right")
        grown = [training(cluster, gpus, cluster.max_pairs_per_launch * gpus).per_second for gpus in counts]
        fixed = [(gpus, training(cluster, gpus).per_second) for gpus in counts if gpus <= cluster.pairs_per_update]
        pairs.plot(counts, [gpus * training(cluster, 1).per_second for gpus in counts], color=GREY, lw=1, ls="--")
        pairs.plot(
            counts, grown, color=VERMILLION, marker="o", markersize=3, label=f"{cluster.max_pairs_per_launch} per GPU"
        )
        label = f"{cluster.pairs_per_update:,} per update"
        pairs.plot(*zip(*fixed, strict=True), color=BLUE, marker="o", markersize=3, label=label)
        pairs.set_title("pairs per second (model)")
        pairs.legend(loc="lower right")
        pairs.set_xlabel("GPUs")
        for axes in (images, pairs):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks([1, 8, 64, 256, 1024, 4096], ["1", "8", "64", "256", "1,024", "4,096"])
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.minorticks_off()
        svg = inline_svg(figure, "Modelled images and pairs per second by number of GPUs")
    return svg.replace("<svg ", '<svg style="background: #fff" ', 1)  # a page may be dark


def measure() -> dict[str, float]:
    """Constants of this machine."""
    from simulated_cluster import generate

    from cdpo_ray.session import ray_session
    from cdpo_ray.training.board import Board

    found = dict(_measure_files())
    with ray_session():
        import ray  # after the session has set Ray's environment

        generate(1, 8, 1, num_actors=1, seconds=0.0, cpus_per_actor=0.5)  # what a driver does once does not count
        small, large = (
            generate(4, size, 1, num_actors=1, seconds=0.0, cpus_per_actor=0.5) for size in (16, 116)
        )  # 64 and 464 calls
        found["driver_seconds"] = (large.driver_cpu_seconds - small.driver_cpu_seconds) / (
            large.num_calls - small.num_calls
        )
        paced = generate(1, 24, 1, num_actors=1, seconds=0.5, cpus_per_actor=0.5)
        (calls,) = paced.calls.values()
        found["gap_seconds"] = statistics.median(b[0] - (a[1] or 0) for a, b in itertools.pairwise(calls))
        found["actor_start_seconds"] = paced.ready_seconds
        board = ray.remote(Board).options(num_cpus=0).remote()
        ray.get(board.heartbeats_of.remote({}))
        of_node = [{8 * node + rank: ("pid 1 on node", 0.0) for rank in range(8)} for node in range(2000)]
        started = time.perf_counter()
        ray.get(list(map(board.heartbeats_of.remote, of_node)))
        found["board_calls_per_second"] = 2000 / (time.perf_counter() - started)
    return found


def _measure_files() -> Mapping[str, float]:
    """Processor time of writing a part, and of hashing."""
    import hashlib

    import pyarrow as pa

    from cdpo_ray.dataflow.images import PNGS
    from cdpo_ray.dataflow.parts import write_part

    rng = np.random.default_rng(0)
    images = [rng.bytes(453_000) for _ in range(16)]
    latents = pa.FixedShapeTensorArray.from_numpy_ndarray(rng.random((1, 16, 4, 64, 64)).astype(np.float16))
    rows = pa.table({"prompt_index": [0], "image_start": [0], "image_stop": [16], "latents": latents})
    rows = rows.append_column("images", pa.array([images], PNGS))
    content = rng.bytes(2**26)

    def seconds(work: Callable[[], Any]) -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    with tempfile.TemporaryDirectory() as folder:
        written = [seconds(functools.partial(write_part, rows, parts_dir=Path(folder))) for _ in range(10)]
    hashed = [seconds(lambda: hashlib.sha256(content).digest()) for _ in range(5)]
    return {
        "write_core_seconds": statistics.median(written),
        "hash_bytes_per_second": 2**26 / statistics.median(hashed),
    }


def check_generation(counts: tuple[int, ...], cluster: Cluster, seconds: float = 1.0) -> list[dict[str, float]]:
    """Calls per second of real runs on this machine, whose calls wait ``seconds``, and the model's prediction."""
    from simulated_cluster import generate

    from cdpo_ray.session import ray_session

    rows = []
    with ray_session():
        for count in counts:
            outcome = generate(count, 24, 1, num_actors=count, seconds=seconds, cpus_per_actor=0.2)
            tiny = dataclasses.replace(
                cluster, images_per_call=1, call_seconds=seconds, png_core_seconds=0, png_bytes=0, hours_per_failure=0
            )
            predicted = generation(tiny, count).per_second
            rows.append({"actors": count, "predicted": predicted, "measured": outcome.rate})
            assert not outcome.faults
            print(rows[-1], flush=True)
    return rows


SLEEP_SECONDS = 1.0


def check_training(counts: tuple[int, ...]) -> list[dict[str, float]]:
    """Seconds per update of the real training on this machine, whose denoiser waits, and the model's prediction.

    Real are Ray Train, the loop, DeepSpeed, gloo's all-reduces, heartbeats and checkpoints, with the embedded model and
    one pair per launch. The prediction for several workers is the wait, and what one worker needs beside it, for which
    they share the cores of this machine.
    """
    from cdpo_ray.resources import usable_cpus
    from cdpo_ray.session import ray_session

    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        _write_samples(Path(scratch))
        for count in counts:
            seconds, checkpoint = _train(Path(scratch), count)
            beside = (rows[0]["measured"] if rows else seconds) - SLEEP_SECONDS
            rows.append(
                {
                    "workers": count,
                    "predicted": SLEEP_SECONDS + beside * max(1.0, count / usable_cpus()),
                    "measured": seconds,
                    "checkpoint_seconds": checkpoint,
                }
            )
            print(rows[-1], flush=True)
    return rows


def _write_samples(folder: Path) -> None:
    """Samples of two prompts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cdpo_ray.generation.generator import Generator, Sampling

    sampling = Sampling(0, 4, 1, 1.0, None, None, 8)
    generator = Generator("stable_diffusion", {"path": "embedded"}, sampling, keep_pixels=False)
    prompts = pa.table({"prompt_index": [0, 1], "prompt_id": ["a", "b"], "prompt": ["a red circle", "a blue square"]})
    (folder / "samples").mkdir()
    pq.write_table(generator(prompts), folder / "samples" / "samples.parquet")


def _write_pairs(folder: Path, num_pairs: int) -> None:
    """One stage of pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "stage-1").mkdir(parents=True)
    draws = np.arange(num_pairs)
    columns = {"prompt_index": draws % 2, "chosen": draws % 4, "rejected": (draws + 1) % 4, "draw": draws}
    pq.write_table(pa.table(columns), folder / "stage-1" / "pairs.parquet")


NUM_UPDATES, UPDATES_PER_CHECKPOINT = 16, 4


def _train(folder: Path, num_workers: int) -> tuple[float, float]:
    """Median seconds of an update, and of a checkpoint."""
    from cdpo_ray.config.training import TrainingSection
    from cdpo_ray.progress import Progress
    from cdpo_ray.training import trainer
    from cdpo_ray.training.job import TrainingJob

    training = TrainingSection(
        beta=200.0,
        learning_rate=1e-4,
        global_batch_size=num_workers,
        batch_size_per_worker=1,
        num_workers=num_workers,
        updates_per_commit=UPDATES_PER_CHECKPOINT,
        max_restarts=0,
    )
    output_dir = folder / f"training-{num_workers}"
    output_dir.mkdir()
    _write_pairs(output_dir / "stages", NUM_UPDATES * num_workers)
    job = TrainingJob(
        training,
        samples_dir=str(folder / "samples"),
        stages_dir=str(output_dir / "stages"),
        output_dir=str(output_dir),
        num_stages=1,
        family="stable_diffusion",
        model={"path": "embedded"},
        seed=0,
    )
    log = output_dir / "times"
    entry = trainer._work
    trainer._work = functools.partial(_work_and_wait, str(log))  # pickled by value: this file is the main module
    try:
        trainer.train_adapter(
            job,
            num_updates=NUM_UPDATES,
            cpus_per_worker=0.1,
            gpus_per_worker=0,
            node_labels={},
            progress=Progress(),
        )
    finally:
        trainer._work = entry
    times = list(map(float, log.read_text().split()))
    gaps = [after - before for before, after in itertools.pairwise(times)][: NUM_UPDATES - 1]
    # The gap after an update with a checkpoint contains the checkpoint; the first ones contain warm-up.
    plain = [gap for number, gap in enumerate(gaps, start=1) if number % UPDATES_PER_CHECKPOINT and number > 2]
    with_checkpoint = [gap for number, gap in enumerate(gaps, start=1) if number % UPDATES_PER_CHECKPOINT == 0]
    return statistics.median(plain), statistics.median(with_checkpoint) - statistics.median(plain)


def _work_and_wait(log: str, config: Mapping[str, Any]) -> None:
    """Entry point of a worker: as the package's, but each forward pass of the denoiser also waits."""
    from cdpo_ray.training import worker

    load, on_update = worker.load_model, worker.Worker._on_update

    def load_slow(*arguments: Any, **options: Any) -> Any:
        model = load(*arguments, **options)
        forward = model.denoiser.forward

        def wait_and_forward(*inputs: Any, **named: Any) -> Any:
            time.sleep(SLEEP_SECONDS / 2)  # an update has one pass of the policy and one of the reference
            return forward(*inputs, **named)

        model.denoiser.forward = wait_and_forward
        return model

    def log_update(self: Any, state: Any) -> None:
        on_update(self, state)
        if self.rank == 0:
            with open(log, "a") as file:
                file.write(f"{time.time()}\n")

    worker.load_model = load_slow
    worker.Worker._on_update = log_update
    worker.work(config["job"], config["board"], config["fit"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preemptions", type=float, default=0.0, help="per node and hour")
    parser.add_argument("--images", type=int, default=1_000_000, help="images of the run whose hours are printed")
    parser.add_argument("--picture", type=Path, metavar="SVG")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--check", choices=("generation", "training"))
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8], help="actors or workers of --check")
    options = parser.parse_args()
    recorded = json.loads(MEASURED.read_text()) if MEASURED.exists() else {"constants": {}}
    if options.measure:
        recorded["constants"] |= measure()
        recorded["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        recorded["date"] = datetime.now(UTC).date().isoformat()
    if options.check == "generation":
        recorded["generation"] = check_generation(tuple(options.counts), cluster_of())
    if options.check == "training":
        recorded["training"] = check_training(tuple(options.counts))
        recorded["constants"]["checkpoint_seconds"] = recorded["training"][0]["checkpoint_seconds"]
    if options.measure or options.check:
        MEASURED.write_text(json.dumps(recorded, indent=1) + "\n")
        print(json.dumps(recorded, indent=1))
        return
    cluster = cluster_of(preemptions_per_node_hour=options.preemptions)
    print(table(cluster, options.images))
    print(*sentences(cluster), sep="\n")
    if options.picture:
        options.picture.write_text(picture(cluster))


if __name__ == "__main__":
    main()
