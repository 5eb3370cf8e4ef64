"""Search for a setting of consistency DPO that improves the embedded consistency model on held-out prompts.

One process and one thread, without Ray. Training images and their scores are generated once and stored in
``--work-dir``. Each ``--setting`` is trained on them, sampled with the same noises as the base model, and printed as a
row: the oracle's attr and CLIP, base -> tuned, with the difference's 95 % bootstrap interval over prompts.
"""

import argparse
import functools
import os
import shlex
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from alone import form_group_alone
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.config.training import LoraSection, TrainingSection
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.schedule import Curriculum, Schedule
from cdpo_ray.evaluation.statistics import compare_scores
from cdpo_ray.generation.generator import Generator, Sampling, sample_batches
from cdpo_ray.models.consistency import GRID_STEP
from cdpo_ray.models.family import DenoisingTask, Net, Times, uniform_between
from cdpo_ray.models.latent_consistency import LatentConsistency
from cdpo_ray.policy.policy import make_policy
from cdpo_ray.randomness.numbers import seed_of
from cdpo_ray.records import prompt_id
from cdpo_ray.rewards.scorer import Scorer
from cdpo_ray.testbed.scenes import scene_prompts
from cdpo_ray.training.batches import SampleBank, StagePairs
from cdpo_ray.training.engine import save_trained, start_engine
from cdpo_ray.training.loop import Callbacks, Feed, TrainingState, summarize, train_stages
from cdpo_ray.training.losses import preference_loss

