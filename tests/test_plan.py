"""A plan's numbers, counted by hand."""

import itertools
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from cdpo_ray.config import Config, load_config
from cdpo_ray.plan import make_plan
from cdpo_ray.prompts.sources import PromptSplit

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
PROMPTS = PromptSplit([f"t{i}" for i in range(6)], [f"h{i}" for i in range(4)], num_doubled=2, num_empty=1)


def config(*overrides: str) -> Config:
    return load_config(QUICKSTART, overrides)


def numbers(line: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]


def line_of(text: str, word: str) -> str:
    (line,) = [line for line in text.split("\n") if line.strip().startswith(word)]
    return line


@pytest.mark.parametrize(("num_ranks", "num_stages"), [(8, 4), (9, 5), (2, 1), (13, 7)])
def test_the_pairs_of_each_stage_are_those_that_one_can_count(num_ranks: int, num_stages: int) -> None:
    plan = str(
        make_plan(config(f"generation.images_per_prompt={num_ranks}", f"curriculum.num_stages={num_stages}"), PROMPTS)
    )
    for stage in range(1, num_stages + 1):
        low = Fraction((num_ranks - 1) * (num_stages - stage), num_stages)
        gaps = [rejected - chosen for chosen, rejected in itertools.combinations(range(num_ranks), 2)]
        admitted = [gap for gap in gaps if gap > low]
        expected = [stage, min(admitted), max(admitted), 6 * len(admitted), 50 * 16]
        assert numbers(line_of(plan, f"stage {stage} ")) == expected


def test_images_updates_and_launches_are_those_that_one_can_count() -> None:
    plan = str(make_plan(config("training.batch_size_per_worker=4", "training.beta=250"), PROMPTS))
    assert numbers(line_of(plan, "prompts")) == [6, 4, 2, 1]
    assert numbers(line_of(plan, "generation"))[:3] == [6 * 8, 8, 10]
    updates, batch, workers, launches, pairs, zero = numbers(line_of(plan, "training"))
    assert (updates, batch, workers, pairs, zero) == (4 * 50, 16, 2, 4, 0)
    assert workers * launches * pairs == batch
    assert numbers(line_of(plan, "evaluation")) == [2 * 4 * 4, 4]
    assert "kappa = beta/2 = 125 " in plan


def test_the_disk_is_what_the_models_latents_and_the_images_take(tiny_sd15: Path) -> None:
    plan = str(make_plan(config(f"model.path={tiny_sd15}", "model.dtype=bfloat16"), PROMPTS))
    latents, images = 48 * 4 * 8 * 8 * 2, 48 * 64 * 64 * 1.6
    assert (
        line_of(plan, "disk").split("disk")[1].strip()
        == f"latents {latents / 1000:.3g} KB, images up to {images / 1000:.3g} KB"
    )
    larger = f"model.path={tiny_sd15}", "generation.height=128", "generation.width=64", "generation.keep_images=false"
    plan = str(make_plan(config(*larger), PROMPTS))
    assert f"latents {48 * 4 * 16 * 8 * 4 / 1000:.3g} KB, images up to 0 B" in plan


@pytest.mark.parametrize(
    ("family", "channels", "side", "unit", "size"),
    [
        ("stable_diffusion_xl", 4, 8, "KB", 1e3),
        ("stable_diffusion_3", 16, 8, "KB", 1e3),
        ("flux", 16, 128, "MB", 1e6),
    ],
)
def test_every_familys_folder_tells_its_latents(
    tiny_folder: Callable[[str], Path], family: str, channels: int, side: int, unit: str, size: float
) -> None:
    plan = str(make_plan(config(f"model.family={family}", f"model.path={tiny_folder(family)}"), PROMPTS))
    latents, images = 48 * channels * side * side * 4, 48 * (8 * side) ** 2 * 1.6
    assert f"latents {latents / size:.3g} {unit}, images up to {images / size:.3g} {unit}" in plan


def test_a_hub_model_of_16_latent_channels_is_counted_so() -> None:
    hub = ("model.path=someone/some-model", "model.revision='0123456789abcdef0123456789abcdef01234567'")
    for family, channels in (("stable_diffusion_xl", 4), ("stable_diffusion_3", 16), ("flux", 16)):
        sized = (*hub, f"model.family={family}", "generation.height=1024", "generation.width=512")
        assert f"latents {48 * channels * 128 * 64 * 4 / 1e6:.3g} MB" in str(make_plan(config(*sized), PROMPTS))


def test_a_model_that_is_not_here_leaves_the_disk_open_until_its_size_is_given() -> None:
    hub = ("model.path=someone/some-model", "model.revision='0123456789abcdef0123456789abcdef01234567'")
    assert "known once the model is on this machine" in str(make_plan(config(*hub), PROMPTS))
    sized = (*hub, "generation.height=512", "generation.width=512")
    assert f"latents {48 * 4 * 64 * 64 * 4 / 1e6:.3g} MB" in str(make_plan(config(*sized), PROMPTS))
