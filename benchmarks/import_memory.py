"""Memory of an import of preferences: a small and a large set, peaks of the driver and of all processes.

The set is a Parquet file in Pick-a-Pic's schema, JPEGs of the embedded world; it is imported as by `cdpo import`.
"""

import argparse
import io
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cdpo_ray.config import Config, validate
from cdpo_ray.run import run_steps
from cdpo_ray.steps import steps_of
from cdpo_ray.testbed.scenes import caption, render, sample_scene

NUM_DISTINCT = 1_000  # pairs; the file repeats them with different prompts
ROWS_PER_GROUP = 1_000
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--pixels", type=int, default=96, help="height and width of the images in the file")
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/import_memory"), help="working folder, emptied before and after"
    )
    parser.add_argument(
        "--max-growth", type=float, default=1.5, help="maximum ratio of the peaks of all processes; a larger one fails"
    )
    options = parser.parse_args()
    shutil.rmtree(options.dir, ignore_errors=True)
    options.dir.mkdir(parents=True)
    peaks = []
    print(f"{'rows':>8} {'file MB':>8} {'samples MB':>10} {'seconds':>8} {'driver MB':>10} {'all MB':>8}")
    for num_rows in options.rows:
        path = options.dir / f"{num_rows}.parquet"
        write_set(path, num_rows, options.pixels)
        config = config_of(options.dir, path)
        started = time.monotonic()
        with Peak() as peak:
            run = run_steps(config, steps_of(config)[:1])
        seconds = time.monotonic() - started
        manifest = run.manifest("1-samples")
        assert manifest["counts"]["rows_imported"] == num_rows, manifest["counts"]
        written = sum(file["bytes"] for file in manifest["files"].values())
        print(
            f"{num_rows:8} {path.stat().st_size / MB:8.0f} {written / MB:10.0f} {seconds:8.0f}"
            f" {peak.driver / MB:10.0f} {peak.all / MB:8.0f}",
            flush=True,
        )
        peaks.append(peak.all)
    shutil.rmtree(options.dir)
    growth = peaks[-1] / peaks[0]
    print(f"peak of the largest over that of the smallest: {growth:.2f}")
    if growth > options.max_growth:
        raise SystemExit(f"grew by more than {options.max_growth}")


def config_of(folder: Path, path: Path) -> Config:
    return validate(
        {
            "run": {"name": path.stem, "dir": str(folder)},
            "prompts": {"heldout": {"fraction": 0.02}},
            "preferences": {"path": str(path), "format": "pickapic"},
            "model": {"path": "embedded"},
            "generation": {"num_denoising_steps": 10, "guidance_scale": 1.0, "images_per_batch": 64},
            "rewards": {"names": ["preference"]},
            "curriculum": {"order": "none", "num_stages": 1, "updates_per_stage": 1},
            "training": {"beta": 200, "learning_rate": 5e-4, "global_batch_size": 4},
            "evaluation": {"judges": ["clip"]},
        },
        where="benchmark",
    )


def write_set(path: Path, num_rows: int, num_pixels: int) -> None:
    columns = {name: [] for name in ("caption", "jpg_0", "jpg_1", "label_0", "label_1")}
    for caption_, right, wrong in scenes(num_pixels):
        for name, value in zip(columns, (caption_, right, wrong, 1.0, 0.0), strict=True):
            columns[name].append(value)
    distinct = pa.table(columns)
    writer = pq.ParquetWriter(path, distinct.schema)
    for start in range(0, num_rows, NUM_DISTINCT):
        numbered = [f"{text} {start}" for text in columns["caption"]]
        table = distinct.set_column(0, "caption", pa.array(numbered)).slice(0, num_rows - start)
        writer.write_table(table, row_group_size=ROWS_PER_GROUP)
    writer.close()


def scenes(num_pixels: int) -> Iterator[tuple[str, bytes, bytes]]:
    rng = np.random.default_rng(0)
    for _ in range(NUM_DISTINCT):
        scene = sample_scene(rng)
        right, wrong = (jpeg(render(shown, rng), num_pixels) for shown in (scene, sample_scene(rng)))
        yield caption(scene), right, wrong


def jpeg(pixels: np.ndarray, num_pixels: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).resize((num_pixels, num_pixels)).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


class Peak:
    """Peak memory in bytes of this process, and of it with all its children; shared pages count once."""

    def __enter__(self) -> "Peak":
        self.driver = self.all = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while not self._done.wait(1):
            total = 0
            for process in [this, *this.children(recursive=True)]:
                try:
                    used = process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
                total += used
                if process == this:
                    self.driver = max(self.driver, used)
            self.all = max(self.all, total)


if __name__ == "__main__":
    main()
