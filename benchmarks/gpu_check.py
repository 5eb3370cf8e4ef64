"""Check of the package on this machine's GPU: correctness, speed and memory.

    python benchmarks/gpu_check.py --seconds 470              # all parts, most important first, as far as time allows
    python benchmarks/gpu_check.py --parts run                # the quickstart end to end, in fp32 and in bf16
    python benchmarks/gpu_check.py --tiny --out tiny.json     # rehearsal of every part on a CPU

Models have their published architecture and random weights. One JSON file is rewritten after each measurement. A
failed measurement is recorded and the others continue; one that would exceed the time limit is left out and named.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_measurements as measurements
import torch
from gpu_measurements import Found
from gpu_models import Models
from rates import machine

SD, SDXL, LCM = "stable_diffusion", "stable_diffusion_xl", "latent_consistency"
RUN_SECONDS = 170
ROOT = Path(__file__).parents[1]
LIBRARIES = (
    *("torch", "triton", "transformers", "diffusers", "peft", "accelerate"),
    *("deepspeed", "ray", "numpy", "open_clip_torch", "safetensors"),
)
BF16, FP32 = "bfloat16", "float32"
ON_ONE_GPU = (
    "training.num_workers=1",
    "resources.generators={num_actors: 1, cpus_per_actor: 2, gpus_per_actor: 0.4}",
    "resources.scorers={num_actors: 1, cpus_per_actor: 1, gpus_per_actor: 0.1}",
    "resources.trainers={cpus_per_worker: 2, gpus_per_worker: 0.5}",
)
"""Every role requests a share of the GPU, which two concurrent runs use: they test completion, not speed."""


class Check:
    """Takes measurements one by one within a time limit, and stores them in a file.

    Args:
        out: path of the JSON file.
        seconds: time limit.
        models: models to measure.
    """

    def __init__(self, out: Path, seconds: float, models: Models) -> None:
        self.out, self.seconds, self.models = out, seconds, models
        self.started = time.monotonic()
        self.found: dict[str, Any] = {"arguments": sys.argv[1:], "seconds": 0.0, "left_out": [], "failed": {}}

    def few(self, number: int) -> int:
        """Number of pairs or images to use: ``number``, or 1 in a rehearsal."""
        return 1 if self.models.tiny else number

    @property
    def seconds_left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def measure(self, name: str, work: Callable[[], Found], *, needs_seconds: float) -> None:
        """Record the result of ``work``, or its error.

        Args:
            name: key of the result.
            work: measurement.
            needs_seconds: the measurement is left out if less time is left, except in a rehearsal.
        """
        if self.seconds_left < needs_seconds and not self.models.tiny:
            self.found["left_out"].append(name)
            return self.write()
        started = time.monotonic()
        try:
            found = work()
            self.found[name] = {"took_seconds": time.monotonic() - started} | found
            outcome = json.dumps(rounded(self.found[name]))
        except Exception as error:  # any error: the other measurements continue
            outcome = f"{type(error).__name__}: {error}"[:600]
            self.found["failed"][name] = {"error": outcome, "traceback": traceback.format_exc()[-1500:]}
            outcome = f"FAILED {outcome}"
        print(f"[{time.monotonic() - self.started:6.1f}] {name}: {outcome}", flush=True)
        release()
        return self.write()

    def write(self) -> None:
        self.found["seconds"] = time.monotonic() - self.started
        self.out.parent.mkdir(parents=True, exist_ok=True)
        aside = self.out.with_suffix(".tmp")
        aside.write_text(json.dumps(rounded(self.found), indent=1) + "\n")
        aside.replace(self.out)

    def speed(self, name: str, work: Callable[[], Found], *, family: str, item: str, needs_seconds: float) -> None:
        """Like `measure`, for work that returns ``<item>s_per_second``; adds FLOPs and their share of the limit."""

        def with_share() -> Found:
            found = work()
            each = self.found.get(f"flops, {family}, one {item}", {}).get("teraflops")
            limit = self.found.get(f"matmul, {self.models.usual_dtype}", {}).get("teraflops")
            if each and limit:
                found["teraflops_per_second"] = each * found[f"{item}s_per_second"]
                found["share_of_matmul"] = found["teraflops_per_second"] / limit
            return found

        self.measure(name, with_share, needs_seconds=needs_seconds)


def release() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rounded(value: Any) -> Any:
    """Floats rounded to four significant digits, also those in dicts and lists."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def environment(device: str) -> Found:
    """Card, driver, versions and commit."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"),
        "python": platform.python_version(),
        "num_cpus": os.cpu_count(),
        "device": machine(device),
        "versions": versions,
    }
    if device == "cuda":
        found["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["cuda"] = torch.version.cuda
        found["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
    return found


def output_of(*command: str) -> str | None:
    """Standard output of a program; `None` if it is missing or fails."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def limits(check: Check) -> None:
    """The machine, and the rate of a matrix product, to which other rates are compared."""
    check.measure("environment", lambda: environment(check.models.device), needs_seconds=0)
    for dtype in (BF16, FP32):
        work = functools.partial(measurements.matmul, check.models, getattr(torch, dtype))
        check.measure(f"matmul, {dtype}", work, needs_seconds=5)


