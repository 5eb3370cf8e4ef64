"""The distillation's maths is what diffusers' schedulers compute, and the weights are what it says."""

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, UNet2DConditionModel
from torch import Tensor

from cdpo_ray.testbed import PIPELINE_DIR
from cdpo_ray.testbed.consistency import load_consistency_pipeline
from cdpo_ray.testbed.oracle import judge
from cdpo_ray.testbed.scenes import caption, scene_prompts
from cdpo_ray.testbed.training.consistency import (
    GUIDANCE_CHANNELS,
    HUBER_WIDTH,
    MAX_GUIDANCE,
    MIN_GUIDANCE,
    consistency_function,
    ddim_step,
    encode_captions,
    make_consistency_scheduler,
    make_student,
    pseudo_huber,
)
from cdpo_ray.testbed.training.denoiser import encode_pool, make_scheduler
from cdpo_ray.testbed.training.measure import generate
from cdpo_ray.testbed.training.pool import draw_pool

GRID = torch.arange(19, 1000, 20)


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


def test_the_noise_is_the_teachers() -> None:
    assert torch.equal(make_consistency_scheduler().alphas_cumprod, make_scheduler().alphas_cumprod)


@pytest.mark.parametrize("num_denoising_steps", range(1, 51))
def test_the_sampler_visits_only_what_was_trained(num_denoising_steps: int) -> None:
    scheduler = make_consistency_scheduler()
    scheduler.set_timesteps(num_denoising_steps)
    assert set(scheduler.timesteps.tolist()) <= set(GRID.tolist())


def test_a_step_of_the_teacher_is_ddims_at_every_place_of_the_grid() -> None:
    ddim = DDIMScheduler.from_config(make_scheduler().config, timestep_spacing="trailing", set_alpha_to_one=True)
    ddim.set_timesteps(50)
    assert sorted(ddim.timesteps.tolist()) == GRID.tolist()
    latents, noise = draw(50, 4, 8, 8), draw(50, 4, 8, 8, seed=1)
    less_noisy, previous = ddim_step(latents, noise, GRID, make_consistency_scheduler())
    theirs = [ddim.step(noise[i], int(GRID[i]), latents[i]).prev_sample for i in range(50)]
    torch.testing.assert_close(less_noisy, torch.stack(theirs))
    assert previous.tolist() == [0, *GRID[:-1].tolist()]


def test_the_consistency_function_is_what_the_scheduler_calls_denoised() -> None:
    scheduler = make_consistency_scheduler()
    scheduler.set_timesteps(50)
    latents, noise = draw(50, 4, 8, 8), draw(50, 4, 8, 8, seed=1)
    theirs = [scheduler.step(noise[i], int(GRID[i]), latents[i]).denoised for i in range(50)]
    torch.testing.assert_close(consistency_function(latents, noise, GRID, scheduler), torch.stack(theirs))


def test_the_consistency_function_leaves_clean_latents_exactly_as_they_are() -> None:
    latents, noise = draw(2, 4, 8, 8), draw(2, 4, 8, 8, seed=1)
    output = consistency_function(latents, noise, torch.tensor([0, 0]), make_consistency_scheduler())
    assert torch.equal(output, latents)


def test_the_student_starts_as_its_teacher_whatever_the_guidance(teacher: UNet2DConditionModel) -> None:
    student, inputs = make_student(teacher), (draw(2, 4, 8, 8), torch.tensor([19, 999]), draw(2, 20, 128))
    with torch.no_grad():
        told = student(*inputs, timestep_cond=draw(2, GUIDANCE_CHANNELS)).sample
        torch.testing.assert_close(told, teacher(*inputs).sample)


