"""What is trained, what it starts from, and what it is held to."""

import copy
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cdpo_ray.curriculum.capacity import Capacity
from cdpo_ray.errors import ModelError
from cdpo_ray.models import load_model
from cdpo_ray.models.lora import LORA_DIR, save_lora
from cdpo_ray.models.stable_diffusion import StableDiffusion
from cdpo_ray.policy.job import LoraJob
from cdpo_ray.policy.policy import Policy, make_policy
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.update import METRICS, loss_of_pairs

LORA = LoraJob(4, 8, ("to_q", "to_k", "to_v", "to_out.0"))
BETA = 400.0


def load(folder: Path) -> StableDiffusion:
    return StableDiffusion.load(str(folder), device="cpu", for_training=True)


def move(parameters: list[nn.Parameter], seed: int = 1, by: float = 0.05) -> None:
    """As if trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += by * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def predict(model: StableDiffusion) -> Tensor:
    embeddings = model.encode_prompts(["a cat", "a dog"])[0]["prompt_embedding"]
    output: Tensor = model.denoiser(noise_at((2, 4, 8, 8), 0, "noisy"), torch.tensor([10, 900]), embeddings).sample
    return output


@torch.no_grad()
def reference_prediction(model: StableDiffusion, policy: Policy) -> Tensor:
    embeddings = model.encode_prompts(["a cat", "a dog"])[0]["prompt_embedding"]
    with policy.reference(model.denoiser) as frozen:
        output: Tensor = frozen(noise_at((2, 4, 8, 8), 0, "noisy"), torch.tensor([10, 900]), embeddings).sample
    return output


def metrics_of(model: StableDiffusion, policy: Policy) -> tuple[Tensor, dict[str, float]]:
    batch = PairBatch(
        noise_at((2, 4, 8, 8), 0, "chosen"),
        noise_at((2, 4, 8, 8), 0, "rejected"),
        model.encode_prompts(["a cat", "a dog"])[0],
        {"timestep": torch.tensor([200, 700])},
        noise_at((2, 4, 8, 8), 0, "noise"),
    )
    loss_at_beta = partial(preference_loss, beta=BETA)
    loss, metrics = loss_of_pairs(model, model.denoiser, policy.reference, batch, preference_loss=loss_at_beta)
    return loss, dict(zip(METRICS, metrics.tolist(), strict=True))


@pytest.fixture(scope="module")
def first_round(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`4-training` of a round that trained a LoRA."""
    folder = tmp_path_factory.mktemp("round-1")
    model = load(tiny_sd15)
    move(make_policy(model, LORA, start_dir=None, reference_is_start=False, seed=0).trainable)
    save_lora(model.pipeline_class, "unet", model.denoiser, folder / "lora")
    return folder


