"""Every family against its stock pipeline: the same images, the same answers, adapters that load elsewhere."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from cdpo_ray.config import ModelSection
from cdpo_ray.models import FAMILIES, load_model
from cdpo_ray.models.family import DenoisingTask, TextToImageModel
from cdpo_ray.models.flux import Flux, pack, unpack
from cdpo_ray.models.lora import save_lora
from cdpo_ray.models.seeds import generator_at, noise_at
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.job import LoraJob
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.policy import Policy, make_policy
from cdpo_ray.training.update import METRICS, loss_of_pairs

PROMPTS = ["a red circle in the middle", "a blue square on the left"]
LORA = LoraJob(4, 8, ("to_q", "to_k", "to_v", "to_out.0"))
GUIDED = ["stable_diffusion_xl", "stable_diffusion_3", "flux"]
TRAINED = ["stable_diffusion", "latent_consistency", *GUIDED]
Folders = Callable[[str], Path]


def load(folders: Folders, family: str, **given: Any) -> TextToImageModel:
    if family == "latent_consistency":
        given["teacher"] = {"path": str(folders("stable_diffusion"))}
    return load_model(family, path=str(folders(family)), device="cpu", **given)


def stock(folders: Folders, family: str) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folders(family), dtype=torch.float32)
    if family == "stable_diffusion_xl":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(model: TextToImageModel, *address: Any, count: int = 2) -> Tensor:
    return noise_at((count, *model.latent_shape(None, None)), *address)


def stock_latents(family: str, noise: Tensor) -> Tensor:
    return FluxPipeline._pack_latents(noise, *noise.shape) if family == "flux" else noise


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX has no size of its own in its weights; the pipeline's 1024 pixels are too many here."""
    monkeypatch.setattr(Flux, "latent_shape", lambda self, height, width: (16, (height or 64) // 8, (width or 64) // 8))


@pytest.mark.parametrize("family", GUIDED)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_images_are_the_stock_pipelines(tiny_models: Folders, family: str, guidance_scale: float) -> None:
    model = load(tiny_models, family)
    noise = noise_of(model, 0, "image")
    conditioning, _ = model.encode_prompts(PROMPTS)
    latents = model.sample(conditioning, noise, num_denoising_steps=3, guidance_scale=guidance_scale)
    assert latents.shape == noise.shape
    ours = model.decode(latents).permute(0, 2, 3, 1).numpy()
    theirs = stock(tiny_models, family)(
        PROMPTS,
        latents=stock_latents(family, noise),
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        output_type="pil",
    ).images
    assert abs(ours.astype(int) - np.stack([np.asarray(image) for image in theirs]).astype(int)).max() <= 1
    assert abs(ours[0].astype(int) - ours[1].astype(int)).max() > 10


@pytest.mark.parametrize("family", GUIDED)
def test_the_net_is_asked_as_the_stock_pipeline_asks_it(tiny_models: Folders, family: str) -> None:
    """One denoising step: what the pipeline gives its net is what `predict` gives it, value for value."""
    model = load(tiny_models, family)
    calls: list[dict[str, Any]] = []
    noise = noise_of(model, 0, "image")

    def caught(denoiser: Any) -> Any:
        original = denoiser.forward

        def forward(*given: Any, **named: Any) -> Any:
            names = ("sample", "timestep")
            calls.append({**dict(zip(names, given, strict=False)), **named})
            return original(*given, **named)

        denoiser.forward = forward
        return denoiser

    caught(model.denoiser)
    conditioning, _ = model.encode_prompts(PROMPTS)
    model.sample(conditioning, noise, num_denoising_steps=1, guidance_scale=1.0)
    asked = calls.pop()
    timestep = asked["timestep"].float().reshape(-1)[:1].expand(2) * (1000 if family == "flux" else 1)
    times = {"timestep": timestep}
    if family == "flux":
        times["guidance"] = torch.ones(2)
    with torch.no_grad():
        model.predict(model.denoiser, DenoisingTask(noise, times, conditioning, noise))
    found = calls.pop()

    def flat(value: Any) -> list[Tensor]:
        if isinstance(value, dict):
            return [tensor for name in sorted(value) for tensor in flat(value[name])]
        return [value.float()] if isinstance(value, Tensor) else []

    names = {name for name, value in asked.items() if flat(value)}
    assert names == {name for name, value in found.items() if flat(value)}
    for name in names:
        for theirs, ours in zip(flat(asked[name]), flat(found[name]), strict=True):
            torch.testing.assert_close(ours, theirs.expand_as(ours), rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", GUIDED)
def test_errors_are_those_of_the_formula_in_float64(tiny_models: Folders, family: str) -> None:
    model = load(tiny_models, family, for_training=True)
    latents, noise = noise_of(model, 0, "latents"), noise_of(model, 0, "noise")
    conditioning, _ = model.encode_prompts(PROMPTS)
    flow = family != "stable_diffusion_xl"
    timestep = torch.tensor([130.0, 870.0]) if flow else torch.tensor([130, 870])
    times = {"timestep": timestep} | ({"guidance": torch.full((2,), 3.5)} if family == "flux" else {})
    with torch.no_grad():
        task = model.denoising_task(model.denoiser, latents, conditioning, times, noise)
        found = model.errors(model.denoiser, task)
        prediction = model.predict(model.denoiser, task).double()
    x0, eps = latents.double(), noise.double()
    if flow:
        t = (timestep.double() / 1000)[:, None, None, None]
        noisy, target = (1 - t) * x0 + t * eps, eps - x0
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=(timestep.double() / 1000).flip(0).tolist())
        scaled = scheduler.scale_noise(latents, scheduler.timesteps[:2].flip(0), noise)
        torch.testing.assert_close(task.noisy_latents, scaled, rtol=1e-5, atol=1e-5)
    else:
        scheduler = DDPMScheduler.from_pretrained(tiny_models(family), subfolder="scheduler")
        noisy, target = scheduler.add_noise(x0, eps, timestep), eps
    torch.testing.assert_close(task.noisy_latents.double(), noisy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(task.target.double(), target, rtol=1e-6, atol=1e-6)
    expected = ((prediction - target) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["stable_diffusion_3", "flux"])
def test_flow_timesteps_are_logit_normal(tiny_models: Folders, family: str) -> None:
    model = load(tiny_models, family, for_training=True)
    drawn = [model.draw_times(generator_at(0, "draw", number)) for number in range(2000)]
    logits = torch.logit(torch.stack([times["timestep"] for times in drawn]).double() / 1000)
    expected = 0.5 * (1 + torch.erf(logits.sort().values / math.sqrt(2)))
    distance = (expected - torch.arange(1, 2001) / 2000).abs().max()
    assert distance * math.sqrt(2000) < 1.95  # Kolmogorov and Smirnov's, 99.9 %
    assert ("guidance" in drawn[0]) == (family == "flux")


def test_v_and_epsilon_predictions_of_one_net_have_errors_of_a_known_ratio(tiny_models: Folders) -> None:
    """v = (eps_hat - sqrt(1-abar) x_t) / sqrt(abar) ... so the v error is the eps error over abar."""
    model = load(tiny_models, "stable_diffusion", for_training=True)
    latents, noise = noise_of(model, 0, "latents"), noise_of(model, 0, "noise")
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


def pairs(model: TextToImageModel) -> PairBatch:
    drawn = [model.draw_times(generator_at(1, "draw", number)) for number in range(2)]
    return PairBatch(
        noise_of(model, 0, "chosen"),
        noise_of(model, 0, "rejected"),
        model.encode_prompts(PROMPTS)[0],
        {name: torch.stack([times[name] for times in drawn]) for name in drawn[0]},
        noise_of(model, 0, "noise"),
    ).to("cpu", model.dtype)


def metrics_of(model: TextToImageModel, policy: Policy, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
    loss, metrics = loss_of_pairs(
        model,
        model.denoiser,
        policy.reference,
        model.denoiser,
        batch,
        preference_loss=partial(preference_loss, beta=400.0),
    )
    return loss, dict(zip(METRICS, metrics.tolist(), strict=True))


def change(policy: Policy) -> None:
    """As if trained, and hard."""
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += 0.2 * torch.randn(parameter.shape, generator=numbers)


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_margin_starts_at_zero_and_the_reference_stays_the_base(
    tiny_models: Folders, family: str, dtype: str
) -> None:
    model = load(tiny_models, family, dtype=dtype, for_training=True)
    policy = make_policy(model, LORA, start_dir=None, reference_is_start=False, seed=0)
    batch = pairs(model)
    loss, at_first = metrics_of(model, policy, batch)
    assert (at_first["margin"], loss.item()) == (0.0, torch.tensor(math.log(2)).item())
    loss.backward()
    reached = [parameter for parameter in policy.trainable if parameter.grad is not None and parameter.grad.any()]
    assert len(reached) > len(policy.trainable) // 3  # all second factors but where attention sees one place
    learning = {id(parameter) for parameter in policy.trainable}
    assert all(parameter.grad is None for parameter in model.denoiser.parameters() if id(parameter) not in learning)
    change(policy)
    _, after = metrics_of(model, policy, batch)
    assert after["reference_error_w"] == at_first["reference_error_w"]
    assert after["policy_error_w"] != at_first["policy_error_w"]


@pytest.mark.parametrize("family", TRAINED)
def test_a_saved_lora_makes_the_stock_pipeline_give_the_policys_latents(
    tiny_models: Folders, family: str, tmp_path: Path
) -> None:
    model = load(tiny_models, family)
    noise = noise_of(model, 0, "image")
    conditioning, _ = model.encode_prompts(PROMPTS)
    sample = partial(model.sample, conditioning, noise, num_denoising_steps=1, guidance_scale=2.0)
    untrained = sample()
    policy = make_policy(model, LORA, start_dir=None, reference_is_start=False, seed=0)
    change(policy)
    trained = sample()
    save_lora(model.pipeline_class, model.denoiser_name, model.denoiser, tmp_path)
    pipeline = stock(tiny_models, family)
    pipeline.load_lora_weights(tmp_path)
    theirs = pipeline(
        PROMPTS,
        latents=stock_latents(family, noise),
        height=64,
        width=64,
        num_inference_steps=1,  # more, and a consistency model adds noise of its own
        guidance_scale=2.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(stock_latents(family, trained), theirs, rtol=1e-4, atol=1e-4)
    assert (trained - untrained).abs().max() > 0.01


def test_packing_is_the_pipelines_and_can_be_undone() -> None:
    latents = noise_at((2, 16, 6, 10), 0, "latents")
    packed = FluxPipeline._pack_latents(latents, 2, 16, 6, 10)
    assert torch.equal(pack(latents), packed)
    assert torch.equal(unpack(packed, 6, 10), latents)


def test_flux_without_a_guidance_embedding_is_told_of_none(tmp_path: Path) -> None:
    from tiny_models import build_tiny_flux

    model = load_model("flux", path=str(build_tiny_flux(tmp_path, guidance_embeds=False)), device="cpu")
    assert set(model.draw_times(generator_at(0))) == {"timestep"}
    policy = make_policy(model, LORA, start_dir=None, reference_is_start=False, seed=0)
    assert metrics_of(model, policy, pairs(model))[1]["margin"] == 0


def test_sdxl_is_led_away_from_zeros_where_its_pipeline_says_so(tiny_models: Folders) -> None:
    model = load(tiny_models, "stable_diffusion_xl")
    assert not any(value.any() for value in model.empty_conditioning.values())
    assert any(value.any() for value in model.encode_prompts([""])[0].values())


@pytest.mark.parametrize("family", GUIDED)
def test_training_goes_without_the_decoder_and_the_text_encoders(tiny_models: Folders, family: str) -> None:
    model = load(tiny_models, family, for_training=True)
    model.drop_text_encoders()
    parts = {name for name, part in model.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert parts == {model.denoiser_name}


def test_the_families_of_the_config_are_those_that_exist() -> None:
    family: Any = ModelSection.model_fields["family"].annotation
    assert set(FAMILIES) == set(family.__args__)
    assert all(load_class.count(":") == 1 for load_class in FAMILIES.values())