NUM_TRAIN, NUM_HELDOUT, NUM_STEPS, GUIDANCE_SCALE, PAIRS_PER_UPDATE = 128, 96, 2, 3.0, 16
SAMPLER_TIMESTEPS = (999, 499)
JUDGES = {"clip": {}, "oracle": {}}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALL_KINDS = (
    *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        stages: number of cumulative stages; the updates are divided evenly among them.
        easiest: 1: all stages have the first stage's pairs.
        timesteps: ``grid`` (all 50), ``sampler`` (its two), one (``499``) or a range (``19-399``).
        gap: number of grid cells of a teacher step.
        guidance: range of the guidance scale, of the teacher and as conditioning; ``1-3`` in distillation.
        normalised: 1: errors are divided by the reference's mean error at their timestep.
        labels: pairs by ``scores``, by ``random`` numbers (control), or ``reversed``: the worse image is chosen.
    """

    beta: float = 400.0
    lr: float = 1e-4
    updates: int = 200
    rank: int = 8
    lora: str = "attention"
    stages: int = 4
    easiest: int = 0
    timesteps: str = "grid"
    gap: int = 1
    guidance: str = "1-3"
    normalised: int = 0
    loss: str = "dpo"
    sft: float = 0.0
    labels: str = "scores"
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """``"beta=400 lr=1e-4 easiest=1"``; other fields have their defaults."""
        types = {field.name: field.type for field in fields(cls)}
        given = dict(word.split("=") for word in shlex.split(text))
        return cls(**{key: types[key](value) for key, value in given.items()})

    def __str__(self) -> str:
        always = ("beta", "lr", "updates", "seed")
        shown = [field for field in fields(self) if field.name in always or getattr(self, field.name) != field.default]
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in shown)


class Searched(LatentConsistency):
    """The family, with searched settings for which the package has no key."""

    setting: Setting
    mean_errors: dict[int, float]

    def draw_times(self, generator: torch.Generator) -> Times:
        times = super().draw_times(generator)
        if self.setting.timesteps == "grid":
            return times
        if self.setting.timesteps == "sampler":
            choices = SAMPLER_TIMESTEPS
        else:
            low, _, high = self.setting.timesteps.partition("-")
            choices = range(int(low), int(high or low) + 1, GRID_STEP)
        times["timestep"] = torch.tensor(choices)[torch.randint(len(choices), (), generator=generator)]
        return times

    def errors(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        errors = super().errors(denoiser, task)
        if self.setting.normalised:
            errors = errors / torch.tensor([self.mean_errors[t] for t in task.times["timestep"].tolist()])
        return errors


def make_samples(work_dir: Path) -> None:
    """Generate and score training images of the base model, unless they exist."""
    path = work_dir / "samples" / "samples.parquet"
    if path.exists():
        return
    path.parent.mkdir(parents=True)
    sampling = Sampling(0, 8, NUM_STEPS, GUIDANCE_SCALE, None, None, images_per_batch=64)
    make = Generator(
        "latent_consistency", {"path": "embedded"}, sampling, make_scores=functools.partial(Scorer, JUDGES)
    )
    prompts = scene_prompts("train", NUM_TRAIN, seed=0)
    rows = pa.table({"prompt_index": range(NUM_TRAIN), "prompt_id": map(prompt_id, prompts), "prompt": prompts})
    pq.write_table(make(rows), path)


def judge_heldout(model: LatentConsistency) -> dict[str, NDArray]:
    """``[prompt, image]`` scores of each judge, with 4 images per held-out prompt."""
    prompts = scene_prompts("heldout", NUM_HELDOUT, seed=0)
    sampling, judges = Sampling(0, 4, NUM_STEPS, GUIDANCE_SCALE, None, None, images_per_batch=64), Scorer(JUDGES)
    batches = sample_batches(model, prompts, model.encode_prompts(prompts)[0], sampling)
    scores = [judges(batch.images, batch.prompts) for batch in batches]
    return {name: np.concatenate([batch[name] for batch in scores]).reshape(NUM_HELDOUT, 4) for name in JUDGES}


def stage_pairs(scores: NDArray, setting: Setting, stage: int) -> StagePairs:
    """Pairs of a stage, as `cdpo pairs` draws them."""
    schedule = Schedule(num_stages=setting.stages)
    curriculum = Curriculum(rank_samples(scores), schedule, seed=seed_of(setting.seed, "pairs", stage))
    pairs, _ = curriculum.plan(1 if setting.easiest else stage, setting.updates // setting.stages * PAIRS_PER_UPDATE)
    return StagePairs(stage, pairs.prompt, pairs.chosen, pairs.rejected)


def train(setting: Setting, work_dir: Path, output_dir: Path) -> dict[str, float]:
    """Train a LoRA into ``output_dir``; returns means over the last stage."""
    model = Searched.load("embedded", for_training=True)
    low, high = map(float, setting.guidance.split("-"))
    model.setting, model.guidance_range, model.step_down = setting, (low, high), setting.gap * GRID_STEP
    bank = SampleBank.read(work_dir / "samples")
    scores = np.array(pq.read_table(work_dir / "samples", columns=["score_clip"])["score_clip"].to_pylist())
    if setting.labels != "scores":
        scores = -scores if setting.labels == "reversed" else np.random.default_rng(setting.seed).random(scores.shape)
    targets = ATTENTION if setting.lora == "attention" else ALL_KINDS
    section = TrainingSection(
        beta=setting.beta,
        loss={"name": setting.loss} | ({"sft_weight": setting.sft} if setting.sft else {}),
        learning_rate=setting.lr,
        global_batch_size=PAIRS_PER_UPDATE,
    )
    if setting.normalised:
        model.mean_errors = reference_errors(model, bank)
    lora = LoraSection(rank=setting.rank, targets=targets)
    policy = make_policy(model, lora, seed=seed_of(setting.seed, "lora"))
    engine = start_engine(model.denoiser.train(), policy.trainable, section, num_workers=1)
    feed = Feed(bank, model.draw_times, model.empty_conditioning, section, setting.seed)
    done = train_stages(
        engine,
        policy,
        feed,
        TrainingState(),
        Callbacks(lambda state: stage_pairs(scores, setting, state.stage)),
        num_stages=setting.stages,
        preference_loss=functools.partial(preference_loss, beta=setting.beta, **section.loss.arguments),
    )
    save_trained(engine, model, output_dir, lora=True)
    return summarize(done.records, setting.stages, PAIRS_PER_UPDATE)


@torch.no_grad()
def reference_errors(model: Searched, bank: SampleBank) -> dict[int, float]:
    """Mean error of the base model at each timestep of the grid, on 32 samples."""
    rows, found = torch.arange(32), {}
    generator = torch.Generator().manual_seed(0)
    conditioning = {name: value[rows].float() for name, value in bank.conditioning.items()}
    latents = bank.latents[rows, 0].float()
    for timestep in range(GRID_STEP - 1, 1000, GRID_STEP):
        guidance = torch.stack([uniform_between(model.guidance_range, generator) for _ in rows])
        times = {"timestep": torch.full((32,), timestep), "guidance": guidance}
        noise = torch.randn(latents.shape, generator=generator)
        task = model.denoising_task(model.denoiser, latents, conditioning, times, noise)
        found[timestep] = float(LatentConsistency.errors(model, model.denoiser, task).mean())
    return found


def main() -> None:
    """Train and judge each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="folder of samples and trained LoRAs")
    parser.add_argument("--setting", type=Setting.parse, action="append", required=True, help=Setting.parse.__doc__)
    options = parser.parse_args()
    torch.set_num_threads(1)
    form_group_alone("cpu")
    make_samples(options.work_dir)
    sampler = LatentConsistency.load("embedded")
    base = judge_heldout(sampler)
    print("| setting | attr | difference | CLIP difference | margin | chosen's error | seconds |")
    print("|---|---|---|---|---|---|---|")
    for setting in options.setting:
        started = time.perf_counter()
        output_dir = options.work_dir / str(setting).replace(" ", "_")
        last = train(setting, options.work_dir, output_dir)
        sampler.load_tuned(output_dir)
        tuned = judge_heldout(sampler)
        sampler.pipeline.unload_lora_weights()
        attr, clip = (
            compare_scores(base[name], tuned[name], num_resamples=2000, seed=0) for name in ("oracle", "clip")
        )
        print(
            f"| {setting} | {attr.base.mean:.3f} -> {attr.tuned.mean:.3f} | {_interval(attr.difference)} |"
            f" {_interval(clip.difference)} | {last['margin']:+.3f} |"
            f" {last['reference_error_w']:.4f} -> {last['policy_error_w']:.4f} | {time.perf_counter() - started:.0f} |",
            flush=True,
        )


def _interval(found: Any) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


if __name__ == "__main__":
    main()
