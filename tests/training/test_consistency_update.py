"""One launch of consistency training: the loss with either target, from two or four forward passes."""

import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from cdpo_ray.config.training import LoraSection
from cdpo_ray.models.latent_consistency import LatentConsistency
from cdpo_ray.policy.policy import Policy, make_policy
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.update import METRICS, loss_of_pairs

BETA = 400.0
ALL_KINDS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
LN2 = torch.tensor(math.log(2)).item()
TIMESTEPS, GUIDANCE = [19, 319, 619, 939], [5.0, 7.0, 11.5, 15.0]


def start(folder: Path, teacher: Path | None, *, dtype: str = "float32") -> tuple[LatentConsistency, Policy]:
    """A model as a training worker sets it up."""
    source = {"path": str(teacher)} if teacher else None
    model = LatentConsistency.load(str(folder), dtype=dtype, device="cpu", for_training=True, teacher=source)
    policy = make_policy(model, LoraSection(rank=4, targets=ALL_KINDS))
    model.denoiser.train()
    return model, policy


def make_pairs(model: LatentConsistency) -> PairBatch:
    conditioning, _ = model.encode_prompts([f"prompt {number}" for number in range(4)])
    batch = PairBatch(
        noise_at((4, 4, 8, 8), 0, "chosen"),
        noise_at((4, 4, 8, 8), 0, "rejected"),
        conditioning,
        {"timestep": torch.tensor(TIMESTEPS), "guidance": torch.tensor(GUIDANCE)},
        noise_at((4, 4, 8, 8), 0, "noise"),
    )
    return batch.to("cpu", model.dtype)


def loss_and_metrics(policy: Policy, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
    loss, metrics = loss_of_pairs(policy, batch, preference_loss=partial(preference_loss, beta=BETA))
    return loss, dict(zip(METRICS, metrics.tolist(), strict=True))


def change(trainable: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable:
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_start_the_margin_is_zero_and_the_loss_ln_2_exactly(tiny_lcm: Path, tiny_sd15: Path, dtype: str) -> None:
    model, policy = start(tiny_lcm, tiny_sd15, dtype=dtype)
    loss, metrics = loss_and_metrics(policy, make_pairs(model))
    assert (metrics["margin"], metrics["implicit_accuracy"], loss.item(), metrics["loss"]) == (0.0, 0.0, LN2, LN2)
    assert metrics["policy_error_w"] == metrics["reference_error_w"] != metrics["policy_error_l"]
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in policy.trainable)
    assert any(parameter.grad.abs().max() > 0 for parameter in policy.trainable if parameter.grad is not None)
    assert model.teacher is not None
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_each_of_the_14_kinds_of_layers_has_a_lora(tiny_lcm: Path, tiny_sd15: Path) -> None:
    model, _ = start(tiny_lcm, tiny_sd15)
    layers = [
        name.removesuffix(".lora_A.default") for name, _ in model.denoiser.named_modules() if "lora_A.def" in name
    ]
    for kind in ALL_KINDS:
        assert any(name.endswith(f".{kind}") for name in layers), kind


@pytest.mark.parametrize("teacher_predicts", ["epsilon", "v_prediction", None])
def test_loss_and_margin_are_those_of_merged_weights_and_the_schedulers_in_float64(
    tiny_lcm: Path, tiny_sd15: Path, teacher_predicts: str | None
) -> None:
    """`None`: without a teacher, the target is the image."""
    model, policy = start(tiny_lcm, tiny_sd15 if teacher_predicts else None)
    model.teacher_prediction_type = teacher_predicts  # type: ignore[assignment]
    change(policy.trainable)
    batch = make_pairs(model)
    merged = copy.deepcopy(model.denoiser)
    merged.fuse_lora()
    merged.unload_lora()
    merged = merged.double()
    base, teacher = (
        UNet2DConditionModel.from_pretrained(folder, subfolder="unet").double() for folder in (tiny_lcm, tiny_sd15)
    )
    lcm = LCMScheduler.from_pretrained(tiny_lcm, subfolder="scheduler")
    ddim = DDIMScheduler.from_config(
        lcm.config, timestep_spacing="trailing", prediction_type=teacher_predicts or "epsilon"
    )
    ddim.set_timesteps(50)
    empty = model.encode_prompts([""])[0]["prompt_embedding"].double()

    def denoised(unet: nn.Module, latents: Tensor, timestep: int, guidance: float, embedding: Tensor) -> Tensor:
        guidance_embedding = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            None, torch.tensor([guidance]), 256
        )
        output = unet(latents, timestep, embedding, timestep_cond=guidance_embedding.double()).sample
        lcm.set_timesteps(timesteps=[timestep])
        return lcm.step(output, timestep, latents).denoised

    @torch.no_grad()
    def errors(latents: Tensor, pair: int) -> tuple[float, float]:
        """The policy's and the reference's."""
        timestep, guidance = TIMESTEPS[pair], GUIDANCE[pair]
        embedding = batch.conditioning["prompt_embedding"][[pair]].double()
        noise = batch.noise[[pair]].double()
        noisy = lcm.add_noise(latents[[pair]].double(), noise, torch.tensor([timestep]))
        conditional, unconditional = (teacher(noisy, timestep, which).sample for which in (embedding, empty))
        less_noisy = ddim.step(
            unconditional + (guidance + 1) * (conditional - unconditional), timestep, noisy, eta=0.0
        ).prev_sample
        published = denoised(base, less_noisy, max(timestep - 20, 0), guidance, embedding)
        target = published if teacher_predicts else latents[[pair]].double()
        differences = [
            (denoised(unet, noisy, timestep, guidance, embedding) - target).numpy() for unet in (merged, base)
        ]
        huber = [(np.hypot(difference, 0.001) - 0.001).mean() for difference in differences]
        policy_error, reference_error = huber if teacher_predicts else [(part**2).mean() for part in differences]
        return policy_error, reference_error

    found = {side: np.array([errors(getattr(batch, f"latents_{side}"), pair) for pair in range(4)]) for side in "wl"}
    difference = (found["w"][:, 0] - found["w"][:, 1]) - (found["l"][:, 0] - found["l"][:, 1])
    margin = -BETA / 2 * difference
    expected = {
        "policy_error_w": found["w"][:, 0].mean(),
        "policy_error_l": found["l"][:, 0].mean(),
        "reference_error_w": found["w"][:, 1].mean(),
        "reference_error_l": found["l"][:, 1].mean(),
        "margin": margin.mean(),
        "loss": np.log1p(np.exp(-margin)).mean(),
        "implicit_accuracy": (margin > 0).mean(),
        **{f"error_change_{side}": (found[side][:, 0] - found[side][:, 1]).mean() for side in "wl"},
    }
    loss, metrics = loss_and_metrics(policy, batch)
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert loss.item() == metrics["loss"]
    assert abs(margin).min() > (0.05 if teacher_predicts else 0.005)  # x0 is nearly known at timestep 19


