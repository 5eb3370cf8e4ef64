"""Implicit rewards of samples, against the margins of pairs."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from cdpo_ray.config.training import LoraSection
from cdpo_ray.models.stable_diffusion import StableDiffusion
from cdpo_ray.policy.implicit_rewards import sample_values
from cdpo_ray.policy.policy import Policy, make_policy
from cdpo_ray.randomness.noise import generator_at
from cdpo_ray.training.bank import SampleBank
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.losses import kappa, preference_loss
from cdpo_ray.training.update import METRICS, loss_of_pairs

BETA, NUM_DRAWS = 300.0, 2


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> StableDiffusion:
    return StableDiffusion.load(str(tiny_sd15), device="cpu", for_training=True)


@pytest.fixture(scope="module")
def policy(model: StableDiffusion) -> Policy:
    made = make_policy(model, LoraSection(rank=4, alpha=8, targets=("to_q", "to_v")))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.trainable:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.fixture(scope="module")
def bank(model: StableDiffusion) -> SampleBank:
    latents = torch.randn(3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return SampleBank(latents, model.encode_prompts(["x", "y", "z"])[0], np.arange(3))


def values(policy: Policy, bank: SampleBank, *, at_once: int = 4, worker_rank: int = 0) -> np.ndarray:
    return sample_values(
        policy,
        bank.latents,
        bank.conditioning,
        num_prompts=bank.latents.shape[0],
        kappa=kappa(BETA),
        num_draws=NUM_DRAWS,
        samples_per_launch=at_once,
        seed=7,
        stage=2,
        worker_rank=worker_rank,
        num_workers=1,
    ).mean(axis=0)


def test_the_difference_of_two_values_is_the_pairs_mean_margin(
    model: StableDiffusion, policy: Policy, bank: SampleBank
) -> None:
    found = values(policy, bank)
    loss_at_beta = partial(preference_loss, beta=BETA)
    for row, chosen, rejected in ((0, 0, 3), (1, 2, 1), (2, 3, 0)):
        margins = []
        for draw in range(NUM_DRAWS):
            generator = generator_at(7, "margin", 2, row, draw)
            times = {name: value[None] for name, value in model.draw_times(generator).items()}
            noise = torch.randn(1, 4, 8, 8, generator=generator)
            conditioning = {name: value[row : row + 1] for name, value in bank.conditioning.items()}
            latents_w, latents_l = bank.latents[row, chosen][None], bank.latents[row, rejected][None]
            batch = PairBatch(latents_w, latents_l, conditioning, times, noise)
            _, metrics = loss_of_pairs(policy, batch, preference_loss=loss_at_beta)
            margins.append(metrics[METRICS.index("margin")].item())
        assert found[row, chosen] - found[row, rejected] == pytest.approx(np.mean(margins), abs=0.01)
        assert abs(np.mean(margins)) > 0.05


def test_values_do_not_depend_on_samples_per_launch(policy: Policy, bank: SampleBank) -> None:
    np.testing.assert_allclose(values(policy, bank, at_once=3), values(policy, bank), atol=0.01)


def test_before_the_first_update_every_value_is_zero(tiny_sd15: Path, bank: SampleBank) -> None:
    fresh = StableDiffusion.load(str(tiny_sd15), device="cpu", for_training=True)
    untrained = make_policy(fresh, LoraSection(rank=4, alpha=8, targets=("to_q",)))
    assert not values(untrained, bank).any()
