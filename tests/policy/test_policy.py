"""The policy's trainable parameters, initial values and reference."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cdpo_ray.config.training import LoraSection
from cdpo_ray.errors import ModelError
from cdpo_ray.models import load_model
from cdpo_ray.models.lora import LORA_DIR, save_lora
from cdpo_ray.models.stable_diffusion import StableDiffusion
from cdpo_ray.policy.policy import Policy, make_policy
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.update import METRICS, loss_of_pairs

LORA = LoraSection(rank=4, alpha=8)
BETA = 400.0


def load(folder: Path) -> StableDiffusion:
    return StableDiffusion.load(str(folder), device="cpu", for_training=True)


def move(parameters: list[nn.Parameter], seed: int = 1, by: float = 0.05) -> None:
    """Change parameters as training would."""
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
    loss, metrics = loss_of_pairs(policy, batch, preference_loss=loss_at_beta)
    return loss, dict(zip(METRICS, metrics.tolist(), strict=True))


@pytest.fixture(scope="module")
def first_round(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`4-training` of a round that trained a LoRA."""
    folder = tmp_path_factory.mktemp("round-1")
    model = load(tiny_sd15)
    move(make_policy(model, LORA).trainable)
    save_lora(model.pipeline_class, "unet", model.denoiser, folder / "lora")
    return folder


