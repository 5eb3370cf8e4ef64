"""Peak memory against hand-computed values."""

import pytest

from cdpo_ray.cost.footprint import ATTENTION_TARGETS
from cdpo_ray.cost.memory import (
    CONTEXT_BYTES,
    DenoiserStorage,
    Peak,
    generator_peak,
    trainer_peak,
    use_checkpointing,
)
from cdpo_ray.cost.published import published_footprint

SD15 = published_footprint("sd15")
BF16 = DenoiserStorage("bfloat16")
LORA = (8, ATTENTION_TARGETS)
COMMON = {"positions": 4096, "checkpointing": False, "optimizer": "adamw", "zero_stage": 0, "num_workers": 1}


def trainer(*, pairs: int = 8, storage: DenoiserStorage = BF16, **changed: object) -> Peak:
    return trainer_peak(SD15, storage, **{"lora": LORA, "pairs": pairs} | COMMON | changed)  # type: ignore[arg-type]


def test_a_lora_worker_keeps_the_denoiser_once_and_16_bytes_per_trainable_parameter() -> None:
    num_lora = SD15.lora_parameters(*LORA)
    peak = trainer()
    assert peak.weights == 2 * SD15.parameters + num_lora * (2 + 2 + 4 + 8)  # weights, gradients, masters, moments
    assert peak.work == 16 * SD15.activation_bytes(4096, lora=LORA, checkpointing=False)
    assert peak.total == peak.weights + peak.work + CONTEXT_BYTES


def test_full_fine_tuning_keeps_a_frozen_copy_which_zero_does_not_shard() -> None:
    num = SD15.parameters
    assert trainer(lora=None).weights == num * (2 + 2 + 2 + 4 + 8)
    bucket = 2 * 5e8
    sharded = {stage: trainer(lora=None, zero_stage=stage, num_workers=4).weights - bucket for stage in (1, 2, 3)}
    assert sharded == {1: num * (2 + 2 + 2 + 12 / 4), 2: num * (2 + 2 + 14 / 4), 3: num * (2 + 16 / 4)}


def test_8_bit_moments_take_slightly_more_than_a_quarter() -> None:
    saved = trainer(lora=None).weights - trainer(lora=None, optimizer="adamw_8bit").weights
    assert saved / SD15.parameters == pytest.approx(8 - 2.04)


def test_fp32_has_no_masters_and_twice_the_activations() -> None:
    half, full = trainer(), trainer(storage=DenoiserStorage("float32"))
    assert full.work == 2 * half.work
    assert full.weights == 4 * SD15.parameters + SD15.lora_parameters(*LORA) * (4 + 4 + 8)


def test_quantization_applies_to_the_linear_layers_only() -> None:
    num, linear = SD15.parameters, SD15.linear_parameters
    for kind, size in (("nf4", 0.53), ("int8", 1.01)):
        stored = DenoiserStorage("bfloat16", kind).denoiser_bytes(SD15)
        assert stored == pytest.approx(linear * size + 2 * (num - linear))


def test_a_teacher_is_resident_and_runs_on_both_images_with_and_without_prompt() -> None:
    with_teacher = trainer(teacher=SD15)
    assert with_teacher.weights - trainer().weights == 2 * SD15.parameters
    assert with_teacher.work == trainer().work, "four forward passes without gradient need less than the policy's two"


def test_text_encoders_are_on_the_gpu_only_while_a_worker_loads() -> None:
    flux = published_footprint("flux_dev")
    small = COMMON | {"positions": 64, "pairs": 1, "lora": LORA, "checkpointing": True}
    at_once = trainer_peak(flux, BF16, **small)  # type: ignore[arg-type]
    offloaded = trainer_peak(flux, DenoiserStorage("bfloat16", offload=True), **small)  # type: ignore[arg-type]
    assert at_once.total == pytest.approx(2 * (flux.parameters + flux.text_parameters) + CONTEXT_BYTES)
    assert offloaded.work == 2 * flux.activation_bytes(64, lora=LORA, checkpointing=True)


def test_a_worker_that_validates_keeps_the_judges_and_works_as_a_generator_or_as_a_trainer() -> None:
    common = {"validated_images": 64, "passes": 2, "judges_bytes": 3_000, "with_vae": True}
    decoding = 64 * SD15.decode_bytes(4096)
    assert decoding > trainer().work
    resident, offloaded = (
        trainer(storage=DenoiserStorage("bfloat16", offload=offload), **common) for offload in (False, True)
    )
    assert resident.weights == trainer(with_vae=True).weights + 3_000
    assert (resident.work, offloaded.work) == (decoding, decoding + 2 * SD15.vae_parameters)
    assert trainer(**common | {"validated_images": 1}).work == trainer().work, "the larger of both, not their sum"


def test_offload_removes_text_encoders_and_vae_from_the_gpu_while_not_in_use() -> None:
    given = {"positions": 4096, "images": 4, "passes": 2}
    resident = generator_peak(SD15, BF16, **given)  # type: ignore[arg-type]
    offloaded = generator_peak(SD15, DenoiserStorage("bfloat16", offload=True), **given)  # type: ignore[arg-type]
    decoding = 4 * SD15.decode_bytes(4096)
    assert resident.weights == 2 * (SD15.parameters + SD15.text_parameters + SD15.vae_parameters)
    assert resident.work == decoding > 8 * SD15.inference_bytes(4096)
    assert offloaded.weights == 2 * SD15.parameters, "the denoiser stays"
    assert offloaded.work == 2 * SD15.vae_parameters + decoding


def test_memory_grows_with_the_batch_and_shrinks_with_each_saving_option() -> None:
    totals = [trainer(pairs=pairs).total for pairs in (1, 2, 8, 16)]
    assert totals == sorted(totals)
    assert trainer(checkpointing=True).total < trainer().total
    assert trainer(storage=DenoiserStorage("bfloat16", "nf4")).total < trainer().total
    whole = [trainer(lora=None, zero_stage=stage, num_workers=8).total for stage in range(1, 4)]
    assert whole == sorted(whole, reverse=True)


@pytest.mark.parametrize(
    ("setting", "peak", "gpu", "used"),
    [
        (True, 1.0, 100.0, True),
        (False, 200.0, 100.0, False),
        ("auto", 94.0, 100.0, False),
        ("auto", 96.0, 100.0, True),  # 95 % of the memory is usable
        ("auto", None, 100.0, True),
        ("auto", 200.0, None, False),
    ],
)
def test_checkpointing_is_used_if_set_or_if_the_gpu_is_too_small(
    setting: bool | str, peak: float | None, gpu: float | None, used: bool
) -> None:
    assert use_checkpointing(setting, peak, gpu) is used
