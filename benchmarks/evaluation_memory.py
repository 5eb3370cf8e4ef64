"""Peak resident memory of a process that joins the parts of an evaluation, with N and 10 N prompts.

The parts contain random bytes of a PNG's size; by default, the larger size has 260 prompts x 4 images x 2 models.
"""

import argparse
import multiprocessing
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from cdpo_ray.dataflow.parts import find_parts, write_part
from cdpo_ray.evaluation.joining import join_comparison
from cdpo_ray.store import PARTS

ROW_GROUP_BYTES = 8 * 2**20


def write_parts(folder: Path, num_prompts: int, images_per_prompt: int, image_bytes: int) -> None:
    """One part per prompt, as an evaluation with large images writes them."""
    rng = np.random.default_rng(0)
    (folder / PARTS).mkdir()
    for prompt in range(num_prompts):
        rows = {"prompt_index": [prompt], "prompt_id": [f"{prompt:016x}"], "prompt": [f"prompt {prompt}"]}
        for arm in ("base", "tuned"):
            rows[f"{arm}_image"] = [[rng.bytes(image_bytes) for _ in range(images_per_prompt)]]
            rows[f"{arm}_score_clip"] = [rng.random(images_per_prompt).tolist()]
        write_part(pa.table(rows), parts_dir=folder / PARTS)


def peak_of_joining(folder: Path, images_per_prompt: int) -> int:
    """Increase of the peak resident memory by joining, in bytes."""
    before = peak_resident_bytes()
    parts, _ = find_parts(folder, "comparison", images_per_prompt)
    join_comparison(parts, folder / "comparison.parquet", {}, images_per_prompt, row_group_bytes=ROW_GROUP_BYTES)
    return peak_resident_bytes() - before


def peak_resident_bytes() -> int:
    """Peak resident memory of this process; a new process inherits the figure of `getrusage` from its parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prompts", type=int, default=26, help="prompts of the small size; the large size has ten times as many"
    )
    parser.add_argument("--images", type=int, default=4, help="images per prompt and model")
    parser.add_argument("--image-bytes", type=int, default=450_000, help="bytes per image; default: a PNG of 512 px")
    options = parser.parse_args()
    print(f"{'prompts':>8} {'images MB':>10} {'peak MB':>8}")
    for num_prompts in (options.prompts, 10 * options.prompts):
        with tempfile.TemporaryDirectory() as scratch:
            write_parts(Path(scratch), num_prompts, options.images, options.image_bytes)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                peak = process.submit(peak_of_joining, Path(scratch), options.images).result()
        images = 2 * num_prompts * options.images * options.image_bytes
        print(f"{num_prompts:8} {images / 1e6:10.0f} {peak / 1e6:8.0f}", flush=True)


if __name__ == "__main__":
    main()