def launches_of_a_batch(model: LatentConsistency, policy: Policy) -> list[tuple[str, int]]:
    """Name of the net and number of samples of each forward pass."""
    launches: list[tuple[str, int]] = []
    for name, net in (("teacher", model.teacher), ("denoiser", model.denoiser)):
        if net:
            net.register_forward_pre_hook(lambda _, given, name=name: launches.append((name, len(given[0]))))
    loss_and_metrics(policy, make_pairs(model))
    return launches


def test_a_batch_takes_four_forward_passes_one_of_them_the_teachers(tiny_lcm: Path, tiny_sd15: Path) -> None:
    launches = launches_of_a_batch(*start(tiny_lcm, tiny_sd15))
    assert launches == [("teacher", 16), ("denoiser", 8), ("denoiser", 8), ("denoiser", 8)]


def test_with_the_image_as_target_a_batch_takes_two_forward_passes(tiny_lcm: Path) -> None:
    assert launches_of_a_batch(*start(tiny_lcm, None)) == [("denoiser", 8), ("denoiser", 8)]


def test_after_updates_the_policy_agrees_more_on_the_chosen_and_the_target_is_still_the_bases(
    tiny_lcm: Path, tiny_sd15: Path
) -> None:
    model, policy = start(tiny_lcm, tiny_sd15)
    assert model.teacher is not None
    batch = make_pairs(model)
    _, before = loss_and_metrics(policy, batch)
    teacher = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(policy.trainable, lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        loss_and_metrics(policy, batch)[0].backward()
        optimizer.step()
    loss, after = loss_and_metrics(policy, batch)
    assert after["reference_error_w"] == before["reference_error_w"]
    assert after["reference_error_l"] == before["reference_error_l"]
    assert after["policy_error_w"] != before["policy_error_w"]
    assert loss.item() < LN2 and after["margin"] > 0
    assert all(torch.equal(value, teacher[name]) for name, value in model.teacher.state_dict().items())


def test_swapping_chosen_and_rejected_flips_the_margin(tiny_lcm: Path, tiny_sd15: Path) -> None:
    model, policy = start(tiny_lcm, tiny_sd15)
    change(policy.trainable)
    batch = make_pairs(model)
    swapped = PairBatch(batch.latents_l, batch.latents_w, batch.conditioning, batch.times, batch.noise)
    _, metrics = loss_and_metrics(policy, batch)
    _, flipped = loss_and_metrics(policy, swapped)
    assert flipped["margin"] == pytest.approx(-metrics["margin"], abs=2e-3)
    assert abs(metrics["margin"]) > 0.05
