"""Polynomials are exact, and footprints survive serialisation."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpo_ray.cost.footprint import ATTENTION_TARGETS, Footprint, Polynomial
from cdpo_ray.cost.published import published_footprint

COEFFICIENTS = st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=4)


@given(COEFFICIENTS)
def test_interpolation_recovers_the_polynomial(coefficients: list[int]) -> None:
    places = range(1024, 1024 * (len(coefficients) + 1), 1024)
    points = {place: sum(c * Fraction(place) ** power for power, c in enumerate(coefficients)) for place in places}
    assert Polynomial.through(points).coefficients == tuple(coefficients)  # type: ignore[arg-type]


def test_a_quadratic_is_exact_at_a_size_that_was_not_counted() -> None:
    quadratic = Polynomial.through({n: 7 + 3 * n + 2 * n * n for n in (32**2, 64**2, 96**2)})
    assert quadratic(128**2) == 7 + 3 * 128**2 + 2 * 128**4


def test_a_footprint_survives_writing_and_reading() -> None:
    footprint = published_footprint("sdxl")
    assert Footprint.of(footprint.plain()) == footprint


def test_a_lora_of_sd15_has_the_published_number_of_parameters() -> None:
    """797,184 at rank 4 on attention: 3.2 MB, the size of diffusers' first published LoRAs."""
    assert published_footprint("sd15").lora_parameters(4, ("to_q", "to_k", "to_v", "to_out.0")) == 797_184


def test_a_lora_outside_attention_saves_the_activations_of_full_fine_tuning_and_of_its_factors() -> None:
    footprint = published_footprint("sd15")
    attention = footprint.activation_bytes(4096, lora=(8, ("to_q", "to_v")), checkpointing=False)
    wide = footprint.activation_bytes(4096, lora=(8, ("to_q", "conv1")), checkpointing=False)
    full = footprint.activation_bytes(4096, lora=None, checkpointing=False)
    assert attention < full < wide < 1.05 * full


def test_suffixes_of_names_match_at_dots() -> None:
    footprint = published_footprint("sd15")
    assert footprint.lora_parameters(8, ("out.0",)) == 0
    assert footprint.lora_parameters(8, ("to_out.0",)) == footprint.lora_parameters(
        8, ("attn1.to_out.0", "attn2.to_out.0")
    )


@pytest.mark.parametrize(
    "name",
    ["sd15", "sd21", "sdxl", "sd35_medium", "flux_dev", "lcm", "flux2_klein_4b", "z_image", "qwen_image", "sana_1600m"],
)
def test_a_footprint_grows_with_the_image_and_shrinks_with_checkpointing(name: str) -> None:
    footprint = published_footprint(name)
    lora = (8, ATTENTION_TARGETS)
    for small, large in ((32**2, 64**2), (64**2, 128**2)):
        for of in (footprint.forward_flops, footprint.backward_flops["full"], footprint.decode_flops):
            assert of(small) < of(large)
        for checkpointing in (False, True):
            assert footprint.activation_bytes(small, lora=lora, checkpointing=checkpointing) < (
                footprint.activation_bytes(large, lora=lora, checkpointing=checkpointing)
            )
        assert footprint.activation_bytes(large, lora=lora, checkpointing=True) < (
            0.5 * footprint.activation_bytes(large, lora=lora, checkpointing=False)
        )
        assert footprint.backward_flops["lora"](large) < footprint.backward_flops["full"](large)
