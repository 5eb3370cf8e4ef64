"""Verification of a finished step of many files, with which each resume begins, on a disk or in an object store.

`RunFolder.is_complete` against the former route, whose 4 threads opened one file after another and whose sizes took
requests of their own. The store is moto on loopback, in a process of its own, which answers each request after
`--latency` milliseconds, as a store in the same region would; it needs `PYTHONPATH=tests`.
"""

import argparse
import hashlib
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import Queue
from pathlib import Path

from rates import CLOCKS, print_rates, rates_in_turns

from cdpo_ray.store import RunFolder, delete, map_files, storage_path, write_bytes

STEP = "1-samples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--bytes", type=int, default=20_000, help="size of each file")
    parser.add_argument("--s3", action="store_true", help="in an object store instead of on the disk")
    parser.add_argument("--latency", type=float, default=20.0, help="milliseconds before the store answers a request")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="`cpu`: processor time, for a busy machine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not options.s3:
            compare(Path(folder) / "run", options)
            return
        spawn = multiprocessing.get_context("spawn")
        endpoints: Queue[str] = spawn.Queue()
        server = spawn.Process(target=serve, args=(options.latency / 1000, endpoints), daemon=True)
        server.start()
        try:
            os.environ["AWS_ENDPOINT_URL"] = endpoints.get(timeout=60)
            os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
            bucket = storage_path("s3://bucket")
            bucket.fs.mkdir("bucket")  # type: ignore[attr-defined]
            compare(bucket / "run", options)
        finally:
            server.terminate()


def serve(latency_seconds: float, endpoints: "Queue[str]") -> None:
    from object_store import S3Server

    server = S3Server()
    server.fault = lambda operation, key: time.sleep(latency_seconds)
    endpoints.put(server.endpoint)
    time.sleep(3600)


def compare(place: Path, options: argparse.Namespace) -> None:
    """Write a step of many files, verify it in turns by both routes, and print the rates."""
    run = RunFolder(place)
    with run.writing(STEP, {}, {}, seed=0, resumable=False) as (folder, _):
        names = [folder / f"part-{number:06d}.parquet" for number in range(options.files)]
        for _ in map_files(lambda path: write(path, options.bytes), names):
            pass
    routes = {"ours": lambda: run.is_complete(STEP, {}, {}), "former": lambda: verify_in_four_threads(run)}
    rates = rates_in_turns(routes, num_items=options.files, repeats=options.repeats, device="cpu", clock=options.clock)
    print_rates(rates, "file")
    delete(place)


def write(path: Path, num_bytes: int) -> None:
    content = os.urandom(num_bytes)
    path.write_bytes(content) if isinstance(path, Path) else write_bytes(path, content)  # without a flush per file


def verify_in_four_threads(run: RunFolder) -> None:
    """The former route of `RunFolder.is_complete`."""

    def is_intact(path: Path) -> bool:
        digest = hashlib.sha256()
        if isinstance(path, Path) and not path.is_file():
            return False
        with path.open("rb") as handle:
            while block := handle.read(2**22):
                digest.update(block)
        return digest.hexdigest() == expected[path]

    step = run.path / STEP
    expected = {step / name: entry["sha256"] for name, entry in run.manifest(STEP)["files"].items()}
    if isinstance(step, Path):  # links that lead out of the folder
        assert all(Path(os.path.realpath(path)).is_relative_to(os.path.realpath(step)) for path in expected)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_intact, expected))
    if isinstance(step, Path):  # tables that the manifest does not name
        assert len([path.relative_to(step) for path in step.rglob("*") if path.is_file()]) > len(expected)
    else:
        assert len(step.fs.find(step.path)) > len(expected)


if __name__ == "__main__":
    main()
