"""Specific to Qwen-Image: the template around prompts, padding, the video VAE."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline

from cdpo_ray.models.family import DenoisingTask
from cdpo_ray.models.flow_matching import pack, real_tokens, unpack
from cdpo_ray.models.qwen_image import QwenImage
from cdpo_ray.randomness.noise import noise_at

TinyModels = Callable[[str], Path]
NUM_SUFFIX_TOKENS = 5
"""Of the template, after the prompt."""


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> QwenImage:
    return QwenImage.load(str(tiny_models("qwen_image")), device="cpu")


def test_packed_latents_equal_the_stock_pipelines_and_unpacking_inverts_packing() -> None:
    latents = noise_at((2, 16, 6, 4), 0, "latents")
    tokens = pack(latents)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(latents, 2, 16, 6, 4))
    unpacked = QwenImagePipeline._unpack_latents(tokens, 48, 32, vae_scale_factor=8)
    assert torch.equal(unpack(tokens, 6, 4), unpacked[:, :, 0])


def test_errors_equal_those_of_the_velocity_in_float64(model: QwenImage) -> None:
    time = torch.tensor([0.003, 0.4, 0.97])
    latents, noise = noise_at((3, 16, 8, 6), 0, "latents"), noise_at((3, 16, 8, 6), 0, "noise")
    conditioning, _ = model.encode_prompts(["x", "a longer prompt", "z"])
    transformer = copy.deepcopy(model.denoiser).double()
    share = time.double()[:, None, None, None]
    noisy = (1 - share) * latents.double() + share * noise.double()
    embedding = conditioning["prompt_embedding"].double()
    with torch.no_grad():
        task = model.denoising_task(model.denoiser, latents, conditioning, {"timestep": 1000 * time}, noise)
        found = model.errors(model.denoiser, task)
        output = transformer(
            hidden_states=QwenImagePipeline._pack_latents(noisy, *noisy.shape),
            timestep=time.double(),
            encoder_hidden_states=embedding,
            encoder_hidden_states_mask=embedding.abs().sum(dim=2) > 0,
            img_shapes=[[(1, 4, 3)]] * 3,
        ).sample
    velocity = QwenImagePipeline._pack_latents(noise.double() - latents.double(), *noisy.shape)
    torch.testing.assert_close(found, ((output - velocity) ** 2).mean(dim=(1, 2)).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("length", "cut"), [(100, 0), (507, 0), (508, 1), (1200, 693)])
def test_tokens_beyond_512_are_counted_and_padding_is_zero(model: QwenImage, length: int, cut: int) -> None:
    conditioning, num_cut = model.encode_prompts(["x" * length, "y"])  # one token per letter
    assert num_cut == [cut, 0]
    embedding = conditioning["prompt_embedding"]
    assert embedding.shape == (2, 512, 32)
    assert real_tokens(embedding).sum(dim=1).tolist() == [min(length + NUM_SUFFIX_TOKENS, 512), 1 + NUM_SUFFIX_TOKENS]
    with torch.no_grad():
        stock, mask = model.pipeline.encode_prompt(["x" * length, "y"], device="cpu", max_sequence_length=512)
    assert torch.equal(embedding[:, : stock.shape[1]], stock)
    assert torch.equal(real_tokens(stock), mask.bool())


def test_padding_does_not_change_the_prediction(model: QwenImage) -> None:
    conditioning, _ = model.encode_prompts(["a cat"])
    latents = noise_at((1, 16, 4, 4), 0, "latents")
    num_tokens = int(real_tokens(conditioning["prompt_embedding"]).sum())
    predictions = []
    for width in (num_tokens, 512):
        cut = {"prompt_embedding": conditioning["prompt_embedding"][:, :width]}
        with torch.no_grad():
            task = DenoisingTask(latents, {"timestep": torch.tensor([500.0])}, cut, latents)
            predictions.append(model.predict(model.denoiser, task))
    torch.testing.assert_close(*predictions, rtol=1e-5, atol=1e-6)


def test_the_empty_prompt_is_one_space_as_in_the_authors_code(model: QwenImage) -> None:
    with torch.no_grad():
        stock, _ = model.pipeline.encode_prompt(" ", device="cpu")
    assert torch.equal(model.empty_conditioning["prompt_embedding"][:, : stock.shape[1]], stock)


def test_guidance_is_the_pipelines_true_cfg_scale(model: QwenImage) -> None:
    conditioning, _ = model.encode_prompts(["a cat"])
    for scale in (1.0, 4.0):
        arguments = model.pipeline_arguments(conditioning, scale)
        assert (arguments["true_cfg_scale"], arguments["guidance_scale"]) == (scale, None)
        assert ("negative_prompt_embeds_mask" in arguments) == (scale > 1)


def test_latents_are_normalized_per_channel_and_decoding_inverts_encoding(model: QwenImage) -> None:
    vae = model.pipeline.vae
    images = torch.randint(0, 256, (2, 3, 64, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean, std = model.encode(images)
    assert mean.shape == std.shape == (2, 16, 8, 4)
    with torch.no_grad():
        posterior = vae.encode((images.float() / 127.5 - 1)[:, :, None]).latent_dist
        plain = vae.decode(posterior.mean).sample[:, :, 0]
    for channel, (center, spread) in enumerate(zip(vae.config.latents_mean, vae.config.latents_std, strict=True)):
        expected = (posterior.mean[:, channel, 0] - center) / spread
        torch.testing.assert_close(mean[:, channel], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(std[:, channel], posterior.std[:, channel, 0] / spread, rtol=1e-5, atol=1e-6)
    expected = ((plain / 2 + 0.5).clamp(0, 1) * 255).round()
    torch.testing.assert_close(model.decode(mean).float(), expected, rtol=0, atol=1)


def test_latents_that_are_not_finite_decode_to_black(model: QwenImage) -> None:
    latents = noise_at((2, 16, 4, 4), 0, "latents")
    latents[1, 0, 0, 0] = torch.nan
    images = model.decode(latents)
    assert images[0].any() and not images[1].any()


def test_the_default_image_size_is_the_pipelines(model: QwenImage) -> None:
    assert model.latent_shape(None, None) == (16, 128, 128)
    assert model.latent_shape(32, 64) == (16, 4, 8)
