"""Images per second, generated, scored and saved: our generator against diffusers' pipeline, prompt by prompt.

Ours is the class that a run's actors wrap: rows of prompts in, a Parquet shard with latents, PNGs and scores out. The
stock route is a hand-written loop: call the pipeline, save each image, score each image with open_clip.
"""

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from architectures import MODELS, model_dir
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from rates import CLOCKS, machine, print_rates, rates_in_turns
from torch import Tensor

from cdpo_ray.dataflow.images import decode_png, encode_pixels
from cdpo_ray.generation.generator import Generator, Sampling
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.rewards.scorer import Scorer
from cdpo_ray.testbed import CLIP_DIR
from cdpo_ray.testbed.clip import load_clip
from cdpo_ray.testbed.scenes import scene_prompts


class Stock:
    """Pipeline and judge, used as documented; all files are written to ``output_dir``."""

    def __init__(self, folder: Path, output_dir: Path, sampling: Sampling, options: argparse.Namespace) -> None:
        self.pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            dtype=getattr(torch, options.dtype),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(options.device)
        self.pipeline.scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        self.pipeline.set_progress_bar_config(disable=True)
        clip, self.preprocess = open_clip.create_model_from_pretrained(f"local-dir:{CLIP_DIR}")
        self.clip = clip.eval().to(options.device)
        self.tokenizer = load_clip()[1]  # open_clip looks for this vocabulary in the working directory only
        self.output_dir, self.sampling, self.device = output_dir, sampling, options.device

    def images(self, prompt: str, latents: Tensor | None = None) -> list[Image.Image]:
        images: list[Image.Image] = self.pipeline(
            prompt,
            num_images_per_prompt=self.sampling.images_per_prompt,
            num_inference_steps=self.sampling.num_denoising_steps,
            guidance_scale=self.sampling.guidance_scale,
            generator=torch.Generator(self.device).manual_seed(self.sampling.seed),
            latents=latents,
        ).images
        return images

    @torch.no_grad()
    def score(self, image: Image.Image, prompt: str) -> float:
        pixels = self.preprocess(image).unsqueeze(0).to(self.device)
        features = F.normalize(self.clip.encode_image(pixels), dim=-1)
        text = F.normalize(self.clip.encode_text(self.tokenizer([prompt]).to(self.device)), dim=-1)
        return float(features @ text.T)

    def run(self, prompts: list[str]) -> list[list[float]]:
        scores = []
        for row, prompt in enumerate(prompts):
            images = self.images(prompt)
            for index, image in enumerate(images):
                image.save(self.output_dir / f"{row:05d}-{index:03d}.png")
            scores.append([self.score(image, prompt) for image in images])
        return scores


class Ours:
    """The generator in this process, called with the batches of a run."""

    def __init__(self, folder: Path, output_dir: Path, sampling: Sampling, options: argparse.Namespace) -> None:
        model = {"path": str(folder), "dtype": options.dtype, "device": options.device, "compile": options.compile}
        make_scores = functools.partial(Scorer, {"clip": {}})
        self.generator = Generator("stable_diffusion", model, sampling, make_scores=make_scores)
        self.output_dir = output_dir
        self.rows_per_call = max(1, sampling.images_per_batch // sampling.images_per_prompt)

    def run(self, prompts: list[str]) -> pa.Table:
        starts = range(0, len(prompts), self.rows_per_call)
        rows = pa.concat_tables(
            encode_pixels(self.generator(pa.table({"prompt": prompts[start : start + self.rows_per_call]})))
            for start in starts
        )
        pq.write_table(rows, self.output_dir / "samples.parquet")
        return rows


def check_agreement(ours: Ours, stock: Stock, prompt: str) -> None:
    """Check that both routes generate the same images from the same noise, up to rounding of a pixel.

    Raises:
        AssertionError: the images differ.
    """
    sampling, model = ours.generator.sampling, ours.generator.model
    rows = ours.run([prompt])
    shape = model.latent_shape(None, None)
    noise = torch.stack(
        [noise_at(shape, sampling.seed, "image", prompt, index) for index in range(sampling.images_per_prompt)]
    )
    images = stock.images(prompt, noise.to(model.device, model.dtype))
    theirs = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images]).astype(int)
    mine = np.stack([decode_png(png) for png in rows["images"][0].as_py()]).astype(int)
    pixels = np.abs(mine - theirs)
    scores = np.abs(np.array(rows["score_clip"][0].as_py()) - [stock.score(image, prompt) for image in images])
    print(f"same noise: pixels differ by {pixels.max()} at most ({(pixels > 0).mean():.3%} of them do),", end=" ")
    print(f"scores by {scores.max():.1e}")
    assert pixels.max() <= 1, "the routes disagree"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="embedded")
    parser.add_argument("--pixels", type=int, default=512, help="side of an image; the embedded model's are 32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--images", type=int, default=8, help="images per prompt")
    parser.add_argument("--images-per-batch", type=int, default=8, help="our batch; the stock batch is one prompt")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale; 1: no guidance")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="compile our denoiser; the stock route is not compiled")
    return parser.parse_args()


def main() -> None:
    """Check that both routes agree, then time them alternately."""
    options = parse()
    torch.set_num_threads(options.threads)
    prompts = scene_prompts("train", options.prompts, seed=0)
    sampling = Sampling(
        seed=0,
        images_per_prompt=options.images,
        num_denoising_steps=options.steps,
        guidance_scale=options.guidance,
        height=None,
        width=None,
        images_per_batch=options.images_per_batch,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_dir(options.model, Path(scratch), pixels=options.pixels)
        routes: dict[str, Any] = {
            name: route(folder, Path(scratch), sampling, options) for name, route in (("ours", Ours), ("stock", Stock))
        }
        print(
            f"{options.model}, {options.prompts} prompts x {options.images} images, {options.steps} steps, guidance"
            f" {options.guidance:g}, batches of {options.images_per_batch}, {options.dtype},"
            f" {machine(options.device)}, {options.clock} time"
        )
        check_agreement(routes["ours"], routes["stock"], prompts[0])
        rates = rates_in_turns(
            {name: functools.partial(route.run, prompts) for name, route in routes.items()},
            num_items=options.prompts * options.images,
            repeats=options.repeats,
            device=options.device,
            clock=options.clock,
        )
    print_rates(rates, "images")


if __name__ == "__main__":
    main()
