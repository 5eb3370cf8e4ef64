"""Every family against its stock pipeline: same images and predictions, and a LoRA that it loads."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FluxPipeline
from torch import Tensor, nn

from cdpo_ray.config import Family
from cdpo_ray.errors import ModelError
from cdpo_ray.models import FAMILIES, load_model
from cdpo_ray.models.family import DenoisingTask, TextToImageModel
from cdpo_ray.models.lora import attach_lora, save_lora
from cdpo_ray.randomness.noise import generator_at, noise_at

NAMES = ("stable_diffusion_xl", "stable_diffusion_3", "flux", "flux_schnell", "qwen_image", "sana")
UNPOOLED = ("qwen_image", "sana")
"""Families without a pooled embedding."""
PROMPTS = ["a red circle in the middle", "a blue square on the left and a green cross on the right"]
HEIGHT, WIDTH = 64, 32
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

TinyModels = Callable[[str], Path]

each_family = pytest.mark.parametrize("name", NAMES)


def load(tiny_models: TinyModels, name: str, **options: Any) -> TextToImageModel:
    if name == "latent_consistency":
        options["teacher"] = {"path": str(tiny_models("stable_diffusion"))}
    return load_model(name.removesuffix("_schnell"), path=str(tiny_models(name)), device="cpu", **options)


def stock(tiny_models: TinyModels, name: str, dtype: torch.dtype = torch.float32) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(tiny_models(name), dtype=dtype)
    if name == "stable_diffusion_xl":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_call(pipeline: Any, noise: Tensor, **options: Any) -> Any:
    kind = type(pipeline).__name__
    if kind in ("FluxPipeline", "QwenImagePipeline"):
        noise = pipeline._pack_latents(noise, *noise.shape)
    if kind == "QwenImagePipeline":
        scale = options.pop("guidance_scale")
        options |= {"true_cfg_scale": scale, "negative_prompt": [" "] * len(PROMPTS) if scale > 1 else None}
    if kind == "SanaPipeline":
        options["use_resolution_binning"] = False
    if kind == "FluxPipeline" and not pipeline.transformer.config.guidance_embeds:
        options["max_sequence_length"] = 256  # FLUX.1-schnell's; the pipeline's default is FLUX.1-dev's
    made = pipeline(PROMPTS, latents=noise, height=HEIGHT, width=WIDTH, **{"num_inference_steps": 3} | options)
    return made.images


def image(latents: Tensor, height: int, width: int) -> Tensor:
    """Latents ``[sample, channel, height, width]``, unpacked if the pipeline packs them."""
    return latents if latents.ndim == 4 else FluxPipeline._unpack_latents(latents, 8 * height, 8 * width, 8)


def first_noise(model: TextToImageModel) -> Tensor:
    shape = model.latent_shape(HEIGHT, WIDTH)
    return torch.stack([noise_at(shape, 0, "image", prompt, 0) for prompt in PROMPTS])


def sample(model: TextToImageModel, guidance_scale: float, num_denoising_steps: int = 3) -> Tensor:
    conditioning, _ = model.encode_prompts(PROMPTS)
    noise = first_noise(model)
    return model.sample(conditioning, noise, num_denoising_steps=num_denoising_steps, guidance_scale=guidance_scale)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@each_family
def test_images_equal_the_stock_pipelines(tiny_models: TinyModels, name: str, guidance_scale: float) -> None:
    model = load(tiny_models, name)
    ours = model.decode(sample(model, guidance_scale)).permute(0, 2, 3, 1).numpy()
    theirs = stock_call(stock(tiny_models, name), first_noise(model), guidance_scale=guidance_scale)
    assert ours.shape == (2, HEIGHT, WIDTH, 3)
    assert abs(ours.astype(int) - np.stack([np.asarray(image) for image in theirs]).astype(int)).max() <= 1
    assert abs(ours[0].astype(int) - ours[1].astype(int)).max() > 10


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "stable_diffusion_3", "flux", "qwen_image", "sana"])
def test_guidance_changes_the_latents(tiny_models: TinyModels, name: str) -> None:
    model = load(tiny_models, name)
    assert not torch.allclose(sample(model, 5.0), sample(model, 1.0), atol=1e-4)


@each_family
def test_predictions_equal_those_of_the_denoiser_in_the_stock_pipeline(tiny_models: TinyModels, name: str) -> None:
    """At both denoising steps: the denoiser's output in the pipeline against ours from the same inputs."""
    model, pipeline = load(tiny_models, name, for_training=True), stock(tiny_models, name)
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
        noisy_latents = image(given["hidden_states"], height, width)
        task = DenoisingTask(noisy_latents, times, conditioning, torch.zeros_like(noisy_latents))
        with torch.no_grad():
            prediction = model.predict(model.denoiser, task)
        torch.testing.assert_close(prediction, image(output, height, width), rtol=1e-4, atol=1e-5)
        assert prediction.abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "num_steps"),
    [*((name, 3) for name in NAMES), ("latent_consistency", 1)],  # its sampler adds noise with more steps
)
def test_a_changed_lora_makes_the_same_latents_in_the_stock_pipeline_and_can_be_switched_off(
    tiny_models: TinyModels, name: str, num_steps: int, tmp_path: Path
) -> None:
    model = load(tiny_models, name)
    untrained = sample(model, 3.0, num_steps)
    trainable = attach_lora(model.denoiser, rank=4, alpha=8, targets=ATTENTION, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable:
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    trained = sample(model, 3.0, num_steps)
    save_lora(model.pipeline_class, model.denoiser_name, model.denoiser, tmp_path / "lora")
    pipeline = stock(tiny_models, name)
    pipeline.load_lora_weights(tmp_path / "lora")
    options = {"guidance_scale": 3.0, "num_inference_steps": num_steps, "output_type": "latent"}
    theirs = stock_call(pipeline, first_noise(model), **options)
    torch.testing.assert_close(image(theirs, *trained.shape[-2:]), trained, rtol=1e-4, atol=1e-4)
    assert (trained - untrained).abs().max() > 0.01
    fresh = load(tiny_models, name)
    fresh.load_tuned(tmp_path)
    torch.testing.assert_close(sample(fresh, 3.0, num_steps), trained, rtol=1e-4, atol=1e-4)
    fresh.use_tuned(False)
    torch.testing.assert_close(sample(fresh, 3.0, num_steps), untrained, rtol=1e-5, atol=1e-5)


@each_family
def test_encoding_a_prompt_does_not_depend_on_the_others(tiny_models: TinyModels, name: str) -> None:
    model = load(tiny_models, name)
    together, _ = model.encode_prompts(PROMPTS)
    assert ("pooled_embedding" in together) != (name in UNPOOLED)
    assert set(together) <= {"prompt_embedding", "pooled_embedding"}
    for row, prompt in enumerate(PROMPTS):
        single, _ = model.encode_prompts([prompt])
        for key, value in together.items():
            torch.testing.assert_close(value[row], single[key][0], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(value[row], value[1 - row])


@each_family
def test_training_needs_no_decoder_and_no_text_encoders_once_prompts_are_encoded(
    tiny_models: TinyModels, name: str
) -> None:
    model = load(tiny_models, name, for_training=True)
    model.drop_text_encoders()
    left = {part for part, value in model.pipeline.components.items() if isinstance(value, nn.Module)}
    assert left == {model.denoiser_name}


@each_family
def test_the_embedded_world_has_no_model_of_these_families(name: str) -> None:
    with pytest.raises(ModelError, match=r"the embedded world has no model for .*; use the family `stable_diffusion`"):
        load_model(name.removesuffix("_schnell"), path="embedded", device="cpu")


@pytest.mark.parametrize("family", ["stable_diffusion_3", "flux", "qwen_image", "sana"])
def test_flow_timesteps_are_logit_normal(tiny_models: TinyModels, family: str) -> None:
    model = load(tiny_models, family, for_training=True)
    drawn = [model.draw_times(generator_at(0, "draw", number)) for number in range(2000)]
    logits = torch.logit(torch.stack([times["timestep"] for times in drawn]).double() / 1000)
    expected = 0.5 * (1 + torch.erf(logits.sort().values / math.sqrt(2)))
    distance = (expected - torch.arange(1, 2001) / 2000).abs().max()
    assert distance * math.sqrt(2000) < 1.95  # Kolmogorov-Smirnov test, 99.9 %
    assert ("guidance" in drawn[0]) == (family == "flux")


@pytest.mark.parametrize("family", ["stable_diffusion_3", "flux", "qwen_image", "sana"])
def test_the_stock_sampler_takes_the_noise_back_to_the_latents_along_the_target(
    tiny_models: TinyModels, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A denoiser that returns the training target; the pipeline's noisy latents must be those of training."""
    model = load(tiny_models, family)
    conditioning, _ = model.encode_prompts(PROMPTS)
    noise, shape = first_noise(model), model.latent_shape(HEIGHT, WIDTH)
    latents = noise_at((2, *shape), 0, "clean")
    given: list[Tensor] = []

    def velocity(*positional: Tensor, **named: Any) -> tuple[Tensor]:
        given.append(positional[0] if positional else named["hidden_states"])
        times = {"timestep": torch.full((2,), 500.0)}
        target = model.denoising_task(model.denoiser, latents, conditioning, times, noise).target
        return (target if given[-1].ndim == 4 else FluxPipeline._pack_latents(target, *target.shape),)

    monkeypatch.setattr(model.denoiser, "forward", velocity)
    sampled = model.sample(conditioning, noise, num_denoising_steps=4, guidance_scale=1.0)
    tolerance = 5e-3 if family == "sana" else 1e-5  # DPM-Solver starts at timestep 999, and rounds to whole ones
    torch.testing.assert_close(sampled, latents, rtol=0, atol=tolerance)
    assert len(given) == 4
    for noisy, timestep in zip(given, model.pipeline.scheduler.timesteps, strict=True):
        times = {"timestep": timestep.float().expand(2)}
        task = model.denoising_task(model.denoiser, latents, conditioning, times, noise)
        torch.testing.assert_close(image(noisy, *shape[1:]), task.noisy_latents, rtol=0, atol=tolerance)


def test_v_and_epsilon_predictions_of_one_model_have_errors_of_a_known_ratio(tiny_models: TinyModels) -> None:
    """v_hat = (eps_hat - sqrt(1 - abar) x_t) / sqrt(abar), so the v error is the eps error over abar."""
    model = load(tiny_models, "stable_diffusion", for_training=True)
    latents, noise = noise_at((2, 4, 8, 8), 0, "latents"), noise_at((2, 4, 8, 8), 0, "noise")
    conditioning, _ = model.encode_prompts(PROMPTS)
    times = {"timestep": torch.tensor([100, 700])}
    alpha_bar = model.alphas_cumprod[times["timestep"]].double()  # type: ignore[attr-defined]

    @torch.no_grad()
    def epsilon_of(*given: Any, **named: Any) -> tuple[Tensor]:
        return (model.denoiser(*given, **named)[0],)

    @torch.no_grad()
    def velocity_of(noisy: Tensor, *given: Any, **named: Any) -> tuple[Tensor]:
        epsilon = model.denoiser(noisy, *given, **named)[0].double()
        root, rest = alpha_bar.sqrt()[:, None, None, None], (1 - alpha_bar).sqrt()[:, None, None, None]
        clean = (noisy.double() - rest * epsilon) / root
        return (root * epsilon - rest * clean,)

    by_epsilon = model.errors(epsilon_of, model.denoising_task(epsilon_of, latents, conditioning, times, noise))
    model.prediction_type = "v_prediction"  # type: ignore[attr-defined]
    by_velocity = model.errors(velocity_of, model.denoising_task(velocity_of, latents, conditioning, times, noise))
    torch.testing.assert_close(by_velocity.double(), by_epsilon.double() / alpha_bar, rtol=1e-4, atol=0)


def test_families_equal_those_of_the_config_and_each_can_be_imported() -> None:
    assert set(FAMILIES) == set(get_args(Family))
    for place in FAMILIES.values():
        module, _, name = place.partition(":")
        kind = getattr(importlib.import_module(module), name)
        assert issubclass(kind, TextToImageModel) and FAMILIES[kind.family] == place
