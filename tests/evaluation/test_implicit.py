"""Implicit values, against direct calls of the base and the fine-tuned model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from finished_runs import change
from torch import Tensor, nn

from cdpo_ray.models.family import Conditioning, TextToImageModel
from cdpo_ray.models.latent_consistency import LatentConsistency
from cdpo_ray.models.lora import LORA_DIR, attach_lora, save_lora
from cdpo_ray.models.stable_diffusion import StableDiffusion
from cdpo_ray.policy.implicit_rewards import implicit_values
from cdpo_ray.randomness.noise import generator_at

PROMPTS = ["a cat", "a cat", "a dog", "a cat"]
NUM_DRAWS, SEED = 3, 5


def fresh(folder: Path) -> StableDiffusion:
    return StableDiffusion.load(str(folder), device="cpu", for_training=True)


def trained(folder: Path, output: Path, *, whole: bool = False, size: float = 0.05) -> nn.Module:
    """A net that differs from the base by ``size``, saved as training saves it."""
    model = fresh(folder)
    if whole:
        change(list(model.denoiser.parameters()), size=size / 10)
        model.denoiser.save_pretrained(output / "unet")
    else:
        change(attach_lora(model.denoiser, rank=4, alpha=8, targets=("to_q", "to_v"), seed=0), size=size)
        save_lora(model.pipeline_class, model.denoiser_name, model.denoiser, output / LORA_DIR)
    return model.denoiser


def samples(model: TextToImageModel) -> tuple[Tensor, Conditioning]:
    latents = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return latents, model.encode_prompts(PROMPTS)[0]


def values(model: TextToImageModel, rows: slice = slice(None), at_once: int = 8) -> np.ndarray:
    latents, conditioning = samples(model)
    return implicit_values(
        model,
        latents[rows],
        {name: value[rows] for name, value in conditioning.items()},
        PROMPTS[rows],
        num_draws=NUM_DRAWS,
        samples_per_launch=at_once,
        seed=SEED,
    )


@pytest.mark.parametrize("whole", [False, True])
def test_a_value_is_the_error_of_the_base_minus_that_of_the_tuned_model(
    whole: bool, tiny_sd15: Path, tmp_path: Path
) -> None:
    tuned = trained(tiny_sd15, tmp_path, whole=whole)
    model = fresh(tiny_sd15)
    model.load_tuned(tmp_path)
    base = UNet2DConditionModel.from_pretrained(tiny_sd15, subfolder="unet", dtype=torch.float32)
    scheduler = DDPMScheduler.from_pretrained(tiny_sd15, subfolder="scheduler")
    latents, conditioning = samples(model)
    expected = []
    for row, prompt in enumerate(PROMPTS):
        gains = []
        for draw in range(NUM_DRAWS):
            generator = generator_at(SEED, "implicit", prompt, draw)
            timestep = torch.randint(1000, (), generator=generator)[None]
            noise = torch.randn(4, 8, 8, generator=generator)[None]
            noisy = scheduler.add_noise(latents[row : row + 1], noise, timestep)
            text = conditioning["prompt_embedding"][row : row + 1]
            with torch.no_grad():
                errors = [((net(noisy, timestep, text).sample - noise) ** 2).mean().item() for net in (base, tuned)]
            gains.append(errors[0] - errors[1])
        expected.append(np.mean(gains))
    found = values(model)
    np.testing.assert_allclose(found, expected, atol=3e-5)  # errors near 1, in fp32
    assert np.abs(found).max() > 1e-4
    model.use_tuned(False)
    assert all(torch.equal(one, other) for one, other in zip(parameters_of(model), base.parameters(), strict=True))


def parameters_of(model: TextToImageModel) -> list[Tensor]:
    return [value for name, value in model.denoiser.named_parameters() if "lora" not in name]


def test_before_training_every_value_is_zero(tiny_sd15: Path, tmp_path: Path) -> None:
    trained(tiny_sd15, tmp_path, size=0)
    model = fresh(tiny_sd15)
    model.load_tuned(tmp_path)
    np.testing.assert_array_equal(values(model), 0)


def test_a_value_does_not_depend_on_the_other_samples(tiny_sd15: Path, tmp_path: Path) -> None:
    trained(tiny_sd15, tmp_path)
    model = fresh(tiny_sd15)
    model.load_tuned(tmp_path)
    together = values(model)
    np.testing.assert_allclose(values(model, at_once=3), together, atol=1e-5)
    np.testing.assert_allclose(values(model, slice(1, 3)), together[1:3], atol=1e-6)


def test_a_consistency_model_uses_its_teacher_and_still_decodes(
    tiny_lcm: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    model = LatentConsistency.load(
        str(tiny_lcm), device="cpu", for_training=True, keep_vae=True, teacher={"path": str(tiny_sd15)}
    )
    other = LatentConsistency.load(str(tiny_lcm), device="cpu")
    change(attach_lora(other.denoiser, rank=4, alpha=8, targets=("to_q", "to_v"), seed=0))
    save_lora(other.pipeline_class, other.denoiser_name, other.denoiser, tmp_path / LORA_DIR)
    model.load_tuned(tmp_path)
    found = values(model)
    assert np.isfinite(found).all() and len(set(found.tolist())) == len(PROMPTS)
    model.guidance_range = (1.0, 1.0)
    assert (values(model) != found).all(), "the guidance scale must be drawn from the model's range"
    assert model.decode(samples(model)[0]).shape == (len(PROMPTS), 3, 64, 64)
