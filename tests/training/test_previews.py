"""Images of the policy at the end of a stage, against the model sampled directly."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_runs import change
from safetensors.torch import load_file
from tiny_policies import pairs_at, training_section
from torch._dynamo.utils import counters
from worker_processes import run_workers

from cdpo_ray.config.training import LoraSection
from cdpo_ray.dataflow.images import decode_png
from cdpo_ray.errors import ModelError
from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.policy.policy import Policy, make_policy
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.records import PREVIEW_PROMPTS, preview_file
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.engine import save_trained, start_engine
from cdpo_ray.training.job import PreviewJob
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.previews import Previewer
from cdpo_ray.training.update import loss_of_pairs

pytestmark = pytest.mark.slow
PROMPTS = ["a red circle", "two blue squares", "a green triangle"]
SAMPLING: dict[str, Any] = {
    "seed": 5,
    "images_per_prompt": 1,
    "num_denoising_steps": 3,
    "guidance_scale": 1.5,
    "height": None,
    "width": None,
    "images_per_batch": 2,
}


def start(
    family: str, path: Path | str, folder: Path, *, rank: int = 0, num_workers: int = 1, method: str = "lora"
) -> tuple[TextToImageModel, Policy, Previewer]:
    """Model, policy and previewer as a training worker makes them, after the images of the base model."""
    model = load_model(family, path=str(path), device="cpu", for_training=True, keep_vae=True)
    model.empty_conditioning  # noqa: B018 - as a worker has it before it drops the text encoders
    previewer = Previewer(PreviewJob(PROMPTS, SAMPLING), model, folder, worker_rank=rank, num_workers=num_workers)
    previewer.write(model, stage=0)
    model.drop_text_encoders()
    policy = make_policy(model, LoraSection(rank=4, targets=("to_q", "to_v")) if method == "lora" else None)
    model.denoiser.train()
    return model, policy, previewer


def images(folder: Path, stage: int) -> np.ndarray:
    return np.stack([decode_png((folder / preview_file(stage, prompt)).read_bytes()) for prompt in PROMPTS])


def sampled(model: TextToImageModel, conditioning: dict[str, torch.Tensor]) -> np.ndarray:
    """All prompts in one batch, from the noise of their first image in the evaluation."""
    noise = torch.stack([noise_at(model.latent_shape(None, None), 5, "image", prompt, 0) for prompt in PROMPTS])
    model.denoiser.eval()
    latents = model.sample(conditioning, noise, num_denoising_steps=3, guidance_scale=1.5)
    model.denoiser.train()
    return model.decode(latents).numpy()


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_base_and_each_stage_are_sampled_from_the_noise_of_the_evaluation(
    embedded: Path, tmp_path: Path, method: str
) -> None:
    model, policy, previewer = start("stable_diffusion", "embedded", tmp_path, method=method)
    previewer.write(model, stage=1)
    assert np.array_equal(images(tmp_path, 1), images(tmp_path, 0)), "nothing is trained yet"
    change(policy.trainable, size=0.02)
    previewer.write(model, stage=2)
    assert largest_difference(images(tmp_path, 2), sampled(model, previewer.conditioning)) <= 1
    assert largest_difference(images(tmp_path, 2), images(tmp_path, 0)) > 20
    assert json.loads((tmp_path / PREVIEW_PROMPTS).read_text()) == PROMPTS


@pytest.mark.parametrize("family", ["latent_consistency", "stable_diffusion_3"])
def test_an_image_that_is_sampled_again_is_identical(tiny_models: Any, tmp_path: Path, family: str) -> None:
    """A consistency model's sampler adds noise; a flow's timesteps depend on the size."""
    model, policy, previewer = start(family, tiny_models(family), tmp_path)
    change(policy.trainable)
    previewer.write(model, stage=1)
    first = [(tmp_path / preview_file(1, prompt)).read_bytes() for prompt in PROMPTS]
    torch.rand(1)
    previewer.write(model, stage=1)
    assert [(tmp_path / preview_file(1, prompt)).read_bytes() for prompt in PROMPTS] == first
    assert largest_difference(images(tmp_path, 1), images(tmp_path, 0)) > 0


def test_previews_leave_weights_mode_rng_state_and_compiled_graphs_unchanged(embedded: Path, tmp_path: Path) -> None:
    model, policy, previewer = start("stable_diffusion", "embedded", tmp_path)
    change(policy.trainable)
    before, state = [parameter.clone() for parameter in policy.trainable], torch.get_rng_state()
    eager = sampled(model, previewer.conditioning)
    counters.clear()
    model.denoiser.compile(backend="eager")
    previewer.write(model, stage=1)
    assert not counters["stats"].get("unique_graphs"), "graphs of another batch size could replace those of training"
    assert largest_difference(images(tmp_path, 1), eager) <= 1
    assert model.denoiser.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(now, then) for now, then in zip(policy.trainable, before, strict=True))
    assert all(parameter.grad is None for parameter in policy.trainable)


def with_zero_3(rank: int, folder: Path, previews: bool) -> None:
    """One update of a LoRA on each of two workers, with and without previews before and after it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model, policy, previewer = start("stable_diffusion", "embedded", folder, rank=rank, num_workers=2)
    section = training_section(global_batch_size=2, num_workers=2, zero_stage=3, learning_rate=0.02)
    batch = pairs_at(make_batch(model), slice(rank, rank + 1))
    engine = start_engine(model.denoiser, policy.trainable, section, num_workers=2)
    for stage in (1, 2, 3):
        if previews:
            previewer.write(model, stage)
        loss, _ = loss_of_pairs(
            replace(policy, net=engine), batch, preference_loss=partial(preference_loss, beta=200.0)
        )
        engine.backward(loss)
        engine.step()
    save_trained(engine, model, folder, lora=True)
    torch.distributed.destroy_process_group()


