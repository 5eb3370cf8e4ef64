"""A prompt that raises inside the model is quarantined, up to a maximum fraction."""

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

from cdpo_ray.dataflow.parts import read_quarantined
from cdpo_ray.dataflow.quarantine import Quarantine, num_images_without_score
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


def generator(model: Path, quarantine: Quarantine | None) -> Generator:
    return Generator("stable_diffusion", {"path": str(model), "device": "cpu"}, SAMPLING, quarantine=quarantine)


def test_fault_07_prompts_that_raise_inside_the_model_are_quarantined_and_the_others_of_the_call_are_made(
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


def test_fault_07_a_call_whose_prompts_all_fail_gives_no_rows(no_z: Path, tmp_path: Path) -> None:
    made = generator(no_z, Quarantine(tmp_path, 4, 0.5))(table(["a zebra", "a lizard"]))
    assert made.num_rows == 0


def test_fault_07_too_many_failures_stop_the_step_and_name_the_first_reason(no_z: Path, tmp_path: Path) -> None:
    message = (
        "2 of 4 prompts cannot be made into images; `generation.max_bad_fraction` = 0.25 allows fewer; the first,"
        " 'a zebra': IndexError: index out of range in self; raise `generation.max_bad_fraction`, or fix the"
        " cause and delete "
    )
    with pytest.raises(GenerationError, match=re.escape(message)):
        generator(no_z, Quarantine(tmp_path, 4, 0.25))(table(PROMPTS))
    with pytest.raises(GenerationError, match=re.escape(message)):
        Quarantine(tmp_path, 4, 0.25).refuse_too_many()


def test_fault_07_a_step_whose_prompts_all_fail_stops(no_z: Path, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="1 of 1 prompts cannot be made into images"):
        generator(no_z, Quarantine(tmp_path, 1, 1.0))(table(["a zebra"]))


def test_our_own_errors_stop_the_run_and_quarantine_no_prompt(tmp_path: Path) -> None:
    def raises(rows: pa.Table) -> pa.Table:
        raise RewardError("reward `mine` raised KeyError")

    with pytest.raises(RewardError, match="mine"):
        Quarantine(tmp_path, 4, 1.0).apply(raises, table(PROMPTS))
    assert not list(tmp_path.iterdir())


def test_out_of_memory_quarantines_no_prompt(tmp_path: Path) -> None:
    def raises(rows: pa.Table) -> pa.Table:
        if rows.num_rows > 1 or rows["prompt"][0].as_py() == "a dog":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return rows

    quarantine = Quarantine(tmp_path, 4, 1.0)
    assert quarantine.apply(raises, table(["a cat", "a zebra"])).num_rows == 2
    with pytest.raises(ModelError, match=r"the device failed: RuntimeError: DefaultCPUAllocator.*the same command"):
        quarantine.apply(raises, table(["a cat", "a dog"]))
    assert not list(tmp_path.iterdir())


def let_overflow(part: torch.nn.Module, *images: int) -> None:
    """Make the module return non-finite values for some images of each batch."""

    def overflow(_: object, __: object, output: object) -> None:
        for image in images:
            (output[0] if isinstance(output, tuple) else output)[image, 0, 0, 0] = torch.inf  # type: ignore[index]

    part.register_forward_hook(overflow)


@pytest.mark.parametrize("of", ["unet", "vae"])
def test_fault_36_images_that_are_not_finite_have_no_score_and_are_named(
    tiny_sd15: Path, tmp_path: Path, of: str
) -> None:
    quarantine = Quarantine(tmp_path, 4, 0.5)
    make = Generator(
        "stable_diffusion",
        {"path": str(tiny_sd15), "device": "cpu"},
        replace(SAMPLING, max_masked_fraction=0.5),
        make_scores=functools.partial(Scorer, {"jpeg_size": {"quality": 90}}),
    )
    whole = make(table(PROMPTS))
    pipeline, make.quarantine = make.model.pipeline, quarantine
    let_overflow(pipeline.unet if of == "unet" else pipeline.vae.decoder, 0, 1, 5)
    found = make(table(PROMPTS))
    assert found["prompt"].to_pylist() == PROMPTS, "rows stay"
    bad = np.array([[True, True], [False, False], [False, True], [False, False]])
    for name in ("score_jpeg_size", "score_perturbation"):
        values, expected = np.array(found[name].to_pylist()), np.array(whole[name].to_pylist())
        np.testing.assert_array_equal(values, np.where(bad, np.nan, expected))
    black = found["pixels"].combine_chunks().to_numpy_ndarray().max(axis=(2, 3, 4)) == 0
    np.testing.assert_array_equal(black, bad)
    assert quarantine.refuse_too_many() == set(), "no prompt is regenerated or left out"
    entries = [json.loads(path.read_text()) for path in sorted((tmp_path / "set_aside").iterdir())]
    assert [(entry["prompt_index"], entry["images"]) for entry in entries] == [(0, [0, 1]), (2, [1])]
    assert entries[1]["reason"].startswith("images 1 of 2 are black: the model or its VAE returned non-finite")
    message = (
        "3 images have no score; `generation.max_bad_fraction` = 0.25 allows fewer; the first, 'a cat': images 0, 1 of"
        " 2 are black: "
    )
    with pytest.raises(GenerationError, match=re.escape(message)):
        Quarantine(tmp_path, 4, 0.25).refuse_too_many()
    make.quarantine = Quarantine(tmp_path, 4, 0.25)
    with pytest.raises(GenerationError, match=re.escape(message)):
        make(table(PROMPTS))


def test_fault_36_prompts_that_raise_and_images_that_are_black_are_counted_together(tmp_path: Path) -> None:
    def raises(rows: pa.Table) -> pa.Table:
        raise IndexError("out of range")

    quarantine = Quarantine(tmp_path, 4, 0.6)
    quarantine.apply(raises, table(["a zebra"]))
    quarantine.add_images(table(["a cat", "a dog"]), np.array([[True, False], [False, True]]), range(2), 2)
    assert quarantine.refuse_too_many() == {1}
    with pytest.raises(GenerationError, match="1 of 4 prompts cannot be made into images and 3 images have no score;"):
        quarantine.add_images(table(["a lizard"]), np.array([[[True], [False]]]), ["base 0", "tuned 0"], 2)


def test_black_images_of_two_pieces_of_a_prompt_are_all_counted_and_a_failed_prompt_once(tmp_path: Path) -> None:
    quarantine, names = Quarantine(tmp_path, 2, 0.75), {0: [True, False], 2: [False, True]}
    for start, black in names.items():
        rows = table(["a cat"]).append_column("image_start", pa.array([start]))
        rows = rows.append_column("image_stop", pa.array([start + 2]))
        quarantine.add_images(rows, np.array(black), range(start, start + 2), 4)
    entries = read_quarantined(tmp_path)
    assert [(entry["images"], entry["num_images"]) for entry in entries] == [([0], 4), ([3], 4)]
    assert entries[1]["reason"].startswith("images 3 of 4 are black")
    assert num_images_without_score(entries) == 2

    def raises(rows: pa.Table) -> pa.Table:
        raise IndexError(f"image {rows['image_start'][0]}")

    for start in (0, 2):
        rows = table(["a dog"]).append_column("image_start", pa.array([start]))
        quarantine.apply(raises, rows.append_column("image_stop", pa.array([start + 2])))
    assert quarantine.refuse_too_many() == {2}, "0.5 prompts by their images and 1 whole prompt, of 2"
