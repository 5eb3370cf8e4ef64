"""Trained pipeline -> consistency model, by latent consistency distillation."""

import copy
import time
from pathlib import Path

import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm

from benchmarks.testbed.autoencoder import save_half
from benchmarks.testbed.denoiser import encode_pool, make_scheduler, move_average
from benchmarks.testbed.figures import save_figures
from benchmarks.testbed.pool import cosine_schedule, draw_pool
from cdpo_ray.models.consistency import (
    GRID_STEP,
    clean_and_noise,
    consistency_function,
    ddim_step,
    grid_timesteps,
    pseudo_huber,
)
from cdpo_ray.testbed.scenes import caption

LEARNING_RATE = 5e-4
BATCH_SIZE = 64
EMA_DECAY = 0.95
GUIDANCE = 0.0
"""The ``w`` of the teacher; a pipeline's ``guidance_scale`` is ``w + 1``. 0, because DPO raises the attributes of
a model that was distilled without guidance, and not those of one distilled with 1 to 3 (`docs/log.md`)."""
GUIDANCE_CHANNELS = 256


def make_consistency_scheduler() -> LCMScheduler:
    """The teacher's noise schedule; the sampler's timesteps are on the grid of the distillation."""
    teacher = make_scheduler().config
    return LCMScheduler(
        num_train_timesteps=teacher.num_train_timesteps,
        beta_start=teacher.beta_start,
        beta_end=teacher.beta_end,
        beta_schedule=teacher.beta_schedule,
        original_inference_steps=len(grid_timesteps()),
    )


def make_student(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The teacher with an embedding of the guidance, whose weights are zero: it starts as the teacher."""
    student = UNet2DConditionModel.from_config(teacher.config, time_cond_proj_dim=GUIDANCE_CHANNELS)
    student.register_to_config(_name_or_path="")  # otherwise the folder that the teacher was loaded from
    guidance_weight = torch.zeros_like(student.time_embedding.cond_proj.weight)
    student.load_state_dict({**teacher.state_dict(), "time_embedding.cond_proj.weight": guidance_weight})
    return student.to(memory_format=torch.channels_last)


def train_consistency(weights_dir: Path, *, num_updates: int, num_scenes: int, seed: int) -> None:
    """Distil ``pipeline`` without guidance; save the student's moving average and its scheduler to ``consistency``.

    Source: arXiv:2310.04378, algorithm 1.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    start = time.perf_counter()
    scheduler = make_consistency_scheduler()
    teacher = UNet2DConditionModel.from_pretrained(
        weights_dir / "pipeline" / "unet", dtype=torch.float32, use_safetensors=True
    )
    teacher.to(memory_format=torch.channels_last).requires_grad_(False)
    student = make_student(teacher).train()
    average = copy.deepcopy(student).requires_grad_(False)
    pipeline = LatentConsistencyModelPipeline.from_pretrained(
        weights_dir / "pipeline", unet=student, scheduler=scheduler, dtype=torch.float32, use_safetensors=True
    )
    pool = draw_pool(num_scenes, seed)
    latents = encode_pool(pool, pipeline.vae)
    captions = [caption(scene) for scene in pool.scenes]
    guidance_embedding = pipeline.get_guidance_scale_embedding(torch.full((BATCH_SIZE,), GUIDANCE), GUIDANCE_CHANNELS)

    def denoised(net: UNet2DConditionModel, noisy_latents: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        prediction = net(noisy_latents, timesteps, **conditions).sample
        alpha_bar = scheduler.alphas_cumprod[timesteps]
        clean, _ = clean_and_noise(noisy_latents, prediction, alpha_bar, "epsilon")
        return consistency_function(noisy_latents, clean, timesteps)

    grid = grid_timesteps()
    alpha_bars = scheduler.alphas_cumprod[grid]
    alpha_bars_below = torch.cat([scheduler.final_alpha_cumprod[None], alpha_bars[:-1]])
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, weight_decay=0.0)
    schedule = cosine_schedule(optimizer, num_updates, num_warmup_updates=20)
    progress = tqdm(range(num_updates), desc="consistency", mininterval=5)
    for update in progress:
        index = torch.randint(num_scenes, (BATCH_SIZE,))
        place = torch.randint(len(grid), (BATCH_SIZE,))
        timesteps, previous = grid[place], (grid[place] - GRID_STEP).clamp(min=0)
        embeddings = encode_captions(pipeline, [captions[i] for i in index])
        conditions = {"encoder_hidden_states": embeddings, "timestep_cond": guidance_embedding}
        noisy_latents = scheduler.add_noise(latents[index], torch.randn_like(latents[index]), timesteps)
        noisy_latents = noisy_latents.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            noise = teacher(noisy_latents, timesteps, embeddings).sample
            less_noisy = ddim_step(noisy_latents, noise, alpha_bars[place], alpha_bars_below[place], "epsilon")
            target = denoised(average, less_noisy, previous, **conditions)
        loss = pseudo_huber(denoised(student, noisy_latents, timesteps, **conditions), target).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        move_average(average.parameters(), student.parameters(), EMA_DECAY)
        if update % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    save_half(average, weights_dir / "consistency" / "unet")
    scheduler.save_pretrained(weights_dir / "consistency" / "scheduler")
    figures = {"seed": seed, "num_updates": num_updates, "images_seen": num_updates * BATCH_SIZE}
    save_figures(weights_dir, "consistency", {**figures, "train_seconds": time.perf_counter() - start})


@torch.no_grad()
def encode_captions(pipeline: LatentConsistencyModelPipeline, captions: list[str]) -> Tensor:
    """Embeddings ``[caption, token, channel]`` of captions."""
    embeddings, _ = pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)
    return embeddings
