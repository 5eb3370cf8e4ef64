"""Overhead of Ray: each step on Ray against the same classes and functions called in one process.

Every step has one worker and one CPU thread on both routes; without Ray it runs in a new process, as an actor does.
Both routes do a small and a large run. Seconds per item are the difference quotient of the two; the rest of the small
run does not grow with the work (process start, imports, model load, checkpoints) and is reported separately.
"""

import argparse
import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

os.environ["OMP_NUM_THREADS"] = "1"  # before torch, and for all child processes, as in Ray's workers

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cdpo_ray.config.training import TrainingSection
from cdpo_ray.curriculum.drawing import sort_by_difficulty
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.schedule import Curriculum, Schedule
from cdpo_ray.generation.generator import Sampling
from cdpo_ray.progress import Progress
from cdpo_ray.randomness.numbers import seed_of
from cdpo_ray.records import prompt_id
from cdpo_ray.rewards.scorer import Scorer
from cdpo_ray.session import ray_session
from cdpo_ray.testbed.scenes import scene_prompts
from cdpo_ray.training.job import TrainingJob

FAMILY, MODEL, JUDGES = "stable_diffusion", {"path": "embedded"}, {"clip": {}, "oracle": {}}
SAMPLING = Sampling(0, 8, num_denoising_steps=10, guidance_scale=1.0, height=None, width=None, images_per_batch=8)
COMPARED = Sampling(0, 4, num_denoising_steps=10, guidance_scale=1.0, height=None, width=None, images_per_batch=8)
NUM_STAGES, PAIRS_PER_UPDATE, BETA = 4, 16, 200.0
TRAINING = TrainingSection(beta=BETA, learning_rate=5e-4, global_batch_size=PAIRS_PER_UPDATE, max_restarts=0)
MAKE_REWARD, MAKE_JUDGES = functools.partial(Scorer, {"clip": {}}), functools.partial(Scorer, JUDGES)


@dataclass(frozen=True)
class Size:
    """Sizes of a run."""

    prompts: int
    updates: int
    heldout: int

    def items(self) -> dict[str, int]:
        return {"generate": self.prompts, "train": self.updates, "evaluate": self.heldout}


class Route(Protocol):
    """A route through the steps of a run; each step writes to its folder."""

    def generate(self, prompts: list[str], output_dir: Path) -> None: ...
    def train(self, job: TrainingJob, output_dir: Path) -> None: ...
    def evaluate(self, prompts: list[str], training_dir: Path, output_dir: Path) -> None: ...


class ThroughRay:
    """The package's pools and trainer, with one actor or worker each."""

    def generate(self, prompts: list[str], output_dir: Path) -> None:
        from cdpo_ray.config import Pool
        from cdpo_ray.generation.pool import generate_samples

        generate_samples(
            prompts,
            output_dir,
            family=FAMILY,
            model=MODEL,
            sampling=SAMPLING,
            tuned_dir=None,
            keep_images=True,
            generators=Pool(),
            make_scores=MAKE_REWARD,
            then=None,
            max_bad_fraction=0.0,
            progress=Progress(),
        )

    def train(self, job: TrainingJob, output_dir: Path) -> None:
        from cdpo_ray.training.trainer import train_adapter

        train_adapter(job, num_updates=1, cpus_per_worker=1, gpus_per_worker=0, node_labels={}, progress=Progress())

    def evaluate(self, prompts: list[str], training_dir: Path, output_dir: Path) -> None:
        from cdpo_ray.config import Pool
        from cdpo_ray.evaluation.pool import evaluate_adapter

        evaluate_adapter(
            prompts,
            output_dir,
            categories={},
            training_dir=training_dir,
            family=FAMILY,
            model=MODEL,
            sampling=COMPARED,
            judges=list(JUDGES),
            make_scores=MAKE_JUDGES,
            num_margin_draws=0,
            generators=Pool(),
            num_resamples=1000,
            seed=0,
            max_bad_fraction=0.0,
            progress=Progress(),
        )


