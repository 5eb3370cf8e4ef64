"""Weights -> figures on held-out scenes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, LatentConsistencyModelPipeline, StableDiffusionPipeline
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.testbed.consistency import GUIDANCE
from benchmarks.testbed.contrasts import CONTRASTS
from benchmarks.testbed.figures import save_figures
from cdpo_ray.testbed.clip import load_clip, to_pixels
from cdpo_ray.testbed.consistency import load_consistency_pipeline
from cdpo_ray.testbed.oracle import judge
from cdpo_ray.testbed.scenes import Scene, caption, render, sample_scene, scene_prompts

NUM_SCENES = 1000
IMAGES_PER_PROMPT = 4
PROMPTS_PER_BATCH = 32
NUM_DENOISING_STEPS = 10
GUIDANCE_SCALES = (1.0, 3.0)  # 1: no guidance
CONSISTENCY_STEPS = (1, 2, 4, 8)
EVALUATION_SEED = 1000

Images = NDArray[np.uint8]


def heldout_renders(num_scenes: int, seed: int) -> tuple[list[Scene], Images]:
    """Held-out scenes and their true renders ``[scene, 3, 32, 32]``."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, "heldout") for _ in range(num_scenes)]
    return scenes, np.stack([render(scene, rng) for scene in scenes])


def to_uint8(pixels: NDArray[np.float32]) -> Images:
    """``[image, 32, 32, 3]`` in [0, 1] -> ``[image, 3, 32, 32]`` uint8."""
    return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8).transpose(0, 3, 1, 2)


def load_pipeline(pipeline_dir: Path) -> StableDiffusionPipeline:
    """The pipeline in fp32, without progress bar."""
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_dir, torch_dtype=torch.float32, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    *,
    guidance_scale: float,
    seed: int,
    num_denoising_steps: int = NUM_DENOISING_STEPS,
) -> NDArray[np.uint8]:
    """One image per prompt, ``[prompt, 3, 32, 32]``, by the pipeline's own scheduler from noises of ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    noises = torch.randn(len(prompts), 4, 8, 8, generator=generator)
    batches = range(0, len(prompts), PROMPTS_PER_BATCH)
    images = [
        pipeline(
            prompts[start : start + PROMPTS_PER_BATCH],
            num_inference_steps=num_denoising_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            latents=noises[start : start + PROMPTS_PER_BATCH],
            output_type="np",
        ).images
        for start in tqdm(batches, desc=f"generation, guidance {guidance_scale:g}", leave=False)
    ]
    return to_uint8(np.concatenate(images))


def measure_autoencoder(vae: AutoencoderKL, scenes: list[Scene], images: Images) -> dict[str, float]:
    """Peak signal-to-noise ratio of reconstructions in dB, and their oracle scores."""
    pixels = torch.from_numpy(images).float() / 127.5 - 1
    with torch.no_grad():
        batches = [vae.decode(vae.encode(batch).latent_dist.mode()).sample for batch in pixels.split(100)]
    rebuilt = to_uint8((torch.cat(batches) / 2 + 0.5).permute(0, 2, 3, 1).numpy())
    squared = np.square(rebuilt.astype(np.float32) - images).mean()
    captions = [caption(scene) for scene in scenes]
    return {
        "psnr_db": float(10 * np.log10(255**2 / squared)),
        "renders_strict": float(judge(images, captions)["strict"].mean()),
        "reconstructions_strict": float(judge(rebuilt, captions)["strict"].mean()),
    }


def measure_pipeline(pipeline: StableDiffusionPipeline, num_prompts: int) -> dict[str, Any]:
    """Mean oracle scores with and without guidance; ``chance``: the same images, judged by other prompts."""
    prompts = scene_prompts("heldout", num_prompts, EVALUATION_SEED) * IMAGES_PER_PROMPT
    figures: dict[str, Any] = {"num_prompts": num_prompts, "images_per_prompt": IMAGES_PER_PROMPT}
    for scale in GUIDANCE_SCALES:
        images = generate(pipeline, prompts, guidance_scale=scale, seed=EVALUATION_SEED)
        figures[f"guidance_{scale:g}"] = _means(judge(images, prompts))
        figures[f"chance_{scale:g}"] = _means(judge(images, prompts[1:] + prompts[:1]))
    return figures


def measure_consistency(pipeline: LatentConsistencyModelPipeline, num_prompts: int) -> dict[str, Any]:
    """Mean oracle scores for each number of denoising steps, on the prompts of `measure_pipeline`."""
    prompts = scene_prompts("heldout", num_prompts, EVALUATION_SEED) * IMAGES_PER_PROMPT
    figures = {}
    for steps in CONSISTENCY_STEPS:
        images = generate(
            pipeline, prompts, guidance_scale=GUIDANCE + 1, seed=EVALUATION_SEED, num_denoising_steps=steps
        )
        figures[f"steps_{steps}"] = _means(judge(images, prompts))
    return figures


@torch.no_grad()
def measure_clip(clip_dir: Path, scenes: list[Scene], images: Images, seed: int) -> dict[str, float]:
    """Share of renders whose own caption scores above a caption with one error, by kind of error."""
    model, tokenizer, mean, std, image_size = load_clip(clip_dir)
    image_features = model.encode_image(to_pixels(torch.from_numpy(images), mean, std, image_size), normalize=True)

    def scores(rows: list[int], captioned: list[Scene]) -> torch.Tensor:
        text_features = model.encode_text(tokenizer([caption(scene) for scene in captioned]), normalize=True)
        return (image_features[rows] * text_features).sum(1)

    rng = np.random.default_rng(seed)
    shares = {}
    for name, contrast in CONTRASTS.items():
        pairs = [(row, wrong) for row, scene in enumerate(scenes) if (wrong := contrast(scene, rng)) is not None]
        rows = [row for row, _ in pairs]
        own, other = scores(rows, [scenes[row] for row in rows]), scores(rows, [wrong for _, wrong in pairs])
        shares[name] = float((own > other).float().mean())
    return shares


def measure(weights_dir: Path, *, num_prompts: int, num_scenes: int = NUM_SCENES) -> None:
    """Measure all parts and save ``figures/measured.json``."""
    torch.set_num_threads(1)
    torch.manual_seed(EVALUATION_SEED)
    pipeline = load_pipeline(weights_dir / "pipeline")
    consistency_pipeline = load_consistency_pipeline(
        pipeline_dir=weights_dir / "pipeline", consistency_dir=weights_dir / "consistency"
    )
    consistency_pipeline.set_progress_bar_config(disable=True)
    scenes, images = heldout_renders(num_scenes, EVALUATION_SEED)
    figures = {
        "autoencoder": measure_autoencoder(pipeline.vae, scenes, images),
        "pipeline": measure_pipeline(pipeline, num_prompts),
        "consistency": measure_consistency(consistency_pipeline, num_prompts),
        "clip": measure_clip(weights_dir / "clip", scenes, images, EVALUATION_SEED),
    }
    save_figures(weights_dir, "measured", figures)


def _means(scores: dict[str, NDArray[np.float32]]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in scores.items()}
