"""Specific to Z-Image: reversed time and negated output, prompts of different lengths, guidance counted from 0."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from torch import nn
from torch._dynamo.utils import counters

from cdpo_ray.generation.perturbation import perturbed
from cdpo_ray.models.z_image import ZImage, unpadded
from cdpo_ray.randomness.noise import noise_at

TinyModels = Callable[[str], Path]
SHORT, LONG = "x", "a red square on the left, and a green cross on the right"


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels) -> Path:
    return tiny_models("z_image")


@pytest.fixture(scope="module")
def model(folder: Path) -> ZImage:
    return ZImage.load(str(folder), device="cpu")


def test_decoded_latents_are_the_images_of_the_stock_pipeline_exactly_also_in_16_bits(folder: Path) -> None:
    model = ZImage.load(str(folder), device="cpu", dtype="bfloat16")
    conditioning, _ = model.encode_prompts([SHORT, LONG])
    noise = noise_at((2, *model.latent_shape(64, 48)), 0, "noise")
    latents = model.sample(conditioning, noise, num_denoising_steps=2, guidance_scale=5.0)
    assert latents.dtype == model.dtype
    stock = ZImagePipeline.from_pretrained(folder, dtype=torch.bfloat16)
    call: dict[str, Any] = {"height": 64, "width": 48, "num_inference_steps": 2, "guidance_scale": 4.0}
    theirs = stock(prompt=[SHORT, LONG], latents=noise, output_type="latent", **call).images.to(torch.bfloat16)
    assert torch.equal(latents, theirs)
    with torch.no_grad():
        pixels = stock.vae.decode(theirs / stock.vae.config.scaling_factor + stock.vae.config.shift_factor).sample
    assert torch.equal(model.decode(latents), ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))


def test_the_embedding_of_a_prompt_is_the_pipelines_followed_by_zeros(model: ZImage) -> None:
    conditioning, _ = model.encode_prompts([SHORT, LONG])
    with torch.no_grad():
        stock, _ = model.pipeline.encode_prompt([SHORT, LONG], do_classifier_free_guidance=False)
    assert len(stock[0]) < len(stock[1]) < 512
    for row, expected in enumerate(stock):
        assert torch.equal(conditioning["prompt_embedding"][row, : len(expected)], expected)
        assert not conditioning["prompt_embedding"][row, len(expected) :].any()
        assert torch.equal(unpadded(conditioning)[row], expected)


def test_the_tokens_of_a_perturbed_prompt_keep_their_positions(model: ZImage) -> None:
    conditioning, _ = model.encode_prompts([LONG])
    masks = torch.zeros(1, 512, dtype=torch.bool)
    length = len(unpadded(conditioning)[0])
    masks[:, length - 3] = True  # beyond the empty prompt's last token, so that zeros replace it
    (found,) = unpadded(perturbed(conditioning, model.empty_conditioning, [1 / 512], masks))
    expected = conditioning["prompt_embedding"][0, :length].clone()
    expected[length - 3] = 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_latents_do_not_depend_on_the_length_of_other_prompts(model: ZImage, guidance_scale: float) -> None:
    """With 32 and 96 rows, the transformer masks the padding of the first; alone there is no mask."""
    noise = noise_at((2, *model.latent_shape(64, 48)), 0, "noise")
    options: dict[str, Any] = {"num_denoising_steps": 3, "guidance_scale": guidance_scale}
    together = model.sample(model.encode_prompts([SHORT, LONG])[0], noise, **options)
    for row, prompt in enumerate((SHORT, LONG)):
        alone = model.sample(model.encode_prompts([prompt])[0], noise[row : row + 1], **options)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_encoded_images_have_the_scale_of_the_pipelines_image_to_image(model: ZImage) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8)
    mean, _ = model.encode(images)
    vae = model.pipeline.vae
    with torch.no_grad():
        posterior = vae.encode(images.float() / 127.5 - 1).latent_dist
    # diffusers.pipelines.z_image.pipeline_z_image_img2img, in `prepare_latents`
    torch.testing.assert_close(mean, (posterior.mode() - vae.config.shift_factor) * vae.config.scaling_factor)


def test_errors_equal_those_of_the_velocity_in_float64(folder: Path) -> None:
    model = ZImage.load(str(folder), device="cpu", for_training=True)
    time = torch.tensor([0.003, 0.4, 0.97])
    latents, noise = noise_at((3, 16, 8, 6), 0, "latents"), noise_at((3, 16, 8, 6), 0, "noise")
    conditioning, _ = model.encode_prompts([SHORT, LONG, "z"])
    transformer = copy.deepcopy(model.denoiser).double()
    with torch.no_grad():
        task = model.denoising_task(model.denoiser, latents, conditioning, {"timestep": 1000 * time}, noise)
        found = model.errors(model.denoiser, task)
        for row, embedding in enumerate(unpadded(conditioning)):
            share, clean, added = time[row].double(), latents[row].double(), noise[row].double()
            noisy = (1 - share) * clean + share * added
            ((output,),) = transformer([noisy[:, None]], 1 - share[None], [embedding.double()], return_dict=False)
            expected = ((-output[:, 0] - (added - clean)) ** 2).mean().float()
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=0)


def test_the_default_image_size_is_the_pipelines(model: ZImage) -> None:
    assert model.latent_shape(None, None) == (16, 128, 128)
    assert model.latent_shape(32, 64) == (16, 4, 8)


@pytest.mark.parametrize(("length", "cut"), [(100, 0), (493, 0), (494, 1), (600, 107)])
def test_tokens_of_the_chat_beyond_the_limit_of_512_are_counted(model: ZImage, length: int, cut: int) -> None:
    conditioning, num_cut = model.encode_prompts(["a" * length, "b"])  # one token per letter, 19 of the template
    assert num_cut == [cut, 0]
    assert len(unpadded(conditioning)[0]) == min(512, length + 19)


def test_the_time_embedding_of_a_quantised_16_bit_model_is_16_bits(folder: Path) -> None:
    """The transformer asks its first linear layer for the dtype of its input."""
    model = ZImage.load(str(folder), device="cpu", dtype="bfloat16", quantization="int8")
    with torch.no_grad():
        assert model.denoiser.t_embedder(torch.tensor([3.0])).dtype == torch.bfloat16


def test_compiled_blocks_give_the_same_latents_and_are_not_compiled_again_for_other_lengths(
    folder: Path, model: ZImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, **options | {"backend": "eager"})
    )
    torch._dynamo.reset()
    counters.clear()
    compiled = ZImage.load(str(folder), device="cpu", compile=True)
    noise = noise_at((2, *model.latent_shape(64, 48)), 0, "noise")
    options: dict[str, Any] = {"num_denoising_steps": 2, "guidance_scale": 4.0}
    for number, prompts in enumerate(([SHORT, LONG], [LONG, 3 * LONG], ["a" * 100, SHORT])):
        conditioning, _ = model.encode_prompts(list(prompts))
        expected = model.sample(conditioning, noise, **options)
        torch.testing.assert_close(compiled.sample(conditioning, noise, **options), expected, rtol=1e-4, atol=1e-4)
        if number == 0:
            num_graphs = counters["stats"]["unique_graphs"]
    assert 0 < num_graphs == counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
