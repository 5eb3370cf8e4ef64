"""Scenes -> AutoencoderKL, 32x32 pixels <-> 8x8x4 latents."""

import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from benchmarks.testbed.figures import save_figures
from benchmarks.testbed.pool import Pool, cosine_schedule, draw_pool

FOREGROUND_WEIGHT = 5.0
KL_WEIGHT = 1e-6
LEARNING_RATE = 3e-3
BATCH_SIZE = 16


def make_autoencoder() -> AutoencoderKL:
    """A KL autoencoder with a downsampling factor of 4."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    ).to(memory_format=torch.channels_last)


def reconstruction_error(output: Tensor, pixels: Tensor) -> Tensor:
    """L1 plus squared difference, with weight ``FOREGROUND_WEIGHT`` for the pixels of objects.

    Objects cover a seventh of the image; without weights, the model learns backgrounds first and shapes late.

    Args:
        output, pixels: ``[image, 3, 32, 32]`` in [-1, 1].
    """
    corner = pixels[:, :, :1, :1]
    foreground = ((pixels - corner).abs().amax(1, keepdim=True) > 0.1).float()
    difference = output - pixels
    weight = 1 + (FOREGROUND_WEIGHT - 1) * foreground
    return (weight * (difference.abs() + difference.square())).mean()


def train_autoencoder(weights_dir: Path, *, num_updates: int, num_scenes: int, seed: int) -> None:
    """Train and save to ``pipeline/vae``; ``scaling_factor`` makes the latents' standard deviation one."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    start = time.perf_counter()
    pool = draw_pool(num_scenes, seed)
    vae = make_autoencoder().train()
    optimizer = torch.optim.AdamW(vae.parameters(), LEARNING_RATE, weight_decay=0.0)
    schedule = cosine_schedule(optimizer, num_updates, num_warmup_updates=100)
    progress = tqdm(range(num_updates), desc="autoencoder", mininterval=5)
    for update in progress:
        pixels = pool.pixels(torch.randint(num_scenes, (BATCH_SIZE,))).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        output = vae.decode(posterior.sample()).sample
        loss = reconstruction_error(output, pixels) + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if update % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    vae.eval()
    vae.register_to_config(scaling_factor=round(1 / latent_std(vae, pool), 4))
    save_half(vae, weights_dir / "pipeline" / "vae")
    figures = {"seed": seed, "num_updates": num_updates, "images_seen": num_updates * BATCH_SIZE}
    save_figures(weights_dir, "autoencoder", {**figures, "train_seconds": time.perf_counter() - start})


@torch.no_grad()
def latent_std(vae: AutoencoderKL, pool: Pool, num_images: int = 1024) -> float:
    """Standard deviation over all values of the posterior's samples."""
    posterior = vae.encode(pool.pixels(torch.arange(min(num_images, len(pool.scenes))))).latent_dist
    return float(posterior.sample().std())


def save_half(model: torch.nn.Module, model_dir: Path) -> None:
    """Save a diffusers or transformers model as fp16 safetensors, leaving ``model`` in fp32."""
    model.half().save_pretrained(model_dir)  # type: ignore[operator]
    model.float()
