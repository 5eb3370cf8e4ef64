"""Each loss against its closed form in float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cdpo_ray.config.losses import LOSS_VARIANTS
from cdpo_ray.errors import TrainingError
from cdpo_ray.training.losses import kappa, preference_loss, safe_scale


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


def test_the_margin_is_positive_where_the_policy_improved_more_on_chosen_than_on_rejected() -> None:
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


def margins(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


GRID = margins([-30.0, -3.0, -0.5, 0.0, 0.25, 0.5, 1.0, 4.0, 30.0])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dpo", {}, lambda m: math.log1p(math.exp(-m)) if m > -20 else -m),
        ("ipo", {}, lambda m: m * m - m + 0.25),
        ("hinge", {}, lambda m: 1 - m if m < 1 else 0.0),
        (
            "robust",
            {"label_smoothing": 0.2},
            lambda m: (0.8 * math.log1p(math.exp(-m)) - 0.2 * math.log1p(math.exp(m))) / 0.6,
        ),
    ],
)
def test_each_loss_is_its_closed_form(name: str, options: dict[str, float], expected: Callable[[float], float]) -> None:
    zero = torch.zeros_like(GRID)
    loss, margin = preference_loss(
        -GRID, zero, zero, zero, beta=2, loss=name, options=options
    )  # kappa 1: the margin is GRID
    assert torch.equal(margin, GRID)
    assert loss.tolist() == pytest.approx([expected(m) for m in GRID.tolist()], rel=1e-9, abs=1e-9)


def test_ipos_published_form_is_the_loss_over_beta_squared() -> None:
    """``(h - 1/(2 beta))^2`` with the log-ratio difference ``h``, half the errors' difference."""
    given, beta = errors(3), 40.0
    policy_w, policy_l, reference_w, reference_l = (error.double() for error in given)
    h = -((policy_w - reference_w) - (policy_l - reference_l)) / 2
    published = (h - 1 / (2 * beta)) ** 2
    loss, _ = preference_loss(*(error.double() for error in given), beta=beta, loss="ipo")
    torch.testing.assert_close(loss / beta**2, published, rtol=1e-9, atol=1e-12)


def test_the_robust_loss_is_dpos_in_expectation_over_swapped_labels() -> None:
    """With a fraction of labels swapped, its mean equals the DPO loss on the true labels: it is unbiased."""
    share, zero = 0.3, torch.zeros_like(GRID)
    given = (-GRID, zero, zero, zero)
    swapped = (zero, -GRID, zero, zero)
    smoothing = {"beta": 2, "loss": "robust", "options": {"label_smoothing": share}}
    mean = (1 - share) * preference_loss(*given, **smoothing)[0] + share * preference_loss(*swapped, **smoothing)[0]
    torch.testing.assert_close(mean, preference_loss(*given, beta=2)[0], rtol=1e-9, atol=1e-9)


def test_sft_is_the_error_of_chosen_alone_and_still_reports_the_margin() -> None:
    given = errors(4)
    loss, margin = preference_loss(*given, beta=7, loss="sft")
    assert torch.equal(loss, given[0])
    assert torch.equal(margin, preference_loss(*given, beta=7)[1])


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge"])
def test_an_sft_mix_adds_kappa_times_the_chosens_error(name: str) -> None:
    given = errors(5)
    alone, mixed = (preference_loss(*given, beta=30, loss=name, sft_weight=weight)[0] for weight in (0.0, 0.1))
    torch.testing.assert_close(mixed - alone, 0.1 * 15 * given[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "robust"])
def test_every_loss_first_pulls_the_chosens_error_down_and_pushes_the_rejecteds_up(name: str) -> None:
    error_w, error_l, *_ = errors(1)
    policy_w, policy_l = error_w.clone().requires_grad_(), error_l.clone().requires_grad_()
    options = {"label_smoothing": 0.1} if name == "robust" else {}
    preference_loss(policy_w, policy_l, error_w, error_l, beta=100, loss=name, options=options)[0].sum().backward()
    slope = {"dpo": 25.0, "ipo": 50.0, "hinge": 50.0, "robust": 31.25}[name]  # kappa 50 times -d loss/d margin at 0
    torch.testing.assert_close(policy_w.grad, torch.full((64,), slope))
    torch.testing.assert_close(policy_l.grad, torch.full((64,), -slope))


@pytest.mark.parametrize("share", [-0.1, 0.5, 0.7])
def test_a_label_smoothing_outside_0_to_one_half_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"`label_smoothing` must be in 0 <= e < 0.5, got {share}"):
        preference_loss(*errors(0), beta=1, loss="robust", options={"label_smoothing": share})


@pytest.mark.parametrize("loss", [*LOSS_VARIANTS])
def test_every_loss_of_the_config_is_computed_with_its_options(loss: str) -> None:
    arguments = LOSS_VARIANTS[loss]().arguments
    assert preference_loss(*errors(0), beta=1, **arguments)[0].shape == (64,)


