"""One prompt on many actors: the images of one prompt against as many prompts with one image each, on the same actors.

    python benchmarks/pieces.py             # 64 images, 4 actors, alternating, 3 times
    python benchmarks/pieces.py --actors 2

A call makes at most a batch, so the images of one prompt are split over the actors too. Start-up is left out: a run is
timed from the end of its first call to the end of its last. The shards of one prompt made by all actors and by one
actor must be equal byte by byte; else the exit code is 1.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # in Ray's workers too

from rates import machine

from cdpo_ray.config import Pool
from cdpo_ray.generation.generator import Sampling
from cdpo_ray.progress import Progress
from cdpo_ray.session import ray_session
from cdpo_ray.testbed.scenes import scene_prompts


class TimeLog:
    """Judge that scores nothing and logs when each batch is done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, images: Any, prompts: Any) -> dict[str, Any]:
        with self.path.open("a") as log:
            log.write(f"{time.time()}\n")
        return {}


def run(prompts: list[str], images_per_prompt: int, num_actors: int, options: argparse.Namespace) -> tuple[float, Any]:
    """Images per second after the first call, and the shards."""
    from cdpo_ray.generation.pool import generate_samples  # imports Ray, which `ray_session` must prepare

    with tempfile.TemporaryDirectory() as scratch:
        times, output_dir = Path(scratch) / "times", Path(scratch) / "samples"
        output_dir.mkdir()
        generate_samples(
            prompts,
            output_dir,
            family="stable_diffusion",
            model={"path": "embedded"},
            sampling=Sampling(0, images_per_prompt, options.steps, 1.0, None, None, options.batch),
            tuned_dir=None,
            keep_images=True,
            generators=Pool(num_actors=num_actors, cpus_per_actor=0.5),
            make_scores=lambda: TimeLog(times),
            then=None,
            max_bad_fraction=0.0,
            progress=Progress(),
        )
        ends = sorted(map(float, times.read_text().split()))
        shards = {path.name: path.read_bytes() for path in output_dir.glob("*.parquet")}
    return options.batch * (len(ends) - 1) / (ends[-1] - ends[0]), shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4, help="images per call")
    parser.add_argument("--actors", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="denoising steps")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    prompts = scene_prompts("train", options.images, seed=0)
    rates: dict[str, list[float]] = {"one prompt": [], "one image per prompt": []}
    with ray_session():
        _, of_one_actor = run(prompts[:1], options.images, 1, options)
        are_equal = True
        for _ in range(options.repeats):
            rate, shards = run(prompts[:1], options.images, options.actors, options)
            rates["one prompt"].append(rate)
            are_equal &= shards == of_one_actor
            rates["one image per prompt"].append(run(prompts, 1, options.actors, options)[0])
            print({name: round(found[-1], 2) for name, found in rates.items()}, flush=True)
    print(f"{options.images} images on {options.actors} actors, images/s ({machine('cpu')})")
    for name, found in rates.items():
        print(f"{name:22} {statistics.median(found):6.2f} ({min(found):.2f} to {max(found):.2f})")
    one, other = (statistics.median(found) for found in rates.values())
    print(f"{'ratio':22} {one / other:6.2f}; shards {'equal' if are_equal else 'DIFFERENT from'} those of one actor")
    sys.exit(not are_equal)


if __name__ == "__main__":
    main()
