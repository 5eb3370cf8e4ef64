"""The Diffusion-DPO loss against its closed form in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cdpo_ray.training.losses import kappa, preference_loss


def errors(seed: int, pairs: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(pairs, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("beta", [0.5, 5.0, 2000.0])
def test_loss_and_margin_are_the_closed_form_in_float64(beta: float) -> None:
    given = errors(0)
    policy_w, policy_l, reference_w, reference_l = (error.numpy().astype(np.float64) for error in given)
    expected = -beta / 2 * ((policy_w - reference_w) - (policy_l - reference_l))
    loss, margin = preference_loss(*given, beta=beta)
    np.testing.assert_allclose(margin.numpy(), expected, rtol=1e-5, atol=2e-7 * beta)
    np.testing.assert_allclose(loss.numpy(), np.logaddexp(0, -expected), rtol=1e-5, atol=2e-7 * beta)


def test_at_the_start_the_loss_is_ln_2_and_the_margin_zero_exactly() -> None:
    error_w, error_l, *_ = errors(1)
    loss, margin = preference_loss(error_w, error_l, error_w.clone(), error_l.clone(), beta=5000)
    assert torch.equal(margin, torch.zeros(64))
    assert set(loss.tolist()) == {torch.tensor(math.log(2)).item()}


def test_at_the_start_the_gradient_is_half_kappa_down_for_chosen_and_up_for_rejected() -> None:
    error_w, error_l, *_ = errors(1)
    policy_w, policy_l = error_w.clone().requires_grad_(), error_l.clone().requires_grad_()
    preference_loss(policy_w, policy_l, error_w, error_l, beta=100)[0].sum().backward()
    assert policy_w.grad is not None and policy_l.grad is not None
    torch.testing.assert_close(policy_w.grad, torch.full((64,), 25.0))
    torch.testing.assert_close(policy_l.grad, torch.full((64,), -25.0))


def test_the_margin_is_positive_where_the_policy_got_better_at_chosen_than_at_rejected() -> None:
    one, less, more = torch.tensor([1.0]), torch.tensor([0.9]), torch.tensor([1.1])
    for policy_w, policy_l, sign in ((less, one, 1), (one, more, 1), (more, one, -1), (one, less, -1), (less, less, 0)):
        loss, margin = preference_loss(policy_w, policy_l, one, one, beta=10)
        assert torch.sign(margin).item() == sign
        assert torch.sign(math.log(2) - loss).item() == sign


def test_each_pair_has_its_own_loss() -> None:
    given = errors(2, pairs=5)
    together, _ = preference_loss(*given, beta=20)
    alone = [preference_loss(*(error[place : place + 1] for error in given), beta=20)[0] for place in range(5)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(("policy_error", "margin", "loss", "slope"), [(2.0, -1e4, 1e4, 1e4), (0.0, 1e4, 0.0, 0.0)])
def test_a_margin_of_ten_thousand_neither_overflows_nor_loses_its_gradient(
    policy_error: float, margin: float, loss: float, slope: float
) -> None:
    policy, one = torch.tensor([policy_error], requires_grad=True), torch.ones(1)
    found, found_margin = preference_loss(policy, one, one, one, beta=2e4)
    found.sum().backward()
    assert (found_margin.item(), found.item()) == (margin, loss)
    assert policy.grad is not None and policy.grad.item() == slope


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_a_beta_that_is_not_positive_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"`beta` must be > 0, got {beta}"):
        preference_loss(*errors(0), beta=beta)


def test_kappa_is_half_of_beta() -> None:
    assert kappa(5000) == 2500