@pytest.fixture(scope="module")
def first_full_round(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`4-training` of a round that trained the whole net."""
    folder = tmp_path_factory.mktemp("full-round-1")
    model = load(tiny_sd15)
    move(make_policy(model, None).trainable, by=0.01)
    model.denoiser.save_pretrained(folder / "unet")
    return folder


def test_a_lora_starts_as_the_base_which_is_its_reference(tiny_sd15: Path) -> None:
    model = load(tiny_sd15)
    base = predict(model)
    policy = make_policy(model, LORA)
    assert torch.equal(predict(model), base)
    move(policy.trainable)
    assert torch.equal(reference_prediction(model, policy), base)
    assert not torch.allclose(predict(model), base, atol=1e-3)


@pytest.mark.parametrize("reference", ["base", "last_round"])
def test_a_later_round_continues_the_adapter_with_base_or_start_as_reference(
    tiny_sd15: Path, first_round: Path, reference: str
) -> None:
    base = predict(load(tiny_sd15))
    tuned = load(tiny_sd15)
    tuned.load_tuned(first_round)
    start = predict(tuned)
    model = load(tiny_sd15)
    policy = make_policy(model, LORA, start_dir=first_round, reference=reference, seed=5)
    torch.testing.assert_close(predict(model), start, rtol=1e-5, atol=1e-5)
    expected = start if reference == "last_round" else base
    torch.testing.assert_close(reference_prediction(model, policy), expected, rtol=1e-5, atol=1e-5)
    move(policy.trainable, seed=2)
    torch.testing.assert_close(reference_prediction(model, policy), expected, rtol=1e-5, atol=1e-5)
    assert (predict(model) - start).abs().max() > 1e-2


def test_with_its_start_as_reference_the_margin_is_zero_and_gradients_reach_the_policy_alone(
    tiny_sd15: Path, first_round: Path
) -> None:
    model = load(tiny_sd15)
    policy = make_policy(model, LORA, start_dir=first_round, reference="last_round", seed=0)
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


def test_only_the_trained_adapter_is_saved_when_the_reference_is_an_adapter_too(
    tiny_sd15: Path, first_round: Path, tmp_path: Path
) -> None:
    model = load(tiny_sd15)
    policy = make_policy(model, LORA, start_dir=first_round, reference="last_round", seed=0)
    move(policy.trainable, seed=3)
    save_lora(model.pipeline_class, "unet", model.denoiser, tmp_path / "lora")
    fresh = load(tiny_sd15)
    fresh.load_tuned(tmp_path)
    torch.testing.assert_close(predict(fresh), predict(model), rtol=1e-5, atol=1e-5)


def test_a_rank_other_than_the_previous_rounds_is_refused(tiny_sd15: Path, first_round: Path) -> None:
    with pytest.raises(ModelError, match="layers or rank of the LoRA differ from those to train"):
        make_policy(load(tiny_sd15), LoraSection(rank=2), start_dir=first_round)


def test_full_fine_tuning_trains_the_whole_net_with_a_frozen_copy_as_reference(tiny_sd15: Path) -> None:
    model = load(tiny_sd15)
    policy = make_policy(model, None)
    base = predict(model)
    assert len(policy.trainable) == len(list(model.denoiser.parameters()))
    loss, metrics = metrics_of(model, policy)
    assert metrics["margin"] == 0
    loss.backward()
    assert all(parameter.grad is not None for parameter in policy.trainable)
    move(policy.trainable, by=0.01)
    assert torch.equal(reference_prediction(model, policy), base)
    assert not torch.allclose(predict(model), base, atol=1e-3)


def test_a_frozen_copy_is_compiled_if_its_policy_is(tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    for compiles in (False, True):
        model = StableDiffusion.load(str(tiny_sd15), device="cpu", for_training=True, compile=compiles)
        policy = make_policy(model, None)
        with policy.reference(model.denoiser) as frozen:
            assert frozen is not model.denoiser
            assert [net in compiled for net in (model.denoiser, frozen)] == [compiles, compiles]


@pytest.mark.parametrize("reference", ["base", "last_round"])
def test_a_later_full_round_continues_the_net_with_base_or_start_as_reference(
    tiny_sd15: Path, first_full_round: Path, reference: str
) -> None:
    base = predict(load(tiny_sd15))
    model = load(tiny_sd15)
    policy = make_policy(model, None, start_dir=first_full_round, reference=reference, seed=0)
    start = predict(model)
    assert not torch.allclose(start, base, atol=1e-3)
    move(policy.trainable, seed=2, by=0.01)
    assert torch.equal(reference_prediction(model, policy), start if reference == "last_round" else base)
    assert all(parameter.requires_grad for parameter in model.denoiser.parameters())


def test_a_saved_net_replaces_the_base_in_sampling_and_can_be_switched_off(
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


GROWING = LoraSection(rank=2, initial_rank=1, unfreeze="from_input", targets=("to_v",))


def second_factor_gradients(folder: Path, start_dir: Path | None, save_dir: Path) -> dict[str, torch.Tensor]:
    """Gradients of the LoRA's second factor in stage 1; saves the LoRA to ``save_dir`` as training does."""
    model = load_model("stable_diffusion", path=str(folder), device="cpu", for_training=True)
    policy = make_policy(model, GROWING, num_stages=2, start_dir=start_dir)
    policy.begin_stage(1)
    output = model.denoiser(noise_at((1, 4, 8, 8), 0, "x"), torch.tensor([500]), noise_at((1, 77, 32), 0, "c")).sample
    output.square().sum().backward()
    save_lora(model.pipeline_class, model.denoiser_name, model.denoiser, save_dir / LORA_DIR)
    return {name: value.grad for name, value in model.denoiser.named_parameters() if "lora_B" in name}


def test_a_lora_grows_in_the_first_round_and_is_fully_grown_in_later_ones(tiny_sd15: Path, tmp_path: Path) -> None:
    first = second_factor_gradients(tiny_sd15, None, tmp_path / "1")
    assert all(gradient[:, 1:].abs().max() == 0 for gradient in first.values())
    assert {name for name, gradient in first.items() if gradient.abs().max() > 0} == {
        name for name in first if "up_blocks" not in name
    }
    later = second_factor_gradients(tiny_sd15, tmp_path / "1", tmp_path / "2")
    assert all(gradient.abs().amax(dim=0).min() > 0 for gradient in later.values())


@pytest.mark.parametrize("reference", ["base", "start", "last_round"])
def test_a_given_lora_is_the_start_and_with_it_as_reference_the_margin_is_zero(
    tiny_sd15: Path, first_round: Path, reference: str
) -> None:
    model = load(tiny_sd15)
    base = predict(model)
    policy = make_policy(model, LORA, start_from=str(first_round / "lora"), reference=reference)
    start = predict(model)
    assert (start - base).abs().max() > 1e-2
    assert torch.equal(reference_prediction(model, policy), base if reference == "base" else start)
    _, metrics = metrics_of(model, policy)
    assert (metrics["margin"] == 0) == (reference != "base")


def test_the_given_lora_stays_the_reference_of_later_rounds(tiny_sd15: Path, first_round: Path, tmp_path: Path) -> None:
    model = load(tiny_sd15)
    policy = make_policy(model, LORA, start_from=str(first_round / "lora"), reference="start")
    start = predict(model)
    move(policy.trainable, seed=4)
    save_lora(model.pipeline_class, "unet", model.denoiser, tmp_path / "lora")
    end = predict(model)
    later = load(tiny_sd15)
    policy = make_policy(later, LORA, start_from=str(first_round / "lora"), start_dir=tmp_path, reference="start")
    assert torch.equal(predict(later), end)
    assert torch.equal(reference_prediction(later, policy), start)
