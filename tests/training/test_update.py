"""One launch: the policy learns, the reference is the base model, and nothing else enters the loss."""

import copy
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_policies import TinyModels, load, make_pairs, pairs_at, start
from torch import Tensor, nn

from cdpo_ray.models.family import rows_of
from cdpo_ray.models.stable_diffusion import StableDiffusion
from cdpo_ray.policy.policy import Policy
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.update import METRICS, loss_of_pairs

BETA = 400.0
LN2 = torch.tensor(math.log(2)).item()


each_family = pytest.mark.parametrize(
    "family",
    [
        *("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "flux_schnell"),
        *("flux2", "z_image", "qwen_image", "sana"),
    ],
)


def loss_and_metrics(policy: Policy, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
    loss, metrics = loss_of_pairs(policy, batch, preference_loss=partial(preference_loss, beta=BETA))
    return loss, dict(zip(METRICS, metrics.tolist(), strict=True))


def change(trainable: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_family
def test_at_the_start_the_margin_is_zero_and_the_loss_ln_2_exactly(
    tiny_models: TinyModels, family: str, dtype: str
) -> None:
    model, policy = start(tiny_models(family), family, dtype=dtype)
    loss, metrics = loss_and_metrics(policy, make_pairs(model))
    assert (metrics["margin"], metrics["implicit_accuracy"], loss.item(), metrics["loss"]) == (0.0, 0.0, LN2, LN2)
    assert metrics["policy_error_w"] == metrics["reference_error_w"] != metrics["policy_error_l"]
    loss.backward()
    named = {name: parameter.grad for name, parameter in model.denoiser.named_parameters() if parameter.requires_grad}
    unused = {name for name, gradient in named.items() if gradient is None}
    assert all("transformer_blocks.1.attn.to_add_out" in name for name in unused), "text that the last block outputs"
    assert bool(unused) == (family == "qwen_image") and len(named) == len(policy.trainable)
    gradients = [gradient for gradient in named.values() if gradient is not None]
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    learning = {id(parameter) for parameter in policy.trainable}
    assert all(parameter.grad is None for parameter in model.denoiser.parameters() if id(parameter) not in learning)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_family
def test_after_an_update_the_policy_differs_and_the_reference_is_still_the_base(
    tiny_models: TinyModels, family: str, dtype: str
) -> None:
    base = load(tiny_models(family), family, dtype=dtype, for_training=True)
    model, policy = start(tiny_models(family), family, dtype=dtype)
    batch = make_pairs(model)
    with torch.no_grad():
        task = base.denoising_task(
            base.denoiser,
            torch.cat([batch.latents_w, batch.latents_l]),
            rows_of(batch.conditioning, [*range(4)] * 2),
            rows_of(batch.times, [*range(4)] * 2),
            torch.cat([batch.noise, batch.noise]),
        )
        base_w, base_l = (error.mean().item() for error in base.errors(base.denoiser, task).chunk(2))
    frozen = {name: value.clone() for name, value in model.denoiser.named_parameters() if not value.requires_grad}
    optimizer = torch.optim.AdamW(policy.trainable, lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss, _ = loss_and_metrics(policy, batch)
        loss.backward()
        optimizer.step()
    after, metrics = loss_and_metrics(policy, batch)
    assert (metrics["reference_error_w"], metrics["reference_error_l"]) == (base_w, base_l)
    assert metrics["policy_error_w"] != base_w
    assert after.item() < LN2 and metrics["margin"] > 0
    assert all(torch.equal(value, frozen[name]) for name, value in model.denoiser.named_parameters() if name in frozen)


def test_loss_and_margin_are_those_of_merged_weights_and_the_scheduler_in_float64(tiny_sd15: Path) -> None:
    model, policy = start(tiny_sd15)
    change(policy.trainable)
    batch = make_pairs(model)
    merged = copy.deepcopy(model.denoiser)
    merged.fuse_lora()
    merged.unload_lora()
    base = StableDiffusion.load(str(tiny_sd15), device="cpu", for_training=True).denoiser.double()
    merged = merged.double()
    scheduler = DDPMScheduler.from_pretrained(tiny_sd15, subfolder="scheduler")

    @torch.no_grad()
    def error(unet: nn.Module, latents: Tensor) -> Tensor:
        noisy = scheduler.add_noise(latents.double(), batch.noise.double(), batch.times["timestep"])
        output = unet(noisy, batch.times["timestep"], batch.conditioning["prompt_embedding"].double()).sample
        return ((output - batch.noise.double()) ** 2).mean(dim=(1, 2, 3))

    errors = {
        "policy_error_w": error(merged, batch.latents_w),
        "policy_error_l": error(merged, batch.latents_l),
        "reference_error_w": error(base, batch.latents_w),
        "reference_error_l": error(base, batch.latents_l),
    }
    difference = (errors["policy_error_w"] - errors["reference_error_w"]) - (
        errors["policy_error_l"] - errors["reference_error_l"]
    )
    margin = -BETA / 2 * difference
    expected = {name: values.mean().item() for name, values in errors.items()} | {
        "margin": margin.mean().item(),
        "loss": torch.log1p(torch.exp(-margin)).mean().item(),
        "implicit_accuracy": (margin > 0).double().mean().item(),
        **{
            f"error_change_{arm}": (errors[f"policy_error_{arm}"] - errors[f"reference_error_{arm}"]).mean().item()
            for arm in "wl"
        },
    }
    loss, metrics = loss_and_metrics(policy, batch)
    assert metrics == pytest.approx(expected, rel=1e-4, abs=2e-3)
    assert loss.item() == metrics["loss"]
    assert margin.abs().max() > 0.1


def test_swapping_chosen_and_rejected_flips_the_margin(tiny_sd15: Path) -> None:
    model, policy = start(tiny_sd15)
    change(policy.trainable)
    batch = make_pairs(model)
    swapped = PairBatch(batch.latents_l, batch.latents_w, batch.conditioning, batch.times, batch.noise)
    _, metrics = loss_and_metrics(policy, batch)
    _, flipped = loss_and_metrics(policy, swapped)
    assert flipped["margin"] == pytest.approx(-metrics["margin"], abs=1e-3)
    assert abs(metrics["margin"]) > 0.05
    assert flipped["implicit_accuracy"] == 1 - metrics["implicit_accuracy"]
    assert flipped["policy_error_w"] == pytest.approx(metrics["policy_error_l"], rel=1e-5)


def test_gradients_accumulated_over_two_halves_are_those_of_the_whole(tiny_sd15: Path) -> None:
    model, policy = start(tiny_sd15)
    change(policy.trainable)
    batch = make_pairs(model)
    loss_and_metrics(policy, batch)[0].backward()
    whole = [parameter.grad.clone() for parameter in policy.trainable if parameter.grad is not None]
    model.denoiser.zero_grad()
    for part in (pairs_at(batch, slice(0, 2)), pairs_at(batch, slice(2, 4))):
        (loss_and_metrics(policy, part)[0] / 2).backward()
    assert len(whole) == len(policy.trainable)
    largest = max(gradient.abs().max().item() for gradient in whole)
    for parameter, gradient in zip(policy.trainable, whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5 * largest)


@each_family
def test_gradient_checkpointing_changes_no_gradient(tiny_models: TinyModels, family: str) -> None:
    found = []
    for checkpointing in (False, True):
        model, policy = start(tiny_models(family), family)
        change(policy.trainable)
        if checkpointing:
            model.denoiser.enable_gradient_checkpointing()
        loss, _ = loss_and_metrics(policy, make_pairs(model, 2))
        loss.backward()
        found.append((loss.item(), [parameter.grad for parameter in policy.trainable]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for plain, recomputed in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.nightly  # compiles for a minute; with a backend that compiles nothing: test_compiled_training.py
@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_a_compiled_net_gives_the_eager_losses_and_its_reference_is_the_base(
    tiny_models: TinyModels, family: str
) -> None:
    found = []
    for compiled in (False, True):
        model, policy = start(tiny_models(family), family, compiled=compiled)
        batch = make_pairs(model)
        _, at_first = loss_and_metrics(policy, batch)
        change(policy.trainable)
        _, after = loss_and_metrics(policy, batch)
        assert after["reference_error_w"] == at_first["reference_error_w"] != after["policy_error_w"]
        assert at_first["margin"] == pytest.approx(0, abs=BETA * 1e-6)
        found.append(after)
    eager, compiled_metrics = found
    for name in METRICS:
        assert compiled_metrics[name] == pytest.approx(
            eager[name], abs=1e-5 * (BETA if name in ("margin", "loss") else 1)
        ), name
