"""Saved figures -> model card of the weights."""

from pathlib import Path
from typing import Any

from benchmarks.testbed.consistency import GUIDANCE
from benchmarks.testbed.figures import load_figures
from benchmarks.testbed.measure import (
    CONSISTENCY_STEPS,
    EVALUATION_SEED,
    NUM_DENOISING_STEPS,
)
from cdpo_ray.testbed.scenes import all_scenes, is_heldout

PARTS = ("autoencoder", "denoiser", "consistency", "dual_encoder")
CARD = """# Weights of the testbed

A latent diffusion pipeline, a consistency model distilled from it and a dual encoder for captioned 32x32 scenes,
trained from scratch for tests and experiments of this project. They know only this world: coloured shapes at named
places on plain backgrounds. `python -m benchmarks.testbed --out DIR` repeats training and measurements and writes this
card.

- `pipeline/`: loads with `diffusers.StableDiffusionPipeline.from_pretrained`; fp16, {pipeline_megabytes:.1f} MB.
- `consistency/`: loads with `cdpo_ray.testbed.consistency.load_consistency_pipeline` as a
  `diffusers.LatentConsistencyModelPipeline`, with the autoencoder and the text encoder of `pipeline/`; distilled for a
  `guidance_scale` of {guidance_scale:g}; fp16, {consistency_megabytes:.1f} MB.
- `clip/`: loads with `cdpo_ray.testbed.clip.load_clip` (open_clip); fp16, {clip_megabytes:.1f} MB.
- `figures/`: the numbers of this card.

## Data

Scenes drawn by rule (`cdpo_ray/testbed/scenes.py`); no other images or texts. {num_captions} captions, of which
{num_heldout} ({heldout_share:.1%}) show a pair of objects that is held out from all training.

## Training

{num_cpus} CPU cores, one thread per process.

| part | seed | updates | images seen | minutes |
|---|---|---|---|---|
{training_rows}

Minutes are wall-clock time, under other load.

## Results on held-out scenes

Autoencoder: {psnr_db:.1f} dB peak signal-to-noise ratio. The oracle calls {renders_strict:.1%} of the true renders
correct in every respect, and {reconstructions_strict:.1%} of their reconstructions.

Pipeline: {num_prompts} held-out prompts x {images_per_prompt} noises, DDIM with {num_denoising_steps} steps, seed
{evaluation_seed}. *strict*: every check of the oracle holds; *attr*: all checks but the places; *soft*: the share of
checks that hold. Chance: the same images, judged by the prompt of another image.

| | strict | attr | soft |
|---|---|---|---|
{pipeline_rows}

Consistency model: the same prompts and initial noises, with its own scheduler.

| | strict | attr | soft |
|---|---|---|---|
{consistency_rows}

Dual encoder: share of true renders whose own caption scores above a caption with one error (chance: 50 %).

| error | correct choices |
|---|---|
{clip_rows}
"""


def write_card(weights_dir: Path) -> None:
    """Write ``README.md`` from the saved figures."""
    measured = load_figures(weights_dir, "measured")
    heldout = [is_heldout(scene) for scene in all_scenes()]
    trained = {part: load_figures(weights_dir, part) for part in PARTS}
    text = CARD.format(
        pipeline_megabytes=folder_bytes(weights_dir / "pipeline") / 1e6,
        guidance_scale=GUIDANCE + 1,
        consistency_megabytes=folder_bytes(weights_dir / "consistency") / 1e6,
        clip_megabytes=folder_bytes(weights_dir / "clip") / 1e6,
        num_captions=len(heldout),
        num_heldout=sum(heldout),
        heldout_share=sum(heldout) / len(heldout),
        num_cpus=trained["denoiser"]["num_cpus"],
        training_rows="\n".join(_training_row(part, figures) for part, figures in trained.items()),
        **measured["autoencoder"],
        num_prompts=measured["pipeline"]["num_prompts"],
        images_per_prompt=measured["pipeline"]["images_per_prompt"],
        num_denoising_steps=NUM_DENOISING_STEPS,
        evaluation_seed=EVALUATION_SEED,
        pipeline_rows="\n".join(
            _score_row(label, measured["pipeline"][key])
            for label, key in (
                ("without guidance", "guidance_1"),
                ("chance, without guidance", "chance_1"),
                ("guidance 3", "guidance_3"),
                ("chance, guidance 3", "chance_3"),
            )
        ),
        consistency_rows="\n".join(
            _score_row(f"steps {steps}", measured["consistency"][f"steps_{steps}"]) for steps in CONSISTENCY_STEPS
        ),
        clip_rows="\n".join(f"| {name} | {share:.1%} |" for name, share in measured["clip"].items()),
    )
    (weights_dir / "README.md").write_text(text)


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _training_row(part: str, figures: dict[str, Any]) -> str:
    name, minutes = part.replace("_", " "), figures["train_seconds"] / 60
    return f"| {name} | {figures['seed']} | {figures['num_updates']} | {figures['images_seen']} | {minutes:.1f} |"


def _score_row(label: str, scores: dict[str, float]) -> str:
    return f"| {label} | {scores['strict']:.3f} | {scores['attr']:.3f} | {scores['soft']:.3f} |"
