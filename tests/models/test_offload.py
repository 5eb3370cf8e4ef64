"""Offloading of text encoders and VAE: moved to the device on use and back, with identical images."""

import pytest
import torch
from tiny_policies import TinyModels, load

from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.randomness.noise import noise_at

FAMILIES = (
    *("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"),
    *("flux2", "z_image", "qwen_image", "sana"),
)
each_family = pytest.mark.parametrize("family", FAMILIES)


def record_moves(model: TextToImageModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record moves of the pipeline's parts and calls of its denoiser, in order; the device is called `cpu:0`."""
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
def test_each_part_is_on_the_device_only_while_it_is_used(
    tiny_models: TinyModels, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_models(family), family, offload=True)
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
    model = load(tiny_models(family), family)
    events = record_moves(model, monkeypatch)
    images(model)
    assert events == ["denoiser", "denoiser"]


@each_family
def test_images_are_identical_with_and_without_offload(tiny_models: TinyModels, family: str) -> None:
    assert torch.equal(
        images(load(tiny_models(family), family)), images(load(tiny_models(family), family, offload=True))
    )


def test_a_part_is_moved_back_after_an_error(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_models("stable_diffusion"), "stable_diffusion", offload=True)
    events = record_moves(model, monkeypatch)
    with pytest.raises(RuntimeError):
        model.decode(torch.zeros(1, 3, 8, 8))  # wrong number of channels
    assert events == ["vae to cpu:0", "vae to cpu"]


@pytest.mark.parametrize("name", ["text_encoder", "vae"])
def test_weights_return_to_the_same_host_memory(
    tiny_models: TinyModels, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_models("stable_diffusion"), "stable_diffusion", offload=True)
    part = getattr(model.pipeline, name)

    def move(device: str) -> None:  # as between host and GPU: in place, to other memory
        for parameter in part.parameters():
            if parameter.data_ptr() in on_host and device == "cpu:0":
                parameter.data = parameter.data.clone()

    on_host = [parameter.data_ptr() for parameter in part.parameters()]
    model.device = "cpu:0"
    monkeypatch.setattr(part, "to", move)
    with model.on_device(name):
        assert not {parameter.data_ptr() for parameter in part.parameters()} & set(on_host)
    assert [parameter.data_ptr() for parameter in part.parameters()] == on_host


def test_for_training_the_empty_prompt_is_encoded_when_the_model_is_loaded(tiny_models: TinyModels) -> None:
    model = load(tiny_models("flux"), "flux", offload=True, for_training=True)
    model.drop_text_encoders()
    expected = load(tiny_models("flux"), "flux").empty_conditioning
    assert all(torch.equal(value, expected[name]) for name, value in model.empty_conditioning.items())
