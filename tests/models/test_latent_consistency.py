"""The latent consistency family against the stock pipeline, and its draws, teacher and target in training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
from tiny_models import build_tiny_sd15
from torch import Tensor

from cdpo_ray.errors import ModelError
from cdpo_ray.models import load_model
from cdpo_ray.models.latent_consistency import LatentConsistency
from cdpo_ray.randomness.noise import generator_at, noise_at
from cdpo_ray.testbed.consistency import load_consistency_pipeline

PROMPTS = ["a red circle", "a blue square on the left and a green cross on the right", ""]


@pytest.fixture(scope="module")
def tiny(tiny_lcm: Path) -> LatentConsistency:
    return LatentConsistency.load(str(tiny_lcm), device="cpu")


def draw_noise(model: LatentConsistency) -> Tensor:
    return torch.stack([noise_at(model.latent_shape(None, None), 0, "image", prompt, 0) for prompt in PROMPTS])


def assert_images_are_the_stock_pipelines(
    model: LatentConsistency, stock: LatentConsistencyModelPipeline, num_denoising_steps: int
) -> None:
    stock.set_progress_bar_config(disable=True)
    noise = draw_noise(model)
    settings = {"num_denoising_steps": num_denoising_steps, "guidance_scale": 3.0}
    latents = model.sample(model.encode_prompts(PROMPTS)[0], noise, **settings)
    theirs = stock(
        PROMPTS,
        latents=noise,
        generator=model.sampler_generators(noise),
        num_inference_steps=num_denoising_steps,
        guidance_scale=3.0,
        output_type="pil",
    ).images
    ours = model.decode(latents).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(ours, np.stack([np.asarray(image) for image in theirs]))
    assert not np.array_equal(ours[0], ours[1])


@pytest.mark.parametrize("num_denoising_steps", [1, 8])
def test_images_of_the_tiny_model_equal_the_stock_pipelines(
    tiny: LatentConsistency, tiny_lcm: Path, num_denoising_steps: int
) -> None:
    stock = LatentConsistencyModelPipeline.from_pretrained(tiny_lcm, safety_checker=None, requires_safety_checker=False)
    assert_images_are_the_stock_pipelines(tiny, stock, num_denoising_steps)


def test_images_of_the_embedded_model_equal_the_stock_pipelines(embedded: Path) -> None:
    model = load_model("latent_consistency", path="embedded", device="cpu")
    assert_images_are_the_stock_pipelines(model, load_consistency_pipeline(), 2)


def test_images_do_not_depend_on_the_batch(tiny: LatentConsistency) -> None:
    noise, settings = draw_noise(tiny), {"num_denoising_steps": 4, "guidance_scale": 3.0}
    conditioning = tiny.encode_prompts(PROMPTS)[0]["prompt_embedding"]
    together = tiny.sample({"prompt_embedding": conditioning}, noise, **settings)
    for rows in ([0], [2, 1], [1, 1, 0, 2]):
        others = tiny.sample({"prompt_embedding": conditioning[rows]}, noise[rows], **settings)
        torch.testing.assert_close(others, together[rows], rtol=1e-4, atol=1e-4)
    again = tiny.sample({"prompt_embedding": conditioning}, noise, **settings)
    assert torch.equal(again, together)


def test_the_samplers_noise_depends_on_the_initial_noise_only(tiny: LatentConsistency) -> None:
    def sampler_noise(noise: Tensor) -> Tensor:
        return torch.stack([torch.randn(8, generator=generator) for generator in tiny.sampler_generators(noise)])

    noise = draw_noise(tiny)
    assert torch.equal(sampler_noise(noise), sampler_noise(noise))
    assert torch.equal(sampler_noise(noise[[2, 0]]), sampler_noise(noise)[[2, 0]])
    nearly = noise.clone()
    nearly[0, 0, 0, 0] += 1e-6
    assert torch.equal(sampler_noise(nearly)[1:], sampler_noise(noise)[1:])
    assert (
        abs(np.corrcoef(torch.cat([sampler_noise(nearly)[:1], sampler_noise(noise)]))[np.triu_indices(4, k=1)]).max()
        < 0.99
    )


def test_more_denoising_steps_add_noise_between_them(tiny: LatentConsistency, monkeypatch: pytest.MonkeyPatch) -> None:
    conditioning, noise = tiny.encode_prompts(PROMPTS)[0], draw_noise(tiny)

    def sampled(num_denoising_steps: int) -> Tensor:
        return tiny.sample(conditioning, noise, num_denoising_steps=num_denoising_steps, guidance_scale=3.0)

    before = {steps: sampled(steps) for steps in (1, 2)}
    other = [torch.Generator().manual_seed(7) for _ in PROMPTS]
    monkeypatch.setattr(tiny, "sampler_generators", lambda noise: other)
    assert torch.equal(sampled(1), before[1])
    assert not torch.allclose(sampled(2), before[2], atol=0.1)


def test_guidance_changes_the_latents(tiny: LatentConsistency) -> None:
    conditioning, noise = tiny.encode_prompts(PROMPTS)[0], draw_noise(tiny)
    weak, strong = (tiny.sample(conditioning, noise, num_denoising_steps=1, guidance_scale=g) for g in (1.0, 8.0))
    assert not torch.allclose(weak, strong, atol=1e-3)


def test_times_are_uniform_over_the_grid_and_the_guidance_range(tiny: LatentConsistency) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [tiny.draw_times(generator) for _ in range(5000)]
    timesteps, counts = np.unique([int(times["timestep"]) for times in drawn], return_counts=True)
    assert timesteps.tolist() == list(range(19, 1000, 20))
    assert ((counts - 100) ** 2 / 100).sum() < 49 + 5 * np.sqrt(2 * 49)  # chi-squared test of 50 cells
    guidance = np.array([float(times["guidance"]) for times in drawn])
    assert 5 <= guidance.min() < 5.02 < 14.98 < guidance.max() <= 15
    assert abs(guidance.mean() - 10) < 0.2


@pytest.mark.parametrize("num_denoising_steps", [1, 2, 4, 8])
def test_the_samplers_timesteps_are_those_at_which_the_pipeline_calls_the_denoiser(
    tiny_lcm: Path, num_denoising_steps: int
) -> None:
    rule = {"num_denoising_steps": num_denoising_steps}
    model = LatentConsistency.load(str(tiny_lcm), device="cpu", timesteps=rule)
    called: list[int] = []
    model.denoiser.register_forward_pre_hook(lambda _, given: called.append(int(given[1])))
    sampled = {"num_denoising_steps": num_denoising_steps, "guidance_scale": 8.0}
    model.sample(model.encode_prompts(PROMPTS)[0], draw_noise(model), **sampled)
    drawn = [int(model.draw_times(generator_at(0, "times", number))["timestep"]) for number in range(200)]
    assert set(drawn) == set(called) and len(called) == num_denoising_steps


def test_without_a_teacher_the_target_is_the_samples_own_latents(tiny: LatentConsistency) -> None:
    latents, times = draw_noise(tiny), {"timestep": torch.tensor([999] * 3), "guidance": torch.tensor([1.0, 5.0, 14.0])}
    conditioning, _ = tiny.encode_prompts(PROMPTS)
    task = tiny.denoising_task(tiny.denoiser, latents, conditioning, times, latents.flip(0))
    assert torch.equal(task.target, latents)
    error = tiny.error(task.target + 0.5, task.target)
    torch.testing.assert_close(error, torch.full((3,), 0.25))  # the mean squared error


def test_the_teachers_unet_is_loaded_for_training_only_and_frozen(tiny_lcm: Path, tiny_sd15: Path) -> None:
    arguments = {"teacher": {"path": str(tiny_sd15)}, "dtype": "bfloat16", "device": "cpu"}
    assert LatentConsistency.load(str(tiny_lcm), **arguments).teacher is None
    model = LatentConsistency.load(str(tiny_lcm), for_training=True, **arguments)
    assert model.pipeline.vae is None
    assert model.teacher is not None
    assert type(model.pipeline.scheduler) is LCMScheduler
    weights = UNet2DConditionModel.from_pretrained(tiny_sd15, subfolder="unet", dtype=torch.bfloat16).state_dict()
    assert model.teacher.state_dict().keys() == weights.keys()
    for name, value in model.teacher.named_parameters():
        assert torch.equal(value, weights[name]) and not value.requires_grad, name


def test_the_embedded_models_teacher_is_the_embedded_diffusion_model(embedded: Path) -> None:
    model = LatentConsistency.load("embedded", device="cpu", for_training=True, teacher={"path": "embedded"})
    assert model.teacher is not None
    weights = UNet2DConditionModel.from_pretrained(embedded, subfolder="unet", dtype=torch.float32).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.teacher.state_dict().items())
    assert model.pipeline.vae is None


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_teachers_prediction_type_is_its_schedulers(tiny_lcm: Path, tmp_path: Path, prediction_type: str) -> None:
    folder = build_tiny_sd15(tmp_path / "teacher", prediction_type=prediction_type)
    model = LatentConsistency.load(str(tiny_lcm), device="cpu", for_training=True, teacher={"path": str(folder)})
    assert (model.teacher_prediction_type, model.prediction_type) == (prediction_type, "epsilon")


def test_a_missing_teacher_is_a_model_error(tiny_lcm: Path, tmp_path: Path) -> None:
    nowhere = {"path": str(tmp_path / "nowhere")}
    with pytest.raises(ModelError, match=r"`model\.teacher\.path` .*/nowhere \(revision None\): cannot be loaded: "):
        LatentConsistency.load(str(tiny_lcm), device="cpu", for_training=True, teacher=nowhere)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_at_the_lowest_grid_timestep_the_target_is_ddims_last_step_whatever_the_reference_predicts(
    tiny_lcm: Path, tiny_sd15: Path, set_alpha_to_one: bool
) -> None:
    loaded = LatentConsistency.load(str(tiny_lcm), device="cpu", for_training=True, teacher={"path": str(tiny_sd15)})
    config = loaded.pipeline.scheduler.config
    loaded.pipeline.scheduler = LCMScheduler.from_config(config, set_alpha_to_one=set_alpha_to_one)
    model = LatentConsistency(loaded.pipeline, dtype=torch.float32, device="cpu")
    assert loaded.teacher is not None
    model.teacher, model.teacher_prediction_type = teacher, _ = loaded.teacher, loaded.teacher_prediction_type
    ddim = DDIMScheduler.from_config(config, set_alpha_to_one=set_alpha_to_one, timestep_spacing="trailing")
    ddim.set_timesteps(50)
    times = {"timestep": torch.tensor([19] * 3), "guidance": torch.tensor([1.0, 5.0, 14.0])}
    conditioning, _ = model.encode_prompts(PROMPTS)
    seen = []

    def reference(noisy_latents: Tensor, timestep: Tensor, **others: object) -> tuple[Tensor]:
        seen.append(timestep)
        return (torch.full_like(noisy_latents, 7.0),)

    task = model.denoising_task(reference, draw_noise(model), conditioning, times, draw_noise(model).flip(0))
    with_prompt, without_prompt = (
        teacher(task.noisy_latents, times["timestep"], embeddings).sample
        for embeddings in (conditioning["prompt_embedding"], model.encode_prompts([""] * 3)[0]["prompt_embedding"])
    )
    scale = 1 + times["guidance"][:, None, None, None]  # the pipelines' guidance_scale
    expected = ddim.step(
        without_prompt + scale * (with_prompt - without_prompt), 19, task.noisy_latents, eta=0.0
    ).prev_sample
    torch.testing.assert_close(task.target, expected, rtol=1e-4, atol=1e-4)
    assert [timestep.tolist() for timestep in seen] == [[0, 0, 0]]