class Bare:
    """The classes of those actors, without Ray."""

    def generate(self, prompts: list[str], output_dir: Path) -> None:
        from cdpo_ray.dataflow.images import encode_pixels
        from cdpo_ray.generation.generator import Generator

        generator = Generator(FAMILY, MODEL, SAMPLING, make_scores=MAKE_REWARD)
        self._write(lambda rows: encode_pixels(generator(rows)), prompts, SAMPLING, output_dir / "samples.parquet")

    def train(self, job: TrainingJob, output_dir: Path) -> None:
        from alone import form_group_alone

        from cdpo_ray.models import load_model
        from cdpo_ray.policy.policy import make_policy
        from cdpo_ray.training.bank import SampleBank
        from cdpo_ray.training.batches import StagePairs
        from cdpo_ray.training.commits import Commits
        from cdpo_ray.training.engine import save_trained, start_engine, training_tensors
        from cdpo_ray.training.loop import Callbacks, Feed, TrainingState, train_stages
        from cdpo_ray.training.losses import preference_loss

        form_group_alone("cpu")
        model = load_model(FAMILY, **MODEL, for_training=True)
        seed = seed_of(job.seed, "lora")
        policy = make_policy(model, job.lora, seed=seed)
        engine = start_engine(model.denoiser.train(), policy.trainable, job.training, num_workers=1)
        bank = SampleBank.open(Path(job.samples_dir))
        feed = Feed(bank, model.draw_times, model.empty_conditioning, job.training, job.seed)
        commits = Commits(output_dir / "commits", keep_last=job.training.keep_last, device=engine.device)

        def commit(state: TrainingState) -> None:
            commits.write(state.num_updates, asdict(state), training_tensors(engine))

        train_stages(
            engine,
            policy,
            feed,
            TrainingState(),
            Callbacks(lambda state: StagePairs.read(Path(job.stages_dir), state.stage, bank), on_checkpoint=commit),
            num_stages=job.num_stages,
            preference_loss=functools.partial(preference_loss, beta=job.training.beta),
        )
        save_trained(engine, model, output_dir, lora=True)

    def evaluate(self, prompts: list[str], training_dir: Path, output_dir: Path) -> None:
        from cdpo_ray.dataflow.images import encode_pixels
        from cdpo_ray.dataflow.quarantine import Quarantine
        from cdpo_ray.evaluation.appearance_columns import add_appearance
        from cdpo_ray.evaluation.comparison import Comparer

        comparer = Comparer(
            FAMILY,
            MODEL,
            COMPARED,
            training_dir=training_dir,
            make_scores=MAKE_JUDGES,
            num_margin_draws=0,
            quarantine=Quarantine(output_dir, len(prompts), 0.0),
        )
        self._write(
            lambda rows: encode_pixels(add_appearance(comparer(rows))),
            prompts,
            COMPARED,
            output_dir / "comparison.parquet",
        )

    def _write(self, make: Callable[[pa.Table], pa.Table], prompts: list[str], sampling: Sampling, path: Path) -> None:
        rows = pa.table(
            {
                "prompt_index": np.arange(len(prompts)),
                "prompt_id": [prompt_id(prompt) for prompt in prompts],
                "prompt": prompts,
            }
        )
        size = max(1, sampling.images_per_batch // sampling.images_per_prompt)
        tables = [make(rows.slice(start, size)) for start in range(0, len(prompts), size)]
        pq.write_table(pa.concat_tables(tables), path)


def in_fresh_process(work: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a new interpreter and wait for it."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0, f"{work.__qualname__} failed; see above"


def draw_stages(samples_dir: Path, stages_dir: Path, pairs_per_stage: int) -> None:
    """Scores of the samples -> pairs of each stage; the same functions on both routes, hence not timed."""
    samples = pq.ParquetDataset(samples_dir).read(["prompt_index", "score_clip"]).sort_by("prompt_index")
    ranking = rank_samples(np.array(samples["score_clip"].to_pylist()))
    curriculum = Curriculum(ranking, Schedule(num_stages=NUM_STAGES), seed=0)
    for stage in range(1, NUM_STAGES + 1):
        pairs = sort_by_difficulty(curriculum.plan(stage, pairs_per_stage)[0])
        columns = {"prompt_index": pairs.prompt, "chosen": pairs.chosen, "rejected": pairs.rejected, "draw": pairs.draw}
        (stages_dir / f"stage-{stage}").mkdir(parents=True)
        pq.write_table(pa.table(columns), stages_dir / f"stage-{stage}" / "pairs.parquet")


def walk(route: Route, size: Size) -> dict[str, float]:
    """Seconds of each step of a run of this size."""
    call = in_fresh_process if isinstance(route, Bare) else lambda work, *arguments: work(*arguments)
    seconds: dict[str, float] = {}

    def timed(step: str, work: Callable[..., None], *arguments: Any) -> None:
        started = time.perf_counter()
        call(work, *arguments)
        seconds[step] = time.perf_counter() - started

    with tempfile.TemporaryDirectory() as scratch:
        samples, stages, training, evaluation = (Path(scratch) / f"{number}" for number in range(4))
        for folder in (samples, stages, training, evaluation):
            folder.mkdir()
        timed("generate", route.generate, scene_prompts("train", size.prompts, seed=0), samples)
        draw_stages(samples, stages, size.updates // NUM_STAGES * PAIRS_PER_UPDATE)
        job = TrainingJob(
            TRAINING,
            samples_dir=str(samples),
            stages_dir=str(stages),
            output_dir=str(training),
            num_stages=NUM_STAGES,
            family=FAMILY,
            model=MODEL,
            seed=0,
        )
        timed("train", route.train, job, training)
        heldout = scene_prompts("heldout", size.heldout, seed=0)
        timed("evaluate", route.evaluate, heldout, training, evaluation)
    return seconds


def print_shares(sizes: tuple[Size, Size], bare: list[dict[str, float]], ray: list[dict[str, float]]) -> None:
    """Print seconds per item and constant seconds, one line per step; the last line sums the large run."""
    small, large = (size.items() for size in sizes)
    _print_line("step", "items", "bare s/item", "Ray s/item", "ratio", "bare apart s", "Ray apart s")
    sums = np.zeros(4)
    for step, count in large.items():
        each = [(walks[1][step] - walks[0][step]) / (count - small[step]) for walks in (bare, ray)]
        apart = [walks[0][step] - seconds * small[step] for walks, seconds in zip((bare, ray), each, strict=True)]
        ratio = each[1] / each[0]
        _print_line(step, count, *(f"{seconds:.4f}" for seconds in each), f"{ratio:.3f}", *map("{:.1f}".format, apart))
        sums += [each[0] * count, each[1] * count, *apart]
    work, ray_work, *apart = (f"{seconds:.1f}" for seconds in sums)
    _print_line("run", "", f"{work} s", f"{ray_work} s", f"{sums[1] / sums[0]:.3f}", *apart)


def _print_line(*cells: Any) -> None:
    print("".join(f"{cell:>13}" for cell in cells))


def main() -> None:
    """Run both routes at both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24, help="prompts of the small run; 8 images each")
    parser.add_argument("--updates", type=int, default=20, help="updates of the small run; 16 pairs each")
    parser.add_argument("--heldout", type=int, default=24, help="held-out prompts of the small run; 2 x 4 images")
    parser.add_argument("--times", type=int, default=4, help="size of the large run relative to the small one")
    options = parser.parse_args()
    small = Size(options.prompts, options.updates, options.heldout)
    large = Size(*(options.times * count for count in (small.prompts, small.updates, small.heldout)))
    torch.set_num_threads(1)
    bare = [walk(Bare(), small)]
    started = time.perf_counter()
    with ray_session():
        session_seconds = time.perf_counter() - started
        walk(ThroughRay(), Size(2, NUM_STAGES, 2))  # what a driver does once in its life does not count
        ray = [walk(ThroughRay(), small), walk(ThroughRay(), large)]
    bare.append(walk(Bare(), large))
    print_shares((small, large), bare, ray)
    print(f"Ray itself started in {session_seconds:.1f} s")


if __name__ == "__main__":
    main()
