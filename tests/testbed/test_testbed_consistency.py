"""Distillation of the consistency model, and its shipped weights."""

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from torch import Tensor

from benchmarks.testbed.consistency import (
    GUIDANCE,
    GUIDANCE_CHANNELS,
    encode_captions,
    make_consistency_scheduler,
    make_student,
)
from benchmarks.testbed.denoiser import encode_pool, make_scheduler
from benchmarks.testbed.measure import generate
from benchmarks.testbed.pool import draw_pool
from cdpo_ray.models.consistency import clean_and_noise, consistency_function, ddim_step, grid_timesteps
from cdpo_ray.testbed import PIPELINE_DIR
from cdpo_ray.testbed.consistency import load_consistency_pipeline
from cdpo_ray.testbed.oracle import judge
from cdpo_ray.testbed.scenes import caption, scene_prompts


def denoised(noisy_latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Latents at the end of the trajectory, for a predicted noise."""
    alpha_bar = make_consistency_scheduler().alphas_cumprod[timesteps]
    clean, _ = clean_and_noise(noisy_latents, noise, alpha_bar, "epsilon")
    return consistency_function(noisy_latents, clean, timesteps)


@pytest.fixture(scope="module")
def pipeline() -> LatentConsistencyModelPipeline:
    pipeline = load_consistency_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def teacher() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(PIPELINE_DIR / "unet", dtype=torch.float32)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_noise_schedule_is_the_teachers() -> None:
    assert torch.equal(make_consistency_scheduler().alphas_cumprod, make_scheduler().alphas_cumprod)


@pytest.mark.parametrize("num_denoising_steps", range(1, 51))
def test_the_sampler_uses_only_trained_timesteps(num_denoising_steps: int) -> None:
    scheduler = make_consistency_scheduler()
    scheduler.set_timesteps(num_denoising_steps)
    assert set(scheduler.timesteps.tolist()) <= set(grid_timesteps().tolist())


def test_the_student_starts_as_its_teacher_for_any_guidance(teacher: UNet2DConditionModel) -> None:
    student, inputs = make_student(teacher), (draw(2, 4, 8, 8), torch.tensor([19, 999]), draw(2, 20, 128))
    with torch.no_grad():
        predicted = student(*inputs, timestep_cond=draw(2, GUIDANCE_CHANNELS)).sample
        torch.testing.assert_close(predicted, teacher(*inputs).sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_load_with_the_stock_pipeline_in_any_type(dtype: torch.dtype) -> None:
    pipeline = load_consistency_pipeline(dtype)
    assert type(pipeline) is LatentConsistencyModelPipeline
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {dtype}
    assert pipeline.unet.config.time_cond_proj_dim == GUIDANCE_CHANNELS
    assert pipeline.scheduler.to_json_string() == make_consistency_scheduler().to_json_string()


def test_the_stock_sampler_embeds_guidance_as_the_distillation_does(
    pipeline: LatentConsistencyModelPipeline,
) -> None:
    prompts, noise = scene_prompts("heldout", 4, seed=0), draw(4, 4, 8, 8)
    timesteps = torch.full((4,), 999)
    guidance = pipeline.get_guidance_scale_embedding(torch.full((4,), GUIDANCE), GUIDANCE_CHANNELS)
    with torch.no_grad():
        embeddings = encode_captions(pipeline, prompts)
        prediction = pipeline.unet(noise, timesteps, embeddings, timestep_cond=guidance).sample
    ours = denoised(noise, prediction, timesteps)
    sampler = {"num_inference_steps": 1, "latents": noise, "output_type": "latent"}
    theirs = pipeline(prompts, guidance_scale=GUIDANCE + 1, **sampler).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    other = pipeline(prompts, guidance_scale=GUIDANCE + 4, **sampler).images
    assert not torch.allclose(ours, other, rtol=1e-3, atol=1e-3)


def test_one_step_of_the_student_is_nearer_to_many_teacher_steps_than_one_teacher_step(
    pipeline: LatentConsistencyModelPipeline, teacher: UNet2DConditionModel
) -> None:
    scheduler, start = pipeline.scheduler, 499
    pool = draw_pool(24, seed=1)
    embeddings = encode_captions(pipeline, [caption(scene) for scene in pool.scenes])
    timesteps = torch.full((24,), start)
    noisy_latents = scheduler.add_noise(encode_pool(pool, pipeline.vae), draw(24, 4, 8, 8), timesteps)
    guidance = pipeline.get_guidance_scale_embedding(torch.full((24,), GUIDANCE), GUIDANCE_CHANNELS)
    with torch.no_grad():
        student_noise = pipeline.unet(noisy_latents, timesteps, embeddings, timestep_cond=guidance).sample
        student_end = denoised(noisy_latents, student_noise, timesteps)
        teacher_noise = teacher(noisy_latents, timesteps, embeddings).sample
        teacher_end = denoised(noisy_latents, teacher_noise, timesteps)
        latents = noisy_latents
        for timestep in range(start, 0, -20):
            timesteps = torch.full((24,), timestep)
            noise = teacher(latents, timesteps, embeddings).sample
            alpha_bar, below = (scheduler.alphas_cumprod[t].expand(24) for t in (timestep, max(timestep - 20, 0)))
            latents = ddim_step(latents, noise, alpha_bar, below, "epsilon")
    distances = [float((end - latents).square().mean()) for end in (student_end, teacher_end)]
    assert distances[0] < 0.8 * distances[1]


def test_two_steps_score_far_above_chance_on_heldout_prompts_but_below_eight(
    pipeline: LatentConsistencyModelPipeline,
) -> None:
    prompts = scene_prompts("heldout", 64, seed=0)
    images = {
        steps: generate(pipeline, prompts, guidance_scale=GUIDANCE + 1, seed=0, num_denoising_steps=steps)
        for steps in (2, 8)
    }
    attr = {steps: judge(drawn, prompts)["attr"].mean() for steps, drawn in images.items()}
    chance = judge(images[2], prompts[1:] + prompts[:1])["attr"].mean()
    assert chance < 0.1
    assert 0.5 < attr[2] < attr[8] - 0.05


def test_images_are_a_function_of_their_seed(pipeline: LatentConsistencyModelPipeline) -> None:
    prompts = scene_prompts("heldout", 2, seed=0)
    first, again, other = (
        generate(pipeline, prompts, guidance_scale=GUIDANCE + 1, seed=seed, num_denoising_steps=2) for seed in (0, 0, 1)
    )
    assert (first == again).all()
    assert (first != other).any()
