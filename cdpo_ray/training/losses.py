"""Four errors of a pair -> loss and margin; one entry per loss in `LOSSES`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdpo_ray.errors import TrainingError
from cdpo_ray.user_code import attribute_errors, load_function


def kappa(beta: float) -> float:
    """Factor between the difference of errors and the margin: ``beta / 2``.

    The 1/2 is that of the released Diffusion-DPO code, so published betas carry over.

    Raises:
        ValueError: if ``beta`` is not positive.
    """
    if not beta > 0:
        raise ValueError(
            f"`beta` must be > 0, got {beta}; published runs use 2000-5000 with errors averaged over 16,384 values"
        )
    return beta / 2


def implicit_margin(
    policy_error_w: Tensor, policy_error_l: Tensor, reference_error_w: Tensor, reference_error_l: Tensor, *, beta: float
) -> Tensor:
    """Implicit reward of chosen minus that of rejected, ``[pair]``, in nats.

    ``-beta/2 * ((policy_error_w - reference_error_w) - (policy_error_l - reference_error_l))``.

    Args:
        policy_error_w, policy_error_l: ``[pair]`` fp32, mean error of each sample; carry gradients.
        reference_error_w, reference_error_l: ``[pair]`` fp32, of the frozen net; must not carry gradients.
        beta: KL temperature, dimensionless, > 0; published runs use 2000-5000 with mean errors.

    Raises:
        ValueError: if ``beta`` is not positive.

    Source: arXiv:2311.12908, equation 14; the 1/2 is the released code's, so published betas carry over.
    """
    difference = (policy_error_w - reference_error_w) - (policy_error_l - reference_error_l)
    return -kappa(beta) * difference


def beta_factor(margin: Tensor, mean_margin: Tensor | float, *, strength: float) -> Tensor:
    """Factor of each pair's beta, ``max(0, 1 + a (margin - mean_margin))``: ``[pair]``, without gradient.

    Args:
        margin: margin at the constant beta.
        mean_margin: running mean of margins, scalar.
        strength: ``a``, > 0; 0.6 is published.

    Source: arXiv:2407.08639, dynamic beta of each instance. Its variant per batch is not used: it would depend on how
    an update is split into launches.
    """
    return (1 + strength * (margin.detach() - mean_margin)).clamp(min=0)


def safe_scale(gradient_w: Tensor, gradient_l: Tensor, *, kept: float = 0.0) -> Tensor:
    """Scale of each rejected sample's gradient that keeps its chosen sample's error from rising, to first order.

    ``g`` is the gradient of a sample's error, ``s`` the slope of the loss in that error. A step along
    ``-(s_w g_w - scale s_l g_l)`` changes the chosen's error by ``-s_w |g_w|^2 + scale s_l <g_w, g_l>``. At least the
    share ``kept`` of the chosen's own descent, ``s_w |g_w|^2``, remains for::

        scale = min(1, (1 - kept) s_w |g_w|^2 / (s_l <g_w, g_l>))    if <g_w, g_l> > 0, else 1

    The predictions stand for the parameters, as if both samples had the same orthogonal Jacobian.

    Args:
        gradient_w, gradient_l: ``[pair, channel, height, width]``, gradient of the loss with respect to the prediction
            of the chosen, ``s_w g_w``, and of the rejected, ``-s_l g_l``.
        kept: share of the chosen's descent that remains, 0 to 1; 0.6 to 0.9 are published.

    Returns:
        ``[pair]`` fp32, 0 to 1.

    Raises:
        ValueError: if ``kept`` is outside 0 .. 1.

    Source: arXiv:2511.03317, section 4, which has one scale per batch and equal slopes.
    """
    if not 0 <= kept <= 1:
        raise ValueError(f"`kept` must be in 0 <= kept <= 1, got {kept}")
    gradient_w, gradient_l = gradient_w.detach().float().flatten(1), gradient_l.detach().float().flatten(1)
    conflict = -(gradient_w * gradient_l).sum(dim=1)
    bound = (1 - kept) * (gradient_w**2).sum(dim=1)
    return torch.where(conflict > bound, bound / conflict, torch.ones_like(bound))


def dpo_loss(margin: Tensor) -> Tensor:
    """``-log sigmoid(margin)``: ``[pair]`` -> ``[pair]``. Source: arXiv:2305.18290, arXiv:2311.12908."""
    return -F.logsigmoid(margin)


def ipo_loss(margin: Tensor) -> Tensor:
    """``(margin - 1/2)^2``: ``[pair]`` -> ``[pair]``; the target margin is 1/2.

    With ``margin = beta h`` this is ``beta^2 (h - 1/(2 beta))^2``: the published loss times ``beta^2``, which keeps its
    gradients in the range of the other losses'. Source: arXiv:2310.12036, equation 17.
    """
    return (margin - 0.5) ** 2


def hinge_loss(margin: Tensor) -> Tensor:
    """``max(0, 1 - margin)``: ``[pair]`` -> ``[pair]``. Source: arXiv:2305.10425."""
    return F.relu(1 - margin)


def robust_dpo_loss(margin: Tensor, *, label_smoothing: float) -> Tensor:
    """DPO loss, unbiased under swapped labels: ``[pair]`` -> ``[pair]``.

    ``((1 - e) * -log sigmoid(margin) - e * -log sigmoid(-margin)) / (1 - 2 e)``.

    Args:
        label_smoothing: ``e``, fraction of swapped labels, 0 <= e < 1/2.

    Raises:
        ValueError: if ``label_smoothing`` is outside 0 .. 1/2.

    Source: arXiv:2403.00409.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"`label_smoothing` must be in 0 <= e < 0.5, got {label_smoothing}")
    correct, swapped = (1 - label_smoothing) * dpo_loss(margin), label_smoothing * dpo_loss(-margin)
    return (correct - swapped) / (1 - 2 * label_smoothing)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "robust": robust_dpo_loss,
}
"""Name in the config -> loss of a margin. ``sft``, the error of chosen alone, uses no margin: see `preference_loss`."""


