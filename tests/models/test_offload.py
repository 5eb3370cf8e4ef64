"""Text encoders and VAE that wait in host memory: moved for their work and back, with the very same images."""

from typing import Any

import pytest
import torch
from tiny_policies import TinyModels

from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.models.seeds import noise_at

FAMILIES = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux")
each_family = pytest.mark.parametrize("family", FAMILIES)


def load(tiny_models: TinyModels, family: str, **options: Any) -> TextToImageModel:
    return load_model(family, path=str(tiny_models(family)), device="cpu", **options)


def record_moves(model: TextToImageModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Moves of the pipeline's parts and launches of its denoiser, in order; `device` is named by a stand-in."""
    events: list[str] = []
    model.device = "cpu:0"
    for name in (*model.text_encoders, "vae"):
        part = getattr(model.pipeline, name)
        monkeypatch.setattr(part, "to", lambda device, name=name: events.append(f"{name} to {device}"))
    model.denoiser.register_forward_hook(lambda *_: events.append("denoiser"))
    return events


def images(model: TextToImageModel) -> torch.Tensor:
    conditioning, _ = model.encode_prompts(["a cat", "a dog"])
    noise = noise_at((2, *model.latent_shape(64, 64)), 0, "noise")
    return model.decode(model.sample(conditioning, noise, num_denoising_steps=2, guidance_scale=1))


@each_family
def test_each_part_is_on_the_device_for_its_work_alone(
    tiny_models: TinyModels, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_models, family, offload=True)
    events = record_moves(model, monkeypatch)
    images(model)
    encoders = model.text_encoders
    assert events == [
        *(f"{name} to cpu:0" for name in encoders),
        *(f"{name} to cpu" for name in encoders),
        "denoiser",
        "denoiser",
        "vae to cpu:0",
        "vae to cpu",
    ]


@each_family
def test_without_offload_nothing_is_moved(
    tiny_models: TinyModels, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_models, family)
    events = record_moves(model, monkeypatch)
    images(model)
    assert events == ["denoiser", "denoiser"]


@each_family
def test_images_are_the_same_byte_for_byte(tiny_models: TinyModels, family: str) -> None:
    assert torch.equal(images(load(tiny_models, family)), images(load(tiny_models, family, offload=True)))


def test_a_part_goes_back_when_its_work_fails(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_models, "stable_diffusion", offload=True)
    events = record_moves(model, monkeypatch)
    with pytest.raises(RuntimeError):
        model.decode(torch.zeros(1, 3, 8, 8))  # of another number of channels
    assert events == ["vae to cpu:0", "vae to cpu"]


def test_for_training_the_empty_prompt_is_encoded_when_the_model_is_loaded(tiny_models: TinyModels) -> None:
    model = load(tiny_models, "flux", offload=True, for_training=True)
    model.drop_text_encoders()
    expected = load(tiny_models, "flux").empty_conditioning
    assert all(torch.equal(value, expected[name]) for name, value in model.empty_conditioning.items())
