"""The consistency family: its sampler, its task, and its whole loss against plain diffusers calls in float64."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from cdpo_ray.errors import ModelError
from cdpo_ray.models.latent_consistency import LatentConsistency
from cdpo_ray.models.seeds import generator_at, noise_at
from cdpo_ray.testbed import PIPELINE_DIR
from cdpo_ray.testbed.consistency import load_consistency_pipeline
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.job import LoraJob
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.policy import make_policy
from cdpo_ray.training.update import METRICS, loss_of_pairs

PROMPTS = ["a red circle in the middle", "a blue square on the left"]
BETA = 400.0


def load(folders: Callable[[str], Path], **given: Any) -> LatentConsistency:
    teacher = {"path": str(folders("stable_diffusion"))}
    return LatentConsistency.load(str(folders("latent_consistency")), device="cpu", teacher=teacher, **given)


def batch_of(model: LatentConsistency) -> PairBatch:
    return PairBatch(
        noise_at((2, 4, 8, 8), 0, "chosen"),
        noise_at((2, 4, 8, 8), 0, "rejected"),
        model.encode_prompts(PROMPTS)[0],
        {"timestep": torch.tensor([19, 779]), "guidance": torch.tensor([5.5, 12.0])},
        noise_at((2, 4, 8, 8), 0, "noise"),
    )


def test_one_step_images_are_the_stock_pipelines(tiny_models: Callable[[str], Path]) -> None:
    model = load(tiny_models)
    noise = noise_at((2, 4, 8, 8), 0, "image")
    sampled = model.sample(model.encode_prompts(PROMPTS)[0], noise, num_denoising_steps=1, guidance_scale=8.0)
    stock = copy.copy(model.pipeline)
    theirs = stock(PROMPTS, latents=noise, num_inference_steps=1, guidance_scale=8.0, output_type="latent").images
    torch.testing.assert_close(sampled, theirs, rtol=1e-5, atol=1e-5)


def test_images_of_several_steps_do_not_depend_on_the_batch(tiny_models: Callable[[str], Path]) -> None:
    """The sampler adds noise between its steps: a function of each image's first noise."""
    model = load(tiny_models)
    noise = noise_at((3, 4, 8, 8), 0, "image")
    conditioning, _ = model.encode_prompts([*PROMPTS, "x"])
    sample = partial(model.sample, num_denoising_steps=4, guidance_scale=8.0)
    together = sample(conditioning, noise)
    for row in (2, 0, 1):
        alone = sample({"prompt_embedding": conditioning["prompt_embedding"][row : row + 1]}, noise[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-3, atol=1e-3)
    assert torch.equal(sample(conditioning, noise), together)


def test_the_embedded_model_samples_as_its_stock_pipeline() -> None:
    model = LatentConsistency.load("embedded", device="cpu")
    noise = noise_at((2, 4, 8, 8), 0, "image")
    sampled = model.sample(model.encode_prompts(PROMPTS)[0], noise, num_denoising_steps=1, guidance_scale=3.0)
    stock = load_consistency_pipeline()
    stock.set_progress_bar_config(disable=True)
    theirs = stock(PROMPTS, latents=noise, num_inference_steps=1, guidance_scale=3.0, output_type="latent").images
    torch.testing.assert_close(sampled, theirs, rtol=1e-5, atol=1e-5)


def test_training_has_the_teacher_and_no_decoder() -> None:
    model = LatentConsistency.load("embedded", device="cpu", for_training=True)
    teacher = UNet2DConditionModel.from_pretrained(PIPELINE_DIR / "unet", dtype=torch.float32)
    assert model.pipeline.vae is None
    for ours, theirs in zip(model.teacher.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs) and not ours.requires_grad


def test_timesteps_are_uniform_over_the_grid_and_guidance_over_its_range(tiny_models: Callable[[str], Path]) -> None:
    model = load(tiny_models)
    drawn = [model.draw_times(generator_at(0, "draw", number)) for number in range(3000)]
    timesteps = torch.stack([times["timestep"] for times in drawn])
    counts = torch.bincount((timesteps - 19) // 20, minlength=50).double()
    assert torch.equal((timesteps - 19) % 20, torch.zeros_like(timesteps))
    assert len(counts) == 50 and ((counts - 60) ** 2 / 60).sum() < 85.4  # chi square of 49 degrees of freedom, 99.9 %
    guidance = torch.stack([times["guidance"] for times in drawn])
    assert 5 <= guidance.min() < 5.1 and 14.9 < guidance.max() <= 15
    assert abs(guidance.mean() - 10) < 4 * 10 / (12 * 3000) ** 0.5


def test_a_batch_of_pairs_takes_four_launches(tiny_models: Callable[[str], Path]) -> None:
    model = load(tiny_models, for_training=True)
    lora = LoraJob(4, 8, ("to_q",))
    policy = make_policy(model, lora, start_dir=None, reference_is_start=False, seed=0)
    launches: list[int] = []
    for net in (model.denoiser, model.teacher):
        net.register_forward_pre_hook(lambda net, given: launches.append(len(given[0])))
    loss_at_beta = partial(preference_loss, beta=BETA)
    loss_of_pairs(
        model, model.denoiser, policy.reference, model.denoiser, batch_of(model), preference_loss=loss_at_beta
    )
    assert launches == [8, 4, 4, 4]  # teacher with and without prompt, target, reference, policy


def test_the_whole_loss_is_that_of_plain_diffusers_calls_in_float64(tiny_models: Callable[[str], Path]) -> None:
    model = load(tiny_models, for_training=True)
    lora = LoraJob(4, 8, ("to_q", "to_k", "to_v", "to_out.0", "conv1", "time_emb_proj"))
    policy = make_policy(model, lora, start_dir=None, reference_is_start=False, seed=0)
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += 0.05 * torch.randn(parameter.shape, generator=numbers)
    batch = batch_of(model)
    merged = copy.deepcopy(model.denoiser)
    merged.fuse_lora()
    merged.unload_lora()
    merged = merged.double()
    base = load(tiny_models).denoiser.double()
    teacher = UNet2DConditionModel.from_pretrained(tiny_models("stable_diffusion"), subfolder="unet").double()
    ddim = DDIMScheduler.from_pretrained(
        tiny_models("stable_diffusion"), subfolder="scheduler", timestep_spacing="trailing", steps_offset=0
    )
    ddim.set_timesteps(50)
    lcm = LCMScheduler.from_pretrained(tiny_models("latent_consistency"), subfolder="scheduler")
    words = batch.conditioning["prompt_embedding"].double()
    empty = model.empty_conditioning["prompt_embedding"].double()

    @torch.no_grad()
    def landed(net: nn.Module, latents: Tensor, timestep: int, row: int) -> Tensor:
        told = model.pipeline.get_guidance_scale_embedding(batch.times["guidance"][row : row + 1], 256).double()
        output = net(latents, timestep, words[row : row + 1], timestep_cond=told).sample
        c_skip, c_out = lcm.get_scalings_for_boundary_condition_discrete(timestep)
        alpha = lcm.alphas_cumprod[timestep].double()
        return c_skip * latents + c_out * (latents - (1 - alpha).sqrt() * output) / alpha.sqrt()

    @torch.no_grad()
    def errors(latents: Tensor, row: int) -> tuple[Tensor, Tensor]:
        timestep, w = int(batch.times["timestep"][row]), batch.times["guidance"][row].double()
        noise = batch.noise[row : row + 1].double()
        noisy = ddim.add_noise(latents[row : row + 1].double(), noise, torch.tensor([timestep]))
        told, untold = (teacher(noisy, timestep, text).sample for text in (words[row : row + 1], empty))
        step = ddim.step(untold + (w + 1) * (told - untold), timestep, noisy, eta=0.0)
        target = landed(base, step.prev_sample, max(timestep - 20, 0), row)

        def distance(net: nn.Module) -> Tensor:
            return (((landed(net, noisy, timestep, row) - target) ** 2 + 1e-6).sqrt() - 1e-3).mean()

        return distance(merged), distance(base)

    margins = []
    for row in range(2):
        (policy_w, base_w), (policy_l, base_l) = errors(batch.latents_w, row), errors(batch.latents_l, row)
        margins.append(-BETA / 2 * ((policy_w - base_w) - (policy_l - base_l)))
    margin = torch.stack(margins)
    loss_at_beta = partial(preference_loss, beta=BETA)
    loss, metrics = loss_of_pairs(
        model, model.denoiser, policy.reference, model.denoiser, batch, preference_loss=loss_at_beta
    )
    assert metrics[METRICS.index("margin")].item() == pytest.approx(margin.mean().item(), rel=1e-3, abs=5e-3)
    assert loss.item() == pytest.approx(torch.log1p(torch.exp(-margin)).mean().item(), rel=1e-3, abs=5e-3)
    assert margin.abs().min() > 0.05


def test_a_teacher_that_is_not_there_is_named(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"`model\.teacher` .*/nowhere \(revision None\): cannot be loaded: "):
        LatentConsistency.load(
            str(tiny_models("latent_consistency")),
            device="cpu",
            for_training=True,
            teacher={"path": str(tmp_path / "nowhere")},
        )
