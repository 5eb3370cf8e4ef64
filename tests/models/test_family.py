"""What holds for every family: the stock pipeline's images and predictions, and a LoRA that it loads."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from cdpo_ray.config import Family
from cdpo_ray.errors import ModelError
from cdpo_ray.models import FAMILIES, load_model
from cdpo_ray.models.family import DenoisingTask, TextToImageModel
from cdpo_ray.models.lora import attach_lora, save_lora
from cdpo_ray.models.seeds import noise_at

NAMES = ("stable_diffusion_xl", "stable_diffusion_3", "flux", "flux_schnell")
PROMPTS = ["a red circle in the middle", "a blue square on the left and a green cross on the right"]
HEIGHT, WIDTH = 32, 48
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

TinyFolder = Callable[[str], Path]

each_family = pytest.mark.parametrize("name", NAMES)


def load(tiny_folder: TinyFolder, name: str, **options: Any) -> TextToImageModel:
    return load_model(name.removesuffix("_schnell"), path=str(tiny_folder(name)), device="cpu", **options)


def stock(tiny_folder: TinyFolder, name: str, dtype: torch.dtype = torch.float32) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder(name), dtype=dtype)
    if name == "stable_diffusion_xl":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_call(pipeline: Any, noise: Tensor, **options: Any) -> Any:
    if "Flux" in type(pipeline).__name__:
        noise = pipeline._pack_latents(noise, *noise.shape)
    made = pipeline(PROMPTS, latents=noise, height=HEIGHT, width=WIDTH, **{"num_inference_steps": 3} | options)
    return made.images


def first_noise(model: TextToImageModel) -> Tensor:
    shape = model.latent_shape(HEIGHT, WIDTH)
    return torch.stack([noise_at(shape, 0, "image", prompt, 0) for prompt in PROMPTS])


def sample(model: TextToImageModel, guidance_scale: float) -> Tensor:
    conditioning, _ = model.encode_prompts(PROMPTS)
    return model.sample(conditioning, first_noise(model), num_denoising_steps=3, guidance_scale=guidance_scale)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@each_family
def test_images_are_the_stock_pipelines(tiny_folder: TinyFolder, name: str, guidance_scale: float) -> None:
    model = load(tiny_folder, name)
    ours = model.decode(sample(model, guidance_scale)).permute(0, 2, 3, 1).numpy()
    theirs = stock_call(stock(tiny_folder, name), first_noise(model), guidance_scale=guidance_scale)
    assert ours.shape == (2, HEIGHT, WIDTH, 3)
    assert np.array_equal(ours, np.stack([np.asarray(image) for image in theirs]))
    assert not np.array_equal(ours[0], ours[1])


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_guidance_changes_the_latents(tiny_folder: TinyFolder, name: str) -> None:
    model = load(tiny_folder, name)
    assert not torch.allclose(sample(model, 5.0), sample(model, 1.0), atol=1e-4)


@each_family
def test_predictions_are_those_of_the_net_in_the_stock_pipeline(tiny_folder: TinyFolder, name: str) -> None:
    """At both denoising steps: what the pipeline gave its net, and what came out, against ours from the same."""
    model, pipeline = load(tiny_folder, name, for_training=True), stock(tiny_folder, name)
    calls: list[tuple[dict[str, Any], Tensor]] = []

    def keep(net: nn.Module, positional: tuple, named: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        given = dict(zip(("hidden_states", "timestep"), positional, strict=False)) | named
        calls.append((given, output[0]))

    getattr(pipeline, model.denoiser_name).register_forward_hook(keep, with_kwargs=True)
    stock_call(pipeline, first_noise(model), guidance_scale=1.0, num_inference_steps=2)
    conditioning, _ = model.encode_prompts(PROMPTS)
    height, width = model.latent_shape(HEIGHT, WIDTH)[1:]
    assert len(calls) == 2
    for number, (given, output) in enumerate(calls):
        times = {"timestep": pipeline.scheduler.timesteps[number].expand(2)}
        if given.get("guidance") is not None:
            times["guidance"] = given["guidance"]
        noisy_latents = model.unpack(given["hidden_states"], height, width)
        task = DenoisingTask(noisy_latents, times, conditioning, torch.zeros_like(noisy_latents))
        with torch.no_grad():
            prediction = model.predict(model.denoiser, task)
        torch.testing.assert_close(prediction, model.unpack(output, height, width), rtol=1e-4, atol=1e-5)
        assert prediction.abs().max() > 0.01


@each_family
def test_a_changed_lora_makes_the_same_latents_in_the_stock_pipeline_and_can_be_switched_off(
    tiny_folder: TinyFolder, name: str, tmp_path: Path
) -> None:
    model = load(tiny_folder, name)
    untrained = sample(model, 3.0)
    trainable = attach_lora(model.denoiser, rank=4, alpha=8, targets=ATTENTION, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable:
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    trained = sample(model, 3.0)
    save_lora(model.pipeline_class, model.denoiser_name, model.denoiser, tmp_path / "lora")
    pipeline = stock(tiny_folder, name)
    pipeline.load_lora_weights(tmp_path / "lora")
    theirs = stock_call(pipeline, first_noise(model), guidance_scale=3.0, output_type="latent")
    torch.testing.assert_close(model.unpack(theirs, *trained.shape[-2:]), trained, rtol=1e-4, atol=1e-4)
    assert (trained - untrained).abs().max() > 0.01
    fresh = load(tiny_folder, name)
    fresh.load_tuned(tmp_path)
    torch.testing.assert_close(sample(fresh, 3.0), trained, rtol=1e-4, atol=1e-4)
    fresh.use_tuned(False)
    torch.testing.assert_close(sample(fresh, 3.0), untrained, rtol=1e-5, atol=1e-5)


@each_family
def test_prompts_are_encoded_each_for_itself(tiny_folder: TinyFolder, name: str) -> None:
    model = load(tiny_folder, name)
    together, _ = model.encode_prompts(PROMPTS)
    assert set(together) == {"prompt_embedding", "pooled_embedding"}
    for row, prompt in enumerate(PROMPTS):
        alone, _ = model.encode_prompts([prompt])
        for key, value in together.items():
            torch.testing.assert_close(value[row], alone[key][0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(alone["pooled_embedding"][0], together["pooled_embedding"][1 - row])


@each_family
def test_training_goes_without_the_decoder_and_once_prompts_are_encoded_without_text_encoders(
    tiny_folder: TinyFolder, name: str
) -> None:
    model = load(tiny_folder, name, for_training=True)
    model.drop_text_encoders()
    left = {part for part, value in model.pipeline.components.items() if isinstance(value, nn.Module)}
    assert left == {model.denoiser_name}


@each_family
def test_the_embedded_world_has_no_model_of_these_families(name: str) -> None:
    with pytest.raises(ModelError, match=r"the embedded world has no model for .*; use the family `stable_diffusion`"):
        load_model(name.removesuffix("_schnell"), path="embedded", device="cpu")


def test_families_are_those_that_a_config_can_name_and_each_can_be_imported() -> None:
    assert set(FAMILIES) <= set(get_args(Family))
    for place in FAMILIES.values():
        module, _, name = place.partition(":")
        assert issubclass(getattr(importlib.import_module(module), name), TextToImageModel)
