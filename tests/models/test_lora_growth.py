"""A masked LoRA equals one of smaller rank, and growing it equals padding with zeros."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionPipeline, ZImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

from cdpo_ray.models.lora import attach_lora, save_lora
from cdpo_ray.models.lora_growth import LoraGrowth, by_block
from cdpo_ray.models.stable_diffusion import StableDiffusion
from cdpo_ray.randomness.noise import noise_at

TARGETS = ("to_q", "to_v")
RANK, ALPHA = 4, 8.0
WHOLE = Fraction(1)
# fp64, and no level one pixel wide, where a group norm of two values is a step function: else rounding dominates
NOISY, EMBEDDING = noise_at((2, 4, 16, 16), 0, "noisy").double(), noise_at((2, 77, 32), 0, "embedding").double()

Factors = dict[str, Tensor]


def fresh(
    folder: Path, rank: int = RANK, alpha: float = ALPHA, targets: tuple[str, ...] = TARGETS
) -> tuple[StableDiffusion, list[nn.Parameter]]:
    model = StableDiffusion.load(str(folder), device="cpu", for_training=True)
    trainable = attach_lora(model.denoiser, rank=rank, alpha=alpha, targets=targets, seed=0)
    model.denoiser.double()
    return model, trainable


def predict(model: StableDiffusion) -> Tensor:
    return model.denoiser(NOISY, torch.tensor([10, 900]), EMBEDDING).sample


def optimizer_of(trainable: list[nn.Parameter], weight_decay: float = 0.0) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable, lr=1e-2, weight_decay=weight_decay)


def train(model: StableDiffusion, optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    for _ in range(num_updates):
        optimizer.zero_grad()
        (predict(model) - 1).square().mean().backward()
        optimizer.step()


def factors(model: StableDiffusion) -> Factors:
    return {name: value.detach().clone() for name, value in model.denoiser.named_parameters() if "lora_" in name}


def narrowed(name: str, value: Tensor, rank: int) -> Tensor:
    return value[:rank] if "lora_A" in name else value[:, :rank]


def smaller(folder: Path, rank: int) -> tuple[StableDiffusion, list[nn.Parameter]]:
    """A LoRA of smaller rank with the same first rows and the same scaling."""
    large = factors(fresh(folder)[0])
    model, trainable = fresh(folder, rank, ALPHA * rank / RANK)
    with torch.no_grad():
        for name, value in model.denoiser.named_parameters():
            if "lora_" in name:
                value.copy_(narrowed(name, large[name], rank))
    return model, trainable


def test_a_masked_lora_trains_like_one_of_smaller_rank(tiny_sd15: Path) -> None:
    masked, trainable = fresh(tiny_sd15)
    start = factors(masked)
    LoraGrowth(masked.denoiser).set_capacity(2, WHOLE)
    train(masked, optimizer_of(trainable), 5)
    true, true_trainable = smaller(tiny_sd15, 2)
    train(true, optimizer_of(true_trainable), 5)
    found, expected = factors(masked), factors(true)
    for name, value in expected.items():
        torch.testing.assert_close(narrowed(name, found[name], 2), value, rtol=1e-9, atol=1e-10)
    for name, value in found.items():  # the masked part has not changed
        assert torch.equal(*(v[2:] if "lora_A" in name else v[:, 2:] for v in (value, start[name])))
    moved = max(float((found[name] - start[name]).abs().max()) for name in found)
    assert moved > 1e-2
    torch.testing.assert_close(predict(masked), predict(true), rtol=1e-9, atol=1e-10)


def test_gradients_equal_those_of_the_smaller_lora_and_are_zero_beyond(tiny_sd15: Path) -> None:
    masked, trainable = fresh(tiny_sd15)
    LoraGrowth(masked.denoiser).set_capacity(2, WHOLE)
    train(masked, optimizer_of(trainable), 1)  # at first, first factors have no gradient
    true, true_trainable = smaller(tiny_sd15, 2)
    train(true, optimizer_of(true_trainable), 1)
    for model in (masked, true):
        model.denoiser.zero_grad()
        (predict(model) - 1).square().mean().backward()
    expected = {name: value.grad for name, value in true.denoiser.named_parameters() if "lora_" in name}
    for name, value in masked.denoiser.named_parameters():
        if "lora_" in name:
            assert value.grad is not None and expected[name] is not None
            torch.testing.assert_close(narrowed(name, value.grad, 2), expected[name], rtol=1e-9, atol=1e-12)
            assert (value.grad[2:] if "lora_A" in name else value.grad[:, 2:]).abs().max() == 0


def test_growing_equals_padding_the_factors_and_the_optimizer_state_with_zeros(tiny_sd15: Path) -> None:
    """Reference implementation: train a small LoRA, copy its factors and Adam's moments into a large one."""
    masked, trainable = fresh(tiny_sd15)
    start, growth, optimizer = factors(masked), LoraGrowth(masked.denoiser), optimizer_of(trainable)
    growth.set_capacity(2, WHOLE)
    train(masked, optimizer, 4)
    growth.set_capacity(RANK, WHOLE)
    train(masked, optimizer, 4)

    small, small_trainable = smaller(tiny_sd15, 2)
    small_optimizer = optimizer_of(small_trainable)
    train(small, small_optimizer, 4)
    padded, padded_trainable = fresh(tiny_sd15)
    padded_optimizer = optimizer_of(padded_trainable)
    trained = dict(small.denoiser.named_parameters())
    with torch.no_grad():
        for name, value in padded.denoiser.named_parameters():
            if "lora_" in name:
                narrowed(name, value, 2).copy_(trained[name])
                state = {key: torch.zeros_like(value) for key in ("exp_avg", "exp_avg_sq")}
                for key, moment in state.items():
                    narrowed(name, moment, 2).copy_(small_optimizer.state[trained[name]][key])
                padded_optimizer.state[value] = state | {"step": torch.tensor(4.0)}
    train(padded, padded_optimizer, 4)

    found, expected = factors(masked), factors(padded)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10)
    assert all(float(value[:, 2:].abs().max()) > 1e-3 for name, value in found.items() if "lora_B" in name)
    assert max(float((found[name][2:] - start[name][2:]).abs().max()) for name in found if "lora_A" in name) > 1e-3