def test_a_users_own_loss_is_called_with_its_options() -> None:
    given = errors(6)
    loss, margin = preference_loss(*given, beta=9, loss="own_objectives:focal_dpo", options={"gamma": 2.0})
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-m)) / (1 + math.exp(m)) ** 2 for m in margin.tolist()])
    plain, _ = preference_loss(*given, beta=9, loss="own_objectives:focal_dpo", options={"gamma": 0.0})
    torch.testing.assert_close(plain, preference_loss(*given, beta=9)[0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("broken", {}, r"^loss `own_objectives:broken` raised KeyError: 'no such thing' at .*own_objectives.py:\d+$"),
        (
            "mean_loss",
            {},
            r"^loss `own_objectives:mean_loss`: must return a tensor of one loss per pair, \[64\], got shape",
        ),
        ("focal_dpo", {"gama": 1}, r"^loss `own_objectives:focal_dpo` raised TypeError: .*unexpected keyword .*'gama'"),
        ("missing", {}, r"^loss `own_objectives:missing`: cannot be imported: .*; the module must be installed"),
    ],
)
def test_a_faulty_loss_of_a_user_is_named(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        preference_loss(*errors(0), beta=1, loss=f"own_objectives:{name}", options=options)


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "own_objectives:focal_dpo"])
def test_an_adaptive_beta_is_the_loss_at_each_pairs_own_beta(name: str) -> None:
    """``beta_i = beta max(0, 1 + a (m_i - m_0))``: the loss of one pair after another at its constant beta."""
    given, beta, strength, mean = errors(7), 6.0, 0.6, 0.25
    options = {"gamma": 2.0} if ":" in name else {}
    loss, margin = preference_loss(
        *given, beta=beta, loss=name, options=options, adaptive_beta=strength, mean_margin=torch.tensor(mean)
    )
    assert torch.equal(margin, preference_loss(*given, beta=beta)[1])
    factors = [1 + strength * (each - mean) for each in margin.tolist()]
    assert min(factors) < 0 < max(factors)
    for pair, factor in enumerate(factors):
        alone = [error[pair : pair + 1] for error in given]
        own_beta = beta * max(factor, 1e-9)  # a beta of 0 is refused; its loss is that of margin 0
        expected, _ = preference_loss(*alone, beta=own_beta, loss=name, options=options)
        torch.testing.assert_close(loss[pair : pair + 1], expected, rtol=1e-4, atol=1e-6)


def test_an_adaptive_beta_has_no_gradient_and_pairs_far_below_the_mean_do_not_count() -> None:
    policy_w = torch.tensor([0.1, 0.6], requires_grad=True)
    half = torch.full((2,), 0.5)
    loss, margin = preference_loss(policy_w, half, half, half, beta=40, adaptive_beta=0.6)
    assert margin.tolist() == pytest.approx([8.0, -2.0])
    loss.sum().backward()
    factor = 1 + 0.6 * 8.0
    assert policy_w.grad is not None
    assert policy_w.grad.tolist() == pytest.approx([20 * factor / (1 + math.exp(8.0 * factor)), 0.0], rel=1e-4)


def gradients(seed: int, num_pairs: int = 256) -> tuple[Tensor, Tensor]:
    """Gradients of a loss with respect to predictions: downhill for chosen, uphill for rejected."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.randn(2, num_pairs, 2, 3, 1, generator=generator)
    slope_w, slope_l = 0.1 + torch.rand(2, num_pairs, 1, 1, 1, generator=generator)
    return slope_w * chosen, -slope_l * (rejected + chosen)


@pytest.mark.parametrize("kept", [0.0, 0.6, 1.0])
def test_the_safe_scale_is_the_largest_that_keeps_its_share_of_the_chosens_descent(kept: float) -> None:
    """Brute force: the chosen's error changes by -<g_w, step>, for g_w along the gradient of the chosen."""
    gradient_w, gradient_l = (each.double().flatten(1) for each in gradients(0))
    scale = safe_scale(*gradients(0), kept=kept).double()
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    along = (gradient_w * gradient_w).sum(1)[:, None] + grid * (gradient_w * gradient_l).sum(1)[:, None]
    is_safe = along >= kept * (gradient_w**2).sum(1)[:, None] - 1e-9
    expected = torch.where(is_safe, grid, torch.zeros_like(grid)).amax(dim=1)
    torch.testing.assert_close(scale, expected, rtol=0, atol=6e-4)
    assert (scale == 1).any() and (scale < 0.99).any()


def test_the_safe_scale_is_1_where_the_two_gradients_agree_and_where_there_is_none() -> None:
    gradient = gradients(1)[0]
    assert set(safe_scale(gradient, 0.5 * gradient, kept=0.9).tolist()) == {1.0}
    zero = torch.zeros_like(gradient)
    assert set(safe_scale(zero, zero).tolist()) == set(safe_scale(gradient, zero).tolist()) == {1.0}
    assert set(safe_scale(gradient, -1e-3 * gradient, kept=1.0).tolist()) == {0.0}


@pytest.mark.parametrize("kept", [-0.1, 1.1])
def test_a_kept_share_outside_0_to_1_is_refused(kept: float) -> None:
    with pytest.raises(ValueError, match=rf"`kept` must be in 0 <= kept <= 1, got {kept}"):
        safe_scale(*gradients(0), kept=kept)