@functools.cache
def loss_function(name: str) -> Callable[..., Tensor]:
    """A key of `LOSSES`, or a user's ``module:function``; margin ``[pair]`` and options -> loss ``[pair]``.

    Raises:
        TrainingError: if a user's function cannot be imported, raises, or returns another shape.
    """
    if name in LOSSES:
        return LOSSES[name]
    function = load_function("loss", name, TrainingError)

    def checked(margin: Tensor, **options: Any) -> Tensor:
        with attribute_errors("loss", name, TrainingError):
            losses = function(margin, **options)
        if not isinstance(losses, Tensor) or losses.shape != margin.shape:
            got = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise TrainingError(f"loss `{name}`: must return a tensor of one loss per pair, [{len(margin)}], got {got}")
        return losses

    return checked


def preference_loss(
    policy_error_w: Tensor,
    policy_error_l: Tensor,
    reference_error_w: Tensor,
    reference_error_l: Tensor,
    *,
    beta: float,
    loss: str = "dpo",
    sft_weight: float = 0.0,
    options: Mapping[str, Any] | None = None,
    adaptive_beta: float | None = None,
    mean_margin: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss and margin of each pair.

    Args:
        policy_error_w, policy_error_l, reference_error_w, reference_error_l, beta: as in `implicit_margin`.
        loss: name of a `loss_function`, or ``sft``: supervised fine-tuning on chosen, by the policy's error alone.
        sft_weight: weight of an added supervised term, ``kappa(beta)`` times the policy's error on chosen, in the
            margin's unit; keeps chosen likely. Source: arXiv:2404.19733 (a DPO loss with the likelihood of chosen).
        options: keyword arguments of the `loss_function`, such as ``label_smoothing``.
        adaptive_beta: ``strength`` of the `beta_factor` of each pair in the loss; ``None``: constant beta.
        mean_margin: see `beta_factor`.

    Returns:
        Loss ``[pair]`` and margin ``[pair]`` at the constant beta; reduce over pairs at the call site.

    Raises:
        ValueError: if ``beta`` is not positive, or an option is outside its range.
        TrainingError: see `loss_function`.
    """
    margin = implicit_margin(policy_error_w, policy_error_l, reference_error_w, reference_error_l, beta=beta)
    if loss == "sft":
        return policy_error_w, margin
    factor = beta_factor(margin, mean_margin, strength=adaptive_beta) if adaptive_beta else 1.0
    losses = loss_function(loss)(margin * factor, **(options or {}))
    return losses + sft_weight * kappa(beta) * policy_error_w if sft_weight else losses, margin
