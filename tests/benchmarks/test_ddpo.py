"""DDPO benchmark: densities of denoising steps, loss, advantages, cost; tiny trainings of the embedded model."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal

from benchmarks.ddpo import (
    PromptStatistics,
    Setting,
    StochasticSampler,
    clipped_loss,
    cost_lines,
    log_probability,
    train_ddpo,
    visited_prompts,
)
from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.randomness.noise import noise_at

PROMPTS = ["a red circle on the left and a blue square on the right", "a green cross in the middle"]
TINY = Setting(
    num_images=8, images_per_prompt=2, num_rounds=2, num_updates=3, num_denoising_steps=2, learning_rate=1e-2
)


@pytest.fixture
def model(embedded: Path) -> TextToImageModel:
    return load_model("stable_diffusion", path=str(embedded), device="cpu")


def redness(images: torch.Tensor, prompts: list[str]) -> np.ndarray:
    return images[:, 0].float().mean((1, 2)).numpy()


def test_the_log_probability_is_that_of_torch_and_of_the_density_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, mean = torch.randn(2, 3, 4, 2, 2, generator=generator)
    std = torch.tensor(0.3)
    found = log_probability(latents, mean, std)
    torch.testing.assert_close(found, Normal(mean, std).log_prob(latents).mean(dim=(1, 2, 3)))
    for image in range(3):
        pairs = zip(latents[image].flatten().tolist(), mean[image].flatten().tolist(), strict=True)
        densities = [math.exp(-((x - m) ** 2) / (2 * 0.3**2)) / (0.3 * math.sqrt(2 * math.pi)) for x, m in pairs]
        assert found[image].item() == pytest.approx(math.log(math.prod(densities)) / 16, abs=1e-5)


@pytest.mark.parametrize("num_denoising_steps", [3, 10])
def test_a_denoising_step_is_the_schedulers_with_eta_1(model: TextToImageModel, num_denoising_steps: int) -> None:
    sampler = StochasticSampler(model, num_denoising_steps)
    latents, prediction, noise = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in sampler.timesteps:
        step = sampler.scheduler.step(prediction, timestep, latents, eta=1.0, variance_noise=noise).prev_sample
        torch.testing.assert_close(sampler.mean(latents, prediction, timestep) + sampler.std(timestep) * noise, step)
        assert sampler.std(timestep) > 0, "the last step, too, has a density"


@torch.no_grad()
def test_log_probabilities_are_those_of_the_addressed_noises_in_whatever_launch(model: TextToImageModel) -> None:
    sampler = StochasticSampler(model, 3)
    conditioning, _ = model.encode_prompts(PROMPTS)
    found = sampler.sample(conditioning, 5, "test")
    noises = torch.stack(
        [torch.stack([noise_at((4, 8, 8), 5, "test", image, step) for image in range(2)]) for step in range(4)]
    )
    torch.testing.assert_close(found.latents[0], noises[0])
    drawn = Normal(0.0, 1.0).log_prob(noises[1:]).mean(dim=(2, 3, 4))
    stds = torch.stack([sampler.std(timestep) for timestep in sampler.timesteps])
    torch.testing.assert_close(found.log_probs, drawn - stds.log()[:, None], atol=1e-5, rtol=0)
    torch.testing.assert_close(sampler.log_probs(found.latents, conditioning), found.log_probs, atol=1e-5, rtol=0)


def test_the_policy_gradient_is_the_gradient_of_the_expected_reward() -> None:
    shift = torch.tensor([0.3], requires_grad=True)

    def denoiser(latents: torch.Tensor, timesteps: torch.Tensor, **others: object) -> tuple[torch.Tensor]:
        return (0.5 * latents + shift * (timesteps[:, None, None, None] / 1000),)

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1, clip_sample=False)
    sampler = StochasticSampler(SimpleNamespace(denoiser=denoiser, pipeline=SimpleNamespace(scheduler=scheduler)), 4)
    num_images, noise = 400_000, torch.randn(5, 400_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    def run(initial: torch.Tensor, noises: torch.Tensor | list[float]) -> list[torch.Tensor]:
        latents = [initial]
        for timestep, drawn in zip(sampler.timesteps, noises, strict=True):
            (prediction,) = denoiser(latents[-1], torch.full((len(initial),), timestep))
            latents.append(sampler.mean(latents[-1], prediction, timestep) + sampler.std(timestep) * drawn)
        return latents

    expected = run(torch.zeros(1, 1, 1, 1), [0.0] * 4)[-1].sum()  # exact: the net is linear, and so is the reward
    (exact,) = torch.autograd.grad(expected, shift)
    with torch.no_grad():
        latents = torch.stack(run(noise[0], noise[1:]))
    rewards = latents[-1].flatten()
    log_probs = sampler.log_probs(latents, {"prompt_embedding": torch.zeros(num_images, 1, 1)})
    loss = clipped_loss(log_probs, log_probs.detach(), rewards - rewards.mean(), clip_range=1e-4).sum(dim=0).mean()
    (found,) = torch.autograd.grad(loss, shift)
    assert -found.item() == pytest.approx(exact.item(), rel=0.05)


def test_the_loss_is_that_of_each_case_and_its_gradient_at_first_that_of_reinforce() -> None:
    advantages, changes = torch.tensor([2.0, -3.0]), torch.tensor([[0.0, 0.0], [0.5, 0.5], [-0.5, -0.5], [0.05, -0.05]])
    old = torch.tensor([[-1.0, -2.0]]).expand_as(changes)
    new = (old + changes).requires_grad_()
    losses = clipped_loss(new, old, advantages, clip_range=0.1)
    losses.sum().backward()
    for step, image in np.ndindex(4, 2):
        advantage, weight = advantages[image].item(), math.exp(changes[step, image].item())
        beyond = weight > 1.1 if advantage > 0 else weight < 0.9
        limit = 1.1 if advantage > 0 else 0.9
        assert losses[step, image].item() == pytest.approx(-advantage * (limit if beyond else weight), abs=1e-5)
        assert new.grad is not None
        assert new.grad[step, image].item() == pytest.approx(0 if beyond else -advantage * weight, abs=1e-5)
    assert new.grad[0].tolist() == [-2.0, 3.0], "minus the advantage, REINFORCE's"


def test_advantages_are_normalised_by_the_prompts_own_last_rewards_once_there_are_enough() -> None:
    statistics = PromptStatistics(min_count=3)
    first = statistics.advantages(np.array([0, 0, 1, 1]), np.array([1.0, 3.0, 10.0, 14.0]))
    np.testing.assert_allclose(first, (np.array([1, 3, 10, 14]) - 7) / math.sqrt((36 + 16 + 9 + 49) / 4), rtol=1e-5)
    second = statistics.advantages(np.array([0, 2]), np.array([5.0, 1.0]))
    np.testing.assert_allclose(second, [(5 - 3) / math.sqrt(8 / 3), (1 - 3) / 2], rtol=1e-5)
    rewards = np.arange(40.0)
    last = statistics.advantages(np.full(40, 3), rewards)
    np.testing.assert_allclose(last, ((rewards - rewards[-16:].mean()) / rewards[-16:].std()).clip(-5, 5), rtol=1e-5)
    assert np.isfinite(statistics.advantages(np.array([4] * 3), np.ones(3))).all(), "equal rewards"


def test_every_prompt_is_visited_before_one_is_visited_again() -> None:
    setting = Setting(num_images=1024 * 3, num_rounds=96)
    order = visited_prompts(setting, 128, seed=0).reshape(3, 128)
    assert (np.sort(order) == np.arange(128)).all() and (order[0] != order[1]).any()
    assert (order != visited_prompts(setting, 128, seed=1).reshape(3, 128)).any()


def test_training_costs_what_the_setting_says_and_depends_on_the_seed_only(model: TextToImageModel) -> None:
    counts = {"forward": 0, "with gradient": 0}

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        counts["with gradient" if torch.is_grad_enabled() else "forward"] += len(inputs[0])

    model.denoiser.register_forward_pre_hook(count)
    records = train_ddpo(model, redness, PROMPTS, TINY, seed=0)
    assert (
        counts == {"forward": TINY.num_transitions, "with gradient": TINY.num_transitions}
        and len(records["reward"]) == 2
    )
    trained = [parameter.detach().clone() for parameter in model.denoiser.parameters() if parameter.requires_grad]
    assert any(value.any() for value in trained[1::2]), "the second factors start at 0"
    for seed, is_same in ((0, True), (1, False)):
        other = load_model("stable_diffusion", path="embedded", device="cpu")
        assert (train_ddpo(other, redness, PROMPTS, TINY, seed=seed) == records) == is_same
        weights = [parameter for parameter in other.denoiser.parameters() if parameter.requires_grad]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(weights, trained, strict=True)) == is_same


def test_the_default_costs_the_images_and_updates_of_an_arm_of_the_ablation() -> None:
    assert (Setting().num_images, Setting().num_updates, Setting().num_transitions) == (128 * 8, 200, 10_240)
    assert cost_lines(Setting())[-1] == "forwards with backward: DPO 6,400, DDPO 10,240"
    assert Setting().longer(4) == Setting(num_images=4096, num_rounds=128, num_updates=800)


def test_a_setting_that_leaves_a_round_or_an_update_empty_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of `images_per_prompt` = 8, got 1020"):
        Setting(num_images=1020)
    with pytest.raises(ValueError, match=r"must be 32 \(`num_rounds`\) to 1024, .* got 20"):
        Setting(num_updates=20)
    with pytest.raises(ValueError, match=r"to 1024, .* got 1100"):
        Setting(num_updates=1100)
