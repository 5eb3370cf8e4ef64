"""The safeguard: the gradient of an update's loss does not raise the chosen's error, to first order."""

import contextlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_policies import TARGETS, load, pairs_at
from torch import Tensor, nn

from cdpo_ray.config.training import LoraSection
from cdpo_ray.models.noising import squared_error
from cdpo_ray.policy.policy import Policy, make_policy
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.testbed.scenes import scene_prompts
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.losses import kappa, preference_loss
from cdpo_ray.training.update import PreferenceLoss, loss_of_pairs

BETA, NUM_PAIRS = 3.0, 64


class ConstantNet(nn.Module):
    """A linear model in whose output space the gradients are those of its parameters: one prediction per pair."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Parameter(torch.zeros(NUM_PAIRS, 1, 2, 2))

    def forward(self) -> Tensor:
        return torch.cat([self.output, self.output])  # of chosen and rejected


class LinearModel:
    """A family whose target are the latents; the other parts of a family are not needed."""

    error = staticmethod(squared_error)

    def denoising_task(self, reference: Any, latents: Tensor, *others: Any) -> Any:
        return SimpleNamespace(target=latents)

    def predict(self, net: Any, task: Any) -> Tensor:
        prediction: Tensor = net()
        return prediction

    def errors(self, net: Any, task: Any) -> Tensor:
        return self.error(self.predict(net, task), task.target)


def linear_pairs() -> tuple[ConstantNet, Policy, PairBatch]:
    """Pairs whose images lie on the same side of the prediction, at different distances."""
    generator = torch.Generator().manual_seed(0)
    net, model = ConstantNet(), LinearModel()
    policy = Policy(model, net, lambda net: contextlib.nullcontext(ConstantNet()))  # type: ignore[arg-type]
    chosen, rejected = torch.randn(2, NUM_PAIRS, 1, 2, 2, generator=generator)
    nothing: dict[str, Tensor] = {}
    return net, policy, PairBatch(chosen, rejected + 0.7 * chosen, nothing, nothing, torch.zeros_like(chosen))


def losses() -> list[PreferenceLoss]:
    loss = partial(preference_loss, beta=BETA)
    return [
        loss,
        partial(loss, loss="ipo"),
        partial(loss, loss="hinge"),
        partial(loss, loss="robust", options={"label_smoothing": 0.2}),
        partial(loss, loss="own_objectives:focal_dpo", options={"gamma": 1.0}),
        partial(loss, sft_weight=0.5),
        partial(loss, adaptive_beta=0.6, mean_margin=-0.1),
    ]


def step_of(net: ConstantNet, policy: Policy, batch: PairBatch, loss: PreferenceLoss, kept: float | None) -> Tensor:
    """Step along the gradient of the summed loss: ``[pair, ...]``."""
    net.zero_grad()
    (NUM_PAIRS * loss_of_pairs(policy, batch, preference_loss=loss, safeguard=kept)[0]).backward()
    assert net.output.grad is not None
    return -net.output.grad


def chosen_change(net: ConstantNet, batch: PairBatch, step: Tensor) -> Tensor:
    """First-order change of each chosen's error by a step of unit length."""
    gradient = 2 * (net.output.detach() - batch.latents_w) / batch.latents_w[0].numel()
    return (gradient * step).flatten(1).sum(dim=1)


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("loss", losses())
def test_where_output_and_parameter_space_agree_the_chosens_error_keeps_its_share_of_the_descent(
    loss: PreferenceLoss, kept: float
) -> None:
    net, policy, batch = linear_pairs()
    plain = chosen_change(net, batch, step_of(net, policy, batch, loss, None))
    safe = chosen_change(net, batch, step_of(net, policy, batch, loss, kept))
    alone = chosen_change(net, batch, step_of(net, policy, batch, only_chosen(loss), None))
    assert (plain > 1e-3).any(), "without the safeguard some rise"
    assert (safe <= kept * alone + 1e-6).all()
    assert torch.allclose(safe, torch.minimum(plain, kept * alone), atol=1e-6), "and no gradient is lost without need"


def only_chosen(loss: PreferenceLoss) -> PreferenceLoss:
    """The same loss, whose gradient does not reach the rejected."""
    return lambda error_w, error_l, *others: loss(error_w, error_l.detach(), *others)


def test_the_step_is_its_closed_form() -> None:
    """At the start the slopes are +-kappa/2: the step is ``-kappa/2 (g_w - scale g_l)``."""
    net, policy, batch = linear_pairs()
    step = step_of(net, policy, batch, partial(preference_loss, beta=BETA), 0.0)
    g_w, g_l = (2 * (net.output.detach() - each) / 4 for each in (batch.latents_w, batch.latents_l))
    product, norm = (g_w * g_l).flatten(1).sum(1), (g_w**2).flatten(1).sum(1)
    scale = torch.where(product > 0, (norm / product).clamp(max=1), torch.ones(NUM_PAIRS))
    torch.testing.assert_close(step, -kappa(BETA) / 2 * (g_w - scale[:, None, None, None] * g_l))


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
def test_a_small_step_of_a_unet_lowers_the_chosens_error_more_often_with_the_safeguard() -> None:
    """A net's Jacobians differ between the two images, so the safeguard is an approximation there.

    Images of the embedded model, most of whose pairs need no safeguard unless most of the descent is kept.
    """
    model = load(Path("embedded"), "stable_diffusion", for_training=True)
    policy = make_policy(model, LoraSection(targets=TARGETS))
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += 0.02 * torch.randn(parameter.shape, generator=numbers)
    conditioning, _ = model.encode_prompts(scene_prompts("train", 8, 0))
    latents = [
        model.sample(conditioning, noise_at((8, 4, 8, 8), 0, what), num_denoising_steps=4, guidance_scale=1.0)
        for what in ("chosen", "rejected")
    ]
    times = {"timestep": torch.linspace(20, 980, 8).long()}
    pairs = PairBatch(latents[0], latents[1], conditioning, times, noise_at((8, 4, 8, 8), 0, "noise"))
    num_falls = [sum(chosen_falls(policy, pairs, pair, kept) for pair in range(8)) for kept in (None, 0.9)]
    assert num_falls[0] < num_falls[1] == 8


def chosen_falls(policy: Policy, pairs: PairBatch, pair: int, kept: float | None) -> bool:
    """Whether one small step on one pair, which is undone, lowers the chosen's error."""
    batch = pairs_at(pairs, slice(pair, pair + 1))
    loss, _ = loss_of_pairs(policy, batch, preference_loss=partial(preference_loss, beta=200.0), safeguard=kept)
    step = torch.autograd.grad(loss, policy.trainable)
    size = 1e-3 / torch.stack([each.norm() for each in step]).norm()
    before = chosen_error(policy, batch)
    with torch.no_grad():
        for parameter, each in zip(policy.trainable, step, strict=True):
            parameter -= size * each
        after = chosen_error(policy, batch)
        for parameter, each in zip(policy.trainable, step, strict=True):
            parameter += size * each
    return after < before


@torch.no_grad()
def chosen_error(policy: Policy, batch: PairBatch) -> float:
    task = policy.model.denoising_task(policy.net, batch.latents_w, batch.conditioning, batch.times, batch.noise)
    return policy.model.errors(policy.net, task).item()
