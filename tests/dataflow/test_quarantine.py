"""A prompt that raises inside the model costs itself alone, until there are too many."""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_models import poisoned

from cdpo_ray.dataflow.quarantine import Quarantine
from cdpo_ray.errors import GenerationError, ModelError, RewardError
from cdpo_ray.generation.generator import Generator, Sampling
from cdpo_ray.records import prompt_id
from cdpo_ray.rewards.scorer import Scorer

SAMPLING = Sampling(
    seed=3, images_per_prompt=2, num_denoising_steps=1, guidance_scale=1.0, height=None, width=None, images_per_batch=8
)
PROMPTS = ["a cat", "a zebra", "a dog", "a lizard"]


def table(prompts: list[str]) -> pa.Table:
    ids, indices = [prompt_id(prompt) for prompt in prompts], [PROMPTS.index(prompt) for prompt in prompts]
    return pa.table({"prompt_index": pa.array(indices, pa.int64()), "prompt_id": ids, "prompt": prompts})


@pytest.fixture(scope="module")
def no_z(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poisoned(tiny_sd15, tmp_path_factory.mktemp("poisoned") / "no_z", letter="z")


def generator(model: Path, set_aside: Quarantine | None) -> Generator:
    return Generator("stable_diffusion", {"path": str(model), "device": "cpu"}, SAMPLING, set_aside=set_aside)


def test_fault_07_prompts_that_raise_inside_the_model_are_set_aside_and_the_others_of_the_call_are_made(
    no_z: Path, tmp_path: Path
) -> None:
    made = generator(no_z, Quarantine(tmp_path, 4, 0.5))(table(PROMPTS))
    assert made["prompt"].to_pylist() == ["a cat", "a dog"]
    alone = generator(no_z, None)(table(["a dog"]))
    assert made.slice(1).equals(alone)
    lines = [path.read_text() for path in sorted((tmp_path / "set_aside").iterdir())]
    entries = [json.loads(line) for line in lines]
    assert [(entry["prompt_index"], entry["prompt"]) for entry in entries] == [(1, "a zebra"), (3, "a lizard")]
    assert all(entry["reason"].startswith("IndexError: index out of range") for entry in entries)
    assert Quarantine(tmp_path, 4, 0.5).refuse_too_many() == {1, 3}, "a later attempt finds them"


def test_fault_07_a_call_of_which_nothing_is_left_gives_no_row(no_z: Path, tmp_path: Path) -> None:
    made = generator(no_z, Quarantine(tmp_path, 4, 0.5))(table(["a zebra", "a lizard"]))
    assert made.num_rows == 0


def test_fault_07_one_too_many_stops_at_once_and_names_the_first_reason(no_z: Path, tmp_path: Path) -> None:
    told = (
        "2 of 4 prompts cannot be made into images; `generation.max_bad_fraction` = 0.25 allows fewer; the first,"
        " 'a zebra': IndexError: index out of range in self; raise `generation.max_bad_fraction`, or fix the"
        " cause and delete "
    )
    with pytest.raises(GenerationError, match=re.escape(told)):
        generator(no_z, Quarantine(tmp_path, 4, 0.25))(table(PROMPTS))
    with pytest.raises(GenerationError, match=re.escape(told)):
        Quarantine(tmp_path, 4, 0.25).refuse_too_many()


def test_fault_07_of_prompts_that_all_raise_nothing_is_left_to_go_on_with(no_z: Path, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="1 of 1 prompts cannot be made into images"):
        generator(no_z, Quarantine(tmp_path, 1, 1.0))(table(["a zebra"]))


def test_errors_of_ours_stop_the_run_and_set_no_prompt_aside(tmp_path: Path) -> None:
    def raises(rows: pa.Table) -> pa.Table:
        raise RewardError("reward `mine` raised KeyError")

    with pytest.raises(RewardError, match="mine"):
        Quarantine(tmp_path, 4, 1.0).apply(raises, table(PROMPTS))
    assert not list(tmp_path.iterdir())


def test_a_full_memory_blames_no_prompt(tmp_path: Path) -> None:
    def raises(rows: pa.Table) -> pa.Table:
        if rows.num_rows > 1 or rows["prompt"][0].as_py() == "a dog":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return rows

    set_aside = Quarantine(tmp_path, 4, 1.0)
    assert set_aside.apply(raises, table(["a cat", "a zebra"])).num_rows == 2
    with pytest.raises(ModelError, match=r"the device failed: RuntimeError: DefaultCPUAllocator.*the same command"):
        set_aside.apply(raises, table(["a cat", "a dog"]))
    assert not list(tmp_path.iterdir())


def let_overflow(part: torch.nn.Module, *images: int) -> None:
    """The part gives values that are not finite for some images of each batch."""

    def overflow(_: object, __: object, output: object) -> None:
        for image in images:
            (output[0] if isinstance(output, tuple) else output)[image, 0, 0, 0] = torch.inf  # type: ignore[index]

    part.register_forward_hook(overflow)


@pytest.mark.parametrize("of", ["unet", "vae"])
def test_fault_36_images_that_are_not_finite_have_no_score_and_are_named(
    tiny_sd15: Path, tmp_path: Path, of: str
) -> None:
    set_aside = Quarantine(tmp_path, 4, 0.5)
    make = Generator(
        "stable_diffusion",
        {"path": str(tiny_sd15), "device": "cpu"},
        replace(SAMPLING, max_masked_fraction=0.5),
        make_scores=functools.partial(Scorer, {"jpeg_size": {"quality": 90}}),
    )
    whole = make(table(PROMPTS))
    pipeline, make.set_aside = make.model.pipeline, set_aside
    let_overflow(pipeline.unet if of == "unet" else pipeline.vae.decoder, 0, 1, 5)
    found = make(table(PROMPTS))
    assert found["prompt"].to_pylist() == PROMPTS, "rows stay"
    bad = np.array([[True, True], [False, False], [False, True], [False, False]])
    for name in ("score_jpeg_size", "score_perturbation"):
        values, expected = np.array(found[name].to_pylist()), np.array(whole[name].to_pylist())
        np.testing.assert_array_equal(values, np.where(bad, np.nan, expected))
    black = found["pixels"].combine_chunks().to_numpy_ndarray().max(axis=(2, 3, 4)) == 0
    np.testing.assert_array_equal(black, bad)
    assert set_aside.refuse_too_many() == set(), "no prompt is made again or left out"
    entries = [json.loads(path.read_text()) for path in sorted((tmp_path / "set_aside").iterdir())]
    assert [(entry["prompt_index"], entry["images"]) for entry in entries] == [(0, [0, 1]), (2, [1])]
    assert entries[1]["reason"].startswith("images 1 of 2 are black: the model or its VAE returned non-finite")
    told = (
        "3 images have no score; `generation.max_bad_fraction` = 0.25 allows fewer; the first, 'a cat': images 0, 1 of"
        " 2 are black: "
    )
    with pytest.raises(GenerationError, match=re.escape(told)):
        Quarantine(tmp_path, 4, 0.25).refuse_too_many()
    make.set_aside = Quarantine(tmp_path, 4, 0.25)
    with pytest.raises(GenerationError, match=re.escape(told)):
        make(table(PROMPTS))


def test_fault_36_prompts_that_raise_and_images_that_are_black_are_counted_together(tmp_path: Path) -> None:
    def raises(rows: pa.Table) -> pa.Table:
        raise IndexError("out of range")

    set_aside = Quarantine(tmp_path, 4, 0.6)
    set_aside.apply(raises, table(["a zebra"]))
    set_aside.add_images(table(["a cat", "a dog"]), np.array([[True, False], [False, True]]), range(2))
    assert set_aside.refuse_too_many() == {1}
    with pytest.raises(GenerationError, match="1 of 4 prompts cannot be made into images and 3 images have no score;"):
        set_aside.add_images(table(["a lizard"]), np.array([[[True], [False]]]), ["base 0", "tuned 0"])