@pytest.mark.parametrize(("rank", "block_share"), [(RANK, Fraction(1, 3)), (1, WHOLE), (RANK, WHOLE)])
def test_growing_does_not_change_the_output(tiny_sd15: Path, rank: int, block_share: Fraction) -> None:
    model, trainable = fresh(tiny_sd15)
    growth = LoraGrowth(model.denoiser)
    growth.set_capacity(1, Fraction(1, 3))
    base = predict(model)
    train(model, optimizer_of(trainable), 3)
    before = predict(model)
    growth.set_capacity(rank, block_share)
    assert torch.equal(predict(model), before)
    assert not torch.equal(before, base)


@pytest.mark.parametrize("from_output", [False, True])
def test_blocks_start_training_one_after_the_other(tiny_sd15: Path, from_output: bool) -> None:
    model, trainable = fresh(tiny_sd15)
    growth, optimizer = LoraGrowth(model.denoiser, from_output=from_output), optimizer_of(trainable)
    order = [
        "down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block.attentions.0",
        "up_blocks.1", "up_blocks.2", "up_blocks.3",
    ]  # fmt: skip
    if from_output:
        order.reverse()
    for stage, num_trained in ((1, 3), (2, 5), (3, 7)):  # a third, two thirds and all of 7, rounded up
        before = factors(model)
        growth.set_capacity(2, Fraction(stage, 3))
        train(model, optimizer, 2)
        moved = {name for name, value in factors(model).items() if not torch.equal(value, before[name])}
        assert {next(block for block in order if name.startswith(block)) for name in moved} == set(order[:num_trained])
        assert len(moved) == sum(name.startswith(tuple(order[:num_trained])) for name in before)


def test_masked_rows_change_by_weight_decay_only(tiny_sd15: Path) -> None:
    model, trainable = fresh(tiny_sd15)
    start = factors(model)
    LoraGrowth(model.denoiser).set_capacity(1, WHOLE)
    train(model, optimizer_of(trainable, weight_decay=0.1), 3)
    for name, value in factors(model).items():
        if "lora_A" in name:
            torch.testing.assert_close(value[1:], start[name][1:] * (1 - 1e-2 * 0.1) ** 3, rtol=1e-5, atol=0)
        else:
            assert value[:, 1:].abs().max() == 0


def test_numbered_modules_and_single_layers_outside_them_are_blocks_of_a_transformer() -> None:
    net = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    net.add_adapter(LoraConfig(r=2, target_modules=["x_embedder", "to_q", "to_out.0", "proj_out"]))
    # x_embedder; to_q and to_out of two blocks; to_q and proj_out of the single block; the transformer's proj_out
    assert [len(block) for block in by_block(net, "lora_B")] == [1, 2, 2, 2, 1]


def test_the_final_layer_of_a_single_stream_transformer_is_its_last_block() -> None:
    net = ZImageTransformer2DModel(
        dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=8, axes_dims=(4, 6, 6)
    )
    net.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "w1", "linear"]))
    # noise and context refiner, two layers, the final layer, which the model registers first
    assert [len(block) for block in by_block(net, "lora_B")] == [3, 3, 3, 3, 1]


def test_the_lora_of_a_convolution_grows(tiny_sd15: Path) -> None:
    model, trainable = fresh(tiny_sd15, 3, targets=("conv1", "conv_out"))
    assert len(by_block(model.denoiser, "lora_B")[-1]) == 1, "conv_out comes after the last block"
    growth = LoraGrowth(model.denoiser)
    growth.set_capacity(2, WHOLE)
    train(model, optimizer_of(trainable), 2)
    for name, value in factors(model).items():
        if "lora_B" in name:
            assert value[:, :2].abs().max() > 1e-3
            assert value[:, 2:].abs().max() == 0


def test_a_lora_saved_while_it_grows_loads_into_a_stock_pipeline(tiny_sd15: Path, tmp_path: Path) -> None:
    model = StableDiffusion.load(str(tiny_sd15), device="cpu")
    trainable = attach_lora(model.denoiser, rank=RANK, alpha=ALPHA, targets=TARGETS, seed=0)
    model.denoiser.double()
    growth, optimizer = LoraGrowth(model.denoiser, from_output=True), optimizer_of(trainable)
    stock = StableDiffusionPipeline.from_pretrained(tiny_sd15, safety_checker=None, requires_safety_checker=False)
    stock.unet.double()
    time = torch.tensor([10, 900])
    with torch.no_grad():
        base = stock.unet(NOISY, time, EMBEDDING).sample
    for stage, rank in ((1, 1), (2, 3), (3, RANK)):
        growth.set_capacity(rank, Fraction(stage, 3))
        train(model, optimizer, 2)
        save_lora(model.pipeline_class, "unet", model.denoiser, tmp_path / str(stage))
        stock.load_lora_weights(tmp_path / str(stage), adapter_name=f"stage-{stage}")
        stock.set_adapters(f"stage-{stage}")
        with torch.no_grad():
            loaded = stock.unet(NOISY, time, EMBEDDING).sample
        torch.testing.assert_close(loaded, predict(model).detach(), rtol=1e-5, atol=1e-5)
        assert (loaded - base).abs().max() > 1e-2