def engine(check: Check) -> None:
    """The first updates of every family with a UNet."""
    for family, needs_seconds in ((SD, 15), (LCM, 20), (SDXL, 40)):
        for dtype in (BF16, FP32):
            work = functools.partial(measurements.first_updates, check.models, family, dtype=dtype)
            check.measure(f"engine, {family}, {dtype}", work, needs_seconds=needs_seconds)


def train(check: Check) -> None:
    """Stable Diffusion 1.5 at four batch sizes against the stock loop, and compiled."""
    count(check, SD, "pair")
    for pairs in (16,) if check.models.tiny else (16, 8, 4, 32):
        train_one(check, SD, pairs, profiled=pairs in (4, 16))
        work = functools.partial(
            measurements.train_stock, check.models, check.few(pairs), dtype=check.models.usual_dtype
        )
        check.speed(f"train, {SD}, {pairs} pairs, stock", work, family=SD, item="pair", needs_seconds=25)
    train_one(check, SD, 16, channels_last=True)


def generate(check: Check) -> None:
    """Stable Diffusion 1.5 against the stock pipeline, and in the memory format of compiled networks."""
    generate_both(check, SD, 16, needs_seconds=30)
    generate_one(check, SD, 16, channels_last=True, needs_seconds=30)
    dtype = check.models.usual_dtype
    work = functools.partial(measurements.profile_generation, check.models, SD, check.few(16), dtype=dtype)
    check.measure(f"profile, generate, {SD}, 16 images", work, needs_seconds=20)


def sdxl(check: Check) -> None:
    """SDXL: training with gradient checkpointing, and images against the stock pipeline."""
    count(check, SDXL, "pair")
    train_one(check, SDXL, 4, checkpointing=True, needs_seconds=40)
    generate_both(check, SDXL, 4, needs_seconds=45)


def lcm(check: Check) -> None:
    """The latent consistency model: training, and images against the stock pipeline."""
    count(check, LCM, "pair")
    train_one(check, LCM, 8)
    generate_both(check, LCM, 16, needs_seconds=20)


def judges(check: Check) -> None:
    """The image tower of two judges, in three precisions."""
    check.measure("judges", functools.partial(measurements.judges, check.models), needs_seconds=20)


def attention(check: Check) -> None:
    """The largest attentions of Stable Diffusion 1.5, by implementation."""
    work = functools.partial(measurements.attention, check.models, check.few(32))
    check.measure("attention", work, needs_seconds=10)


def host(check: Check) -> None:
    """Host time per batch and per image."""
    check.measure("host, noise", functools.partial(measurements.host_noise, check.models), needs_seconds=10)
    check.measure("host, png", functools.partial(measurements.host_png, check.models), needs_seconds=15)


def toggle(check: Check) -> None:
    """Whether switching the adapters causes recompilation."""
    work = functools.partial(measurements.toggled_reference, check.models, dtype=check.models.usual_dtype)
    check.measure("toggled reference", work, needs_seconds=40)


def compiled(check: Check) -> None:
    """Compiled training and generation: last, because they take minutes."""
    for item in ("image", "pair"):
        count(check, SD, item)
    generate_one(check, SD, 16, compiled=True, needs_seconds=75)
    train_one(check, SD, 16, compiled_blocks=True, profiled=True, needs_seconds=90)
    train_one(check, SD, 16, compiled=True, profiled=True, needs_seconds=200)
    train_one(check, SDXL, 8, checkpointing=True, profiled=True, needs_seconds=45)
    train_one(check, SDXL, 8, checkpointing=True, compiled_blocks=True, needs_seconds=100)