@pytest.fixture(scope="module")
def first_full_round(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`4-training` of a round that trained the whole net."""
    folder = tmp_path_factory.mktemp("full-round-1")
    model = load(tiny_sd15)
    move(make_policy(model, None, start_dir=None, reference_is_start=False, seed=0).trainable, by=0.01)
    model.denoiser.save_pretrained(folder / "unet")
    return folder


def test_a_lora_starts_as_the_base_and_is_held_to_it(tiny_sd15: Path) -> None:
    model = load(tiny_sd15)
    base = predict(model)
    policy = make_policy(model, LORA, start_dir=None, reference_is_start=False, seed=0)
    assert torch.equal(predict(model), base)
    move(policy.trainable)
    assert torch.equal(reference_prediction(model, policy), base)
    assert not torch.allclose(predict(model), base, atol=1e-3)


@pytest.mark.parametrize("held_to_start", [False, True])
def test_a_later_round_goes_on_from_the_adapter_and_is_held_to_base_or_start(
    tiny_sd15: Path, first_round: Path, held_to_start: bool
) -> None:
    base = predict(load(tiny_sd15))
    tuned = load(tiny_sd15)
    tuned.load_tuned(first_round)
    start = predict(tuned)
    model = load(tiny_sd15)
    policy = make_policy(model, LORA, start_dir=first_round, reference_is_start=held_to_start, seed=5)
    torch.testing.assert_close(predict(model), start, rtol=1e-5, atol=1e-5)
    expected = start if held_to_start else base
    torch.testing.assert_close(reference_prediction(model, policy), expected, rtol=1e-5, atol=1e-5)
    move(policy.trainable, seed=2)
    torch.testing.assert_close(reference_prediction(model, policy), expected, rtol=1e-5, atol=1e-5)
    assert (predict(model) - start).abs().max() > 1e-2


def test_held_to_its_start_the_margin_is_zero_and_gradients_reach_all_of_the_policy_and_nothing_else(
    tiny_sd15: Path, first_round: Path
) -> None:
    model = load(tiny_sd15)
    policy = make_policy(model, LORA, start_dir=first_round, reference_is_start=True, seed=0)
    loss, metrics = metrics_of(model, policy)
    assert metrics["margin"] == 0
    assert loss.item() == pytest.approx(0.6931472, abs=1e-7)
    loss.backward()
    sizes = [parameter.grad.abs().max().item() for parameter in policy.trainable if parameter.grad is not None]
    # The middle block attends to one position, so its q and k cannot matter: 0, or rounding on some processors.
    reached = [size for size in sizes if size > 1e-6 * max(sizes)]
    assert len(reached) == len(policy.trainable) - 4
    learning = {id(parameter) for parameter in policy.trainable}
    others = [parameter for parameter in model.denoiser.parameters() if id(parameter) not in learning]
    assert len(others) > len(policy.trainable)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in others)


def test_only_what_is_trained_is_saved_when_the_reference_is_an_adapter_too(
    tiny_sd15: Path, first_round: Path, tmp_path: Path
) -> None:
    model = load(tiny_sd15)
    policy = make_policy(model, LORA, start_dir=first_round, reference_is_start=True, seed=0)
    move(policy.trainable, seed=3)
    save_lora(model.pipeline_class, "unet", model.denoiser, tmp_path / "lora")
    fresh = load(tiny_sd15)
    fresh.load_tuned(tmp_path)
    torch.testing.assert_close(predict(fresh), predict(model), rtol=1e-5, atol=1e-5)


def test_another_rank_than_the_round_before_is_refused(tiny_sd15: Path, first_round: Path) -> None:
    with pytest.raises(ModelError, match="layers or rank of the LoRA differ from those to train"):
        make_policy(
            load(tiny_sd15), LoraJob(2, 2, LORA.targets), start_dir=first_round, reference_is_start=False, seed=0
        )


def test_the_whole_net_learns_and_is_held_to_a_frozen_copy(tiny_sd15: Path) -> None:
    model = load(tiny_sd15)
    policy = make_policy(model, None, start_dir=None, reference_is_start=False, seed=0)
    base = predict(model)
    assert len(policy.trainable) == len(list(model.denoiser.parameters()))
    loss, metrics = metrics_of(model, policy)
    assert metrics["margin"] == 0
    loss.backward()
    assert all(parameter.grad is not None for parameter in policy.trainable)
    move(policy.trainable, by=0.01)
    assert torch.equal(reference_prediction(model, policy), base)
    assert not torch.allclose(predict(model), base, atol=1e-3)


def test_a_frozen_copy_is_compiled_as_its_policy_is(tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    for compiles in (False, True):
        model = StableDiffusion.load(str(tiny_sd15), device="cpu", for_training=True, compile=compiles)
        policy = make_policy(model, None, start_dir=None, reference_is_start=False, seed=0)
        with policy.reference(model.denoiser) as frozen:
            assert frozen is not model.denoiser
            assert [net in compiled for net in (model.denoiser, frozen)] == [compiles, compiles]


@pytest.mark.parametrize("held_to_start", [False, True])
def test_a_later_full_round_goes_on_from_the_net_and_is_held_to_base_or_start(
    tiny_sd15: Path, first_full_round: Path, held_to_start: bool
) -> None:
    base = predict(load(tiny_sd15))
    model = load(tiny_sd15)
    policy = make_policy(model, None, start_dir=first_full_round, reference_is_start=held_to_start, seed=0)
    start = predict(model)
    assert not torch.allclose(start, base, atol=1e-3)
    move(policy.trainable, seed=2, by=0.01)
    assert torch.equal(reference_prediction(model, policy), start if held_to_start else base)
    assert all(parameter.requires_grad for parameter in model.denoiser.parameters())


def test_a_saved_net_is_sampled_in_place_of_the_base_and_can_be_switched(
    tiny_sd15: Path, first_full_round: Path
) -> None:
    model = load(tiny_sd15)
    conditioning, noise = model.encode_prompts(["a cat"])[0], noise_at((1, 4, 8, 8), 0, "image")
    sample = partial(model.sample, conditioning, noise, num_denoising_steps=2, guidance_scale=2.0)
    base = sample()
    model.load_tuned(first_full_round)
    model.use_tuned(True)
    tuned = sample()
    expected = copy.deepcopy(model.pipeline)
    expected.unet = type(expected.unet).from_pretrained(first_full_round, subfolder="unet")
    stock = expected("a cat", latents=noise, num_inference_steps=2, guidance_scale=2.0, output_type="latent").images
    torch.testing.assert_close(tuned, stock, rtol=1e-5, atol=1e-5)
    model.use_tuned(False)
    assert torch.equal(sample(), base)
    assert (tuned - base).abs().max() > 1e-2


GROWING = LoraJob(2, 2, ("to_v",), (Capacity(1, Fraction(1, 2)), Capacity(2, Fraction(1))))


def second_factor_gradients(folder: Path, start_dir: Path | None, save_dir: Path) -> dict[str, torch.Tensor]:
    """Of stage 1; the LoRA is left in ``save_dir`` as a training would leave it."""
    model = load_model("stable_diffusion", path=str(folder), device="cpu", for_training=True)
    policy = make_policy(model, GROWING, start_dir=start_dir, reference_is_start=False, seed=0)
    policy.begin_stage(1)
    output = model.denoiser(noise_at((1, 4, 8, 8), 0, "x"), torch.tensor([500]), noise_at((1, 77, 32), 0, "c")).sample
    output.square().sum().backward()
    save_lora(model.pipeline_class, model.denoiser_name, model.denoiser, save_dir / LORA_DIR)
    return {name: value.grad for name, value in model.denoiser.named_parameters() if "lora_B" in name}


def test_a_lora_grows_in_its_first_training_and_is_full_grown_in_later_ones(tiny_sd15: Path, tmp_path: Path) -> None:
    first = second_factor_gradients(tiny_sd15, None, tmp_path / "1")
    assert all(gradient[:, 1:].abs().max() == 0 for gradient in first.values())
    assert {name for name, gradient in first.items() if gradient.abs().max() > 0} == {
        name for name in first if "up_blocks" not in name
    }
    later = second_factor_gradients(tiny_sd15, tmp_path / "1", tmp_path / "2")
    assert all(gradient.abs().amax(dim=0).min() > 0 for gradient in later.values())