def test_pseudo_huber_is_square_for_small_and_absolute_for_large_differences() -> None:
    zero = torch.zeros((), dtype=torch.float64)
    # 3, 4, 5: a difference of 4/3 c lies 5/3 c from the corner
    assert float(pseudo_huber(zero + HUBER_WIDTH * 4 / 3, zero)) == pytest.approx(HUBER_WIDTH * 2 / 3)
    assert float(pseudo_huber(zero + HUBER_WIDTH / 100, zero)) == pytest.approx(HUBER_WIDTH / 2e4, rel=1e-3)
    assert float(pseudo_huber(zero - 5, zero)) == pytest.approx(5 - HUBER_WIDTH, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_load_with_the_stock_pipeline_in_any_type(dtype: torch.dtype) -> None:
    pipeline = load_consistency_pipeline(dtype)
    assert type(pipeline) is LatentConsistencyModelPipeline
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {dtype}
    assert pipeline.unet.config.time_cond_proj_dim == GUIDANCE_CHANNELS
    assert pipeline.scheduler.to_json_string() == make_consistency_scheduler().to_json_string()


def test_guidance_enters_the_stock_sampler_as_it_entered_the_distillation(
    pipeline: LatentConsistencyModelPipeline,
) -> None:
    prompts, noise = scene_prompts("heldout", 4, seed=0), draw(4, 4, 8, 8)
    timesteps = torch.full((4,), 999)
    told = pipeline.get_guidance_scale_embedding(torch.full((4,), MAX_GUIDANCE), GUIDANCE_CHANNELS)
    with torch.no_grad():
        embeddings = encode_captions(pipeline, prompts)
        prediction = pipeline.unet(noise, timesteps, embeddings, timestep_cond=told).sample
    ours = consistency_function(noise, prediction, timesteps, make_consistency_scheduler())
    sampler = {"num_inference_steps": 1, "latents": noise, "output_type": "latent"}
    theirs = pipeline(prompts, guidance_scale=MAX_GUIDANCE + 1, **sampler).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    other = pipeline(prompts, guidance_scale=MAX_GUIDANCE, **sampler).images
    assert not torch.allclose(ours, other, rtol=1e-3, atol=1e-3)


def test_one_step_ends_nearer_to_the_teachers_many_than_the_teachers_one(
    pipeline: LatentConsistencyModelPipeline, teacher: UNet2DConditionModel
) -> None:
    scheduler, start = pipeline.scheduler, 499
    pool = draw_pool(24, seed=1)
    embeddings = encode_captions(pipeline, [caption(scene) for scene in pool.scenes])
    timesteps = torch.full((24,), start)
    noisy_latents = scheduler.add_noise(encode_pool(pool, pipeline.vae), draw(24, 4, 8, 8), timesteps)
    told = pipeline.get_guidance_scale_embedding(torch.full((24,), MIN_GUIDANCE), GUIDANCE_CHANNELS)
    untold = encode_captions(pipeline, [""]).expand_as(embeddings)
    with torch.no_grad():
        student_noise = pipeline.unet(noisy_latents, timesteps, embeddings, timestep_cond=told).sample
        student_end = consistency_function(noisy_latents, student_noise, timesteps, scheduler)
        teacher_noise = teacher(noisy_latents, timesteps, embeddings).sample
        teacher_end = consistency_function(noisy_latents, teacher_noise, timesteps, scheduler)
        latents = noisy_latents
        for timestep in range(start, 0, -20):
            timesteps = torch.full((24,), timestep)
            with_caption = teacher(latents, timesteps, embeddings).sample
            without = teacher(latents, timesteps, untold).sample
            guided = with_caption + MIN_GUIDANCE * (with_caption - without)
            latents, _ = ddim_step(latents, guided, timesteps, scheduler)
    distances = [float((end - latents).square().mean()) for end in (student_end, teacher_end)]
    assert distances[0] < 0.8 * distances[1]


def test_two_steps_draw_heldout_prompts_far_above_chance_but_leave_room(
    pipeline: LatentConsistencyModelPipeline,
) -> None:
    prompts = scene_prompts("heldout", 64, seed=0)
    images = {
        steps: generate(pipeline, prompts, guidance_scale=3.0, seed=0, num_denoising_steps=steps) for steps in (2, 8)
    }
    attr = {steps: judge(drawn, prompts)["attr"].mean() for steps, drawn in images.items()}
    chance = judge(images[2], prompts[1:] + prompts[:1])["attr"].mean()
    assert chance < 0.1
    assert 0.5 < attr[2] < attr[8] - 0.05


def test_images_depend_on_their_seed_alone(pipeline: LatentConsistencyModelPipeline) -> None:
    prompts = scene_prompts("heldout", 2, seed=0)
    first, again, other = (
        generate(pipeline, prompts, guidance_scale=3.0, seed=seed, num_denoising_steps=2) for seed in (0, 0, 1)
    )
    assert (first == again).all()
    assert (first != other).any()
