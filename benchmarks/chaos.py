"""A run under random SIGKILLs of workers, actors and the driver, beside a quiet one: the results must be the same.

Each kill takes a process at random: the driver, or one that Ray started under it. A driver that has died, of a kill or
of too many, is started again with the same command, until the run is done.
"""

import argparse
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import torch
from safetensors.torch import load_file

from cdpo_ray.records import EVALUATION, SAMPLES, STAGES, TRAINING
from cdpo_ray.store import read_table

CDPO = Path(sys.executable).with_name("cdpo")
CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
DRIVER_SHARE = 0.25  # of the kills; the others take a worker or an actor
OURS = re.compile(
    r"ray::(Map|RayTrainWorker|TrainController|Board|join_parts)"
)  # what Ray titles them; not its services


@dataclass(frozen=True)
class Kill:
    """A process that was killed, after how many seconds and in which step."""

    seconds: float
    step: str
    victim: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=12, help="then the run is left in peace")
    parser.add_argument("--min-kills", type=int, default=10, help="fewer, before the run was done, are no proof")
    parser.add_argument("--mean-seconds", type=float, default=25.0, help="between two kills")
    parser.add_argument("--seed", type=int, default=0, help="of when and whom")
    parser.add_argument("--dir", type=Path, default=Path("runs/chaos"), help="emptied first")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of configs/quickstart.yaml")
    asked = parser.parse_args()
    shutil.rmtree(asked.dir, ignore_errors=True)
    seconds = {}
    for name in ("quiet", "chaos"):
        started = time.monotonic()
        command = [str(CDPO), "run", str(CONFIG), f"run.dir={asked.dir}", f"run.name={name}", *asked.overrides]
        if name == "quiet":
            subprocess.run(command, check=True)
        else:
            kills = survive(command, asked.dir / name, asked.kills, asked.mean_seconds, random.Random(asked.seed))
        seconds[name] = time.monotonic() - started
    print(f"{'second':>7}  {'step':14} killed")
    for kill in kills:
        print(f"{kill.seconds:7.0f}  {kill.step:14} {kill.victim}")
    print(
        f"{len(kills)} kills: "
        + ", ".join(f"{count} {what}" for what, count in Counter(k.victim for k in kills).items())
    )
    same = dict(compared(asked.dir / "quiet", asked.dir / "chaos"))
    for what, is_same in same.items():
        print(f"{what}: {'the very same' if is_same else 'DIFFERENT'}")
    print(f"seconds: {seconds['quiet']:.0f} quiet, {seconds['chaos']:.0f} under kills")
    if len(kills) < asked.min_kills or not all(same.values()):
        sys.exit(f"not shown: {len(kills)} kills of {asked.min_kills}, or a difference")


def survive(command: list[str], run: Path, num_kills: int, mean_seconds: float, chance: random.Random) -> list[Kill]:
    """Run until it is done, whatever is killed; what was killed."""
    kills: list[Kill] = []
    started, starts = time.monotonic(), 0
    while True:
        driver = subprocess.Popen(command)
        starts += 1
        while driver.poll() is None:
            due = time.monotonic() + chance.uniform(0.2, 1.8) * mean_seconds
            while time.monotonic() < due and driver.poll() is None:
                time.sleep(0.1)
            if len(kills) < num_kills and driver.poll() is None and (victim := chosen(driver, chance)):
                kills.append(Kill(time.monotonic() - started, step_of(run), name_of(victim, driver)))
                print(f"--- kill {len(kills)}: {kills[-1].victim} ({kills[-1].step})", file=sys.stderr, flush=True)
                victim.kill()
        if driver.returncode == 0:
            return kills
        if starts > num_kills + 5:
            sys.exit(f"started {starts} times and not done: exit code {driver.returncode}")


def chosen(driver: subprocess.Popen[bytes], chance: random.Random) -> psutil.Process | None:
    """The driver, or a worker or actor of the run."""
    process = psutil.Process(driver.pid)
    busy = [child for child in process.children(recursive=True) if OURS.match(name_of(child, driver))]
    if chance.random() < DRIVER_SHARE or not busy:
        return process
    return chance.choice(busy)


def name_of(process: psutil.Process, driver: subprocess.Popen[bytes]) -> str:
    """``driver``, or as Ray titles its processes: ``ray::MapWorker(MapBatches(Generator))``."""
    if process.pid == driver.pid:
        return "driver"
    try:
        title = "".join(process.cmdline())
    except psutil.Error:
        return ""
    return title.split(".")[0].split("__")[0]


def step_of(run: Path) -> str:
    begun = sorted(path.name.removesuffix(".partial") for path in run.glob("*.partial"))
    return begun[0] if begun else "between steps"


def compared(quiet: Path, chaos: Path) -> Iterator[tuple[str, bool]]:
    """What must be the same, and whether it is: bytes of images, rows of pairs, tensors of the adapter, scores."""
    yield "images and scores", rows(quiet / SAMPLES).equals(rows(chaos / SAMPLES))
    for stage in sorted((quiet / STAGES).glob("stage-*")):
        yield f"pairs of {stage.name}", rows(stage).equals(rows(chaos / STAGES / stage.name))
    one, other = (load_file(run / TRAINING / "lora" / "pytorch_lora_weights.safetensors") for run in (quiet, chaos))
    yield "adapter", one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    updates = [(run / TRAINING / "updates.jsonl").read_text() for run in (quiet, chaos)]
    yield "records of updates", updates[0] == updates[1]
    tables = [read_table(run / EVALUATION / "comparison.parquet") for run in (quiet, chaos)]
    yield "held-out images and scores", tables[0].equals(tables[1])


def rows(folder: Path) -> pa.Table:
    """All columns of all shards, in an order of their own."""
    table = pa.concat_tables(read_table(path) for path in sorted(folder.glob("*.parquet")))
    return table.sort_by("draw" if "draw" in table.column_names else "prompt_index").combine_chunks()


if __name__ == "__main__":
    main()