def make_batch(model: TextToImageModel) -> PairBatch:
    noise = [noise_at((2, 4, 8, 8), 0, what) for what in ("chosen", "rejected", "noise")]
    conditioning = {name: value.expand(2, *value.shape[1:]) for name, value in model.empty_conditioning.items()}
    return PairBatch(noise[0], noise[1], conditioning, {"timestep": torch.tensor([300, 600])}, noise[2])


@pytest.mark.nightly
def test_under_zero_3_previews_are_sampled_and_leave_the_weights_unchanged_to_the_bit(
    embedded: Path, tmp_path: Path
) -> None:
    weights = []
    for previews in (True, False):
        folder = tmp_path / str(previews)
        folder.mkdir()
        run_workers(with_zero_3, folder, previews, num_workers=2)
        weights.append(load_file(next(folder.rglob("*.safetensors"))))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    folder = tmp_path / "True"
    assert largest_difference(images(folder, 1), images(folder, 0)) <= 1, "B is 0 before the first update"
    assert largest_difference(images(folder, 3), images(folder, 0)) > 5


def test_previews_that_exceed_the_memory_leave_the_policy_in_training_mode(
    embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, previewer = start("stable_diffusion", "embedded", tmp_path)

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(model, "sample", fails)
    with pytest.raises(ModelError, match="out of memory with one image of 32x32 pixels"):
        previewer.write(model, stage=1)
    assert model.denoiser.training


def test_workers_share_the_prompts_with_as_many_launches_each(embedded: Path, tmp_path: Path) -> None:
    *_, alone = start("stable_diffusion", "embedded", tmp_path / "alone")
    shares = [start("stable_diffusion", "embedded", tmp_path / "two", rank=rank, num_workers=2)[2] for rank in (0, 1)]
    assert [previewer.prompts for previewer in (alone, *shares)] == [PROMPTS, PROMPTS[::2], PROMPTS[1:2]]
    assert [len(previewer.sampled) for previewer in shares] == [2, 2]
    assert largest_difference(images(tmp_path / "two", 0), images(tmp_path / "alone", 0)) <= 1