def run(check: Check) -> None:
    """The quickstart end to end, in fp32 and in bf16 concurrently."""
    if check.seconds_left < RUN_SECONDS and not check.models.tiny:
        check.found["left_out"].append("run")
        check.write()
        return
    with ThreadPoolExecutor(2) as pool:
        runs = {dtype: pool.submit(run_whole, check, dtype) for dtype in (FP32, BF16)}
        for dtype, whole in runs.items():
            check.measure(f"run, {dtype}", whole.result, needs_seconds=0)


PARTS = {
    part.__name__: part
    for part in (limits, engine, train, generate, sdxl, lcm, judges, attention, host, toggle, compiled, run)
}
"""In order of importance, which is the order of measurement."""


def count(check: Check, family: str, item: str) -> None:
    function = {"pair": measurements.flops_of_pair, "image": measurements.flops_of_image}[item]
    name = f"flops, {family}, one {item}"
    if name not in check.found:
        work = functools.partial(function, check.models, family, dtype=check.models.usual_dtype)
        check.measure(name, work, needs_seconds=15)


def train_one(check: Check, family: str, pairs: int, *, needs_seconds: float = 25, **how: bool) -> None:
    work = functools.partial(
        measurements.train, check.models, family, check.few(pairs), dtype=check.models.usual_dtype, **how
    )
    variant = [key for key in how if key != "profiled"]
    name = ", ".join(("train", family, f"{pairs} pairs", *(variant or ("eager",))))
    check.speed(name, work, family=family, item="pair", needs_seconds=needs_seconds)


def generate_one(check: Check, family: str, images: int, *, needs_seconds: float, **how: bool) -> None:
    work = functools.partial(
        measurements.generate, check.models, family, check.few(images), dtype=check.models.usual_dtype, **how
    )
    name = ", ".join(("generate", family, f"{images} images", *(how or ("eager",))))
    check.speed(name, work, family=family, item="image", needs_seconds=needs_seconds)


def generate_both(check: Check, family: str, images: int, *, needs_seconds: float) -> None:
    count(check, family, "image")
    generate_one(check, family, images, needs_seconds=needs_seconds)
    work = functools.partial(
        measurements.generate_stock, check.models, family, check.few(images), dtype=check.models.usual_dtype
    )
    name = f"generate, {family}, {images} images, stock"
    check.speed(name, work, family=family, item="image", needs_seconds=needs_seconds)


def run_whole(check: Check, dtype: str) -> Found:
    """`cdpo run` in its own processes: seconds of each step, and held-out differences to the base model.

    Raises:
        RuntimeError: the run failed; contains the end of its output.
        subprocess.TimeoutExpired: the time limit of the check passed.
    """
    config = ROOT / "configs" / ("smoke.yaml" if check.models.tiny else "quickstart.yaml")
    settings = ("run.name=check", f"model.dtype={dtype}", *(() if check.models.tiny else ON_ONE_GPU))
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "cdpo_ray", "run", str(config), f"run.dir={folder}", *settings],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=None if check.models.tiny else check.seconds_left,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
        manifests = sorted(Path(folder).glob("*/*/manifest.json"))
        steps = {path.parent.name: json.loads(path.read_text())["seconds"] for path in manifests}
        (metrics,) = Path(folder).glob("*/5-evaluation/metrics.json")
        judged = json.loads(metrics.read_text())["judges"]
    differences = {name: each["difference"] for name, each in judged.items()}
    return {"step_seconds": steps, "differences": differences, "took_seconds": time.monotonic() - started}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="always in this order")
    parser.add_argument(
        "--seconds", type=float, default=470, help="time limit; measurements that would exceed it are left out"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/gpu/<card>-<date>.json)")
    parser.add_argument("--tiny", action="store_true", help="rehearsal on a CPU: an eighth of the width, no Inductor")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no GPU is visible to PyTorch; --tiny rehearses on a CPU")
    return options


def default_out(device: str) -> Path:
    card = re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-")
    return ROOT / "benchmarks" / "gpu" / f"{card}-{datetime.now(UTC):%Y-%m-%d}.json"


def main() -> None:
    """Take the measurements; exit code 1 if any failed."""
    options = parse()
    device = "cpu" if options.tiny else "cuda"
    with tempfile.TemporaryDirectory() as scratch:
        models = Models(Path(scratch), device, options.tiny)
        check = Check(options.out or default_out(device), options.seconds, models)
        for name, part in PARTS.items():
            if name in options.parts:
                part(check)
    failed, left_out = check.found["failed"], check.found["left_out"]
    print(f"{check.out}: failed: {', '.join(failed) or 'none'}; left out: {', '.join(left_out) or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
