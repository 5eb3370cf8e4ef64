"""One update is the same for any number of workers, accumulation and ZeRO stage; for a LoRA and full fine-tuning."""

import itertools
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_policies import training_section
from torch import Tensor
from worker_processes import run_workers

from cdpo_ray.config.training import LoraSection
from cdpo_ray.models import load_model
from cdpo_ray.policy.policy import make_policy
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.testbed.scenes import scene_prompts
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.engine import save_trained, start_engine
from cdpo_ray.training.loop import Guard, step_and_measure
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.update import loss_of_pairs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("embedded")]

NUM_PAIRS = 4
LEARNING_RATE = {"lora": 5e-4, "full": 1e-5}
LORA = LoraSection()
LOSS = partial(preference_loss, beta=200.0)


def spreads() -> list[tuple[str, int, int, int]]:
    """Method, number of workers, pairs per launch, ZeRO stage."""
    ways = [(1, 4, 0), (1, 1, 0), *((2, 2, stage) for stage in range(4)), (2, 1, 2)]
    return [(method, *way) for method, way in itertools.product(LEARNING_RATE, ways)]


def whole(method: str) -> tuple[str, int, int, int]:
    """One worker, one launch, no ZeRO."""
    return method, 1, NUM_PAIRS, 0


def name_of(spread: tuple[str, int, int, int]) -> str:
    return "{}-{}-workers-{}-pairs-zero-{}".format(*spread)


def updated(folder: Path, spread: tuple[str, int, int, int], rank: int) -> None:
    """One update of the embedded model, away from the start, where all gradients of A are zero; worker 0 saves."""
    method, num_workers, pairs_per_launch, zero_stage = spread
    model = load_model("stable_diffusion", path="embedded", device="cpu", for_training=True)
    lora = LORA if method == "lora" else None
    policy = make_policy(model, lora)
    if lora:
        numbers = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in policy.trainable:
                parameter += 0.02 * torch.randn(parameter.shape, generator=numbers)
    section = training_section(
        learning_rate=LEARNING_RATE[method],
        global_batch_size=NUM_PAIRS,
        batch_size_per_worker=pairs_per_launch,
        num_workers=num_workers,
        zero_stage=zero_stage,
    )
    conditioning, _ = model.encode_prompts(scene_prompts("train", NUM_PAIRS, 0))
    engine = start_engine(model.denoiser, policy.trainable, section, num_workers=num_workers)
    policy = replace(policy, net=engine)
    guard = Guard(policy.trainable, engine.device, sharded=engine.zero_optimization())
    share = NUM_PAIRS // num_workers
    for start in range(rank * share, (rank + 1) * share, pairs_per_launch):
        cut = slice(start, start + pairs_per_launch)
        noises = (noise_at((NUM_PAIRS, 4, 8, 8), 0, what)[cut] for what in ("chosen", "rejected", "noise"))
        latents_w, latents_l, noise = noises
        batch = PairBatch(
            latents_w,
            latents_l,
            {name: value[cut] for name, value in conditioning.items()},
            {"timestep": torch.tensor([100, 350, 600, 900])[cut]},
            noise,
        )
        loss, _ = loss_of_pairs(policy, batch, preference_loss=LOSS)
        engine.backward(loss)
        if spread == whole(method):  # without ZeRO gradients are accessible
            names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
            gradients = {names[id(parameter)]: parameter.grad.contiguous() for parameter in policy.trainable}
            save_file(gradients, folder / f"{method}.gradients")
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
    guard.verdict(stops=False)
    step_and_measure(engine, guard, [], section.max_grad_norm)
    save_trained(engine, model, folder / name_of(spread), lora=lora is not None)


def work(rank: int, num_workers: int, folder: Path) -> None:
    """All spreads over this number of workers, with one process per worker."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_workers)}
    store = f"file://{folder}/store-{num_workers}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=num_workers)
    for spread in spreads():
        if spread[1] == num_workers:
            updated(folder, spread, rank)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients and weights of every spread, after one update."""
    folder = tmp_path_factory.mktemp("engine")
    for num_workers in (1, 2):
        run_workers(work, num_workers, folder, num_workers=num_workers)
    return folder


def weights(folder: Path, spread: tuple[str, int, int, int]) -> dict[str, Tensor]:
    return load_file(next((folder / name_of(spread)).rglob("*.safetensors")))


@pytest.mark.parametrize("spread", spreads(), ids=name_of)
def test_an_update_is_the_same_for_every_spread(spread: tuple[str, int, int, int], folder: Path) -> None:
    """Within 1e-6 where the gradient exceeds rounding; elsewhere the sign of Adam's first step is random."""
    method = spread[0]
    gradients = {
        name.removeprefix("unet.").replace(".default.", "."): value
        for name, value in load_file(folder / f"{method}.gradients").items()
    }
    expected, found = (
        {name.removeprefix("unet."): value for name, value in weights(folder, which).items()}
        for which in (whole(method), spread)
    )
    assert expected.keys() == found.keys() == gradients.keys()
    largest = max(float(value.abs().max()) for value in gradients.values())
    significant = {name: value.abs() > 1e-5 * largest for name, value in gradients.items()}
    assert sum(int(mask.sum()) for mask in significant.values()) > 0.97 * sum(
        mask.numel() for mask in significant.values()
    )
    for name, mask in significant.items():
        torch.testing.assert_close(found[name][mask], expected[name][mask], rtol=0, atol=1e-6)
