"""An image is a function of (seed, prompt, index); rows match the schema in `records`."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.dataflow.columns import list_column, tensor_column
from cdpo_ray.dataflow.images import decode_png, encode_pixels
from cdpo_ray.dataflow.parts import IMAGES_PER_BATCH, images_of, whole_prompts
from cdpo_ray.generation.generator import Generator, Sampling, sample_batches
from cdpo_ray.generation.pool import calls_of
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.records import prompt_id
from cdpo_ray.rewards.scorer import SampleScorer, Scorer
from cdpo_ray.store import read_table, write_table

PROMPTS = ["a cat", "../../etc/passwd", "a 🦊"]
SAMPLING = Sampling(
    seed=3, images_per_prompt=2, num_denoising_steps=1, guidance_scale=1.0, height=None, width=None, images_per_batch=2
)
REWARDS = {"jpeg_size": {"quality": 80}, "test_generator:brightness": {}}


def brightness(images: Tensor, prompts: Sequence[str]) -> NDArray[Any]:
    return images.double().mean(dim=(1, 2, 3)).cpu().numpy() + np.array([len(prompt) for prompt in prompts])


def table(prompts: Sequence[str]) -> pa.Table:
    return pa.table(
        {
            "prompt_index": pa.array(range(len(prompts)), pa.int64()),
            "prompt_id": [prompt_id(prompt) for prompt in prompts],
            "prompt": list(prompts),
        }
    )


class Mirror:
    """A model whose latents are its noise."""

    compiled = False

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        return 2, 3, 4

    def sample(self, conditioning: dict[str, Tensor], noise: Tensor, **given: Any) -> Tensor:
        embeddings = conditioning["prompt_embedding"]
        assert len(embeddings) == len(noise)
        return noise + embeddings[:, :, :1, None] * 0 + embeddings[:, :1, :1, None]

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def embeddings_of(prompts: Sequence[str]) -> dict[str, Tensor]:
    return {"prompt_embedding": torch.arange(len(prompts)).float()[:, None, None] * 1000}


def mirrored(prompts: Sequence[str], sampling: Sampling) -> tuple[list[str], Tensor]:
    batches = list(sample_batches(Mirror(), prompts, embeddings_of(prompts), sampling))  # type: ignore[arg-type]
    assert {len(batch.prompts) for batch in batches[:-1]} <= {sampling.images_per_batch}
    return [prompt for batch in batches for prompt in batch.prompts], torch.cat([batch.latents for batch in batches])


@pytest.mark.parametrize("images_per_batch", [1, 2, 4, 5, 100])
def test_noise_of_an_image_does_not_depend_on_the_batch(images_per_batch: int) -> None:
    sampling = replace(SAMPLING, images_per_prompt=5, images_per_batch=images_per_batch)
    named, latents = mirrored(PROMPTS, sampling)
    assert named == [prompt for prompt in PROMPTS for _ in range(5)]
    for place, values in enumerate(latents):
        row, index = divmod(place, 5)
        noise = noise_at((2, 3, 4), 3, "image", PROMPTS[row], index)
        assert torch.equal(values, noise + row * 1000)  # and its own prompt's embedding


class CompiledMirror(Mirror):
    compiled = True

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def sample(self, conditioning: dict[str, Tensor], noise: Tensor, **given: Any) -> Tensor:
        self.batch_sizes.append(len(noise))
        return super().sample(conditioning, noise, **given)


@pytest.mark.parametrize("images_per_batch", [1, 2, 4, 5, 100])
def test_a_compiled_model_sees_one_batch_size_and_padding_is_dropped(images_per_batch: int) -> None:
    sampling = replace(SAMPLING, images_per_prompt=5, images_per_batch=images_per_batch)
    named, latents = mirrored(PROMPTS, sampling)
    model, judge = CompiledMirror(), lambda images, prompts: {"number": np.full(len(images), len(prompts))}
    batches = list(sample_batches(model, PROMPTS, embeddings_of(PROMPTS), sampling, judge))  # type: ignore[arg-type]
    assert [prompt for batch in batches for prompt in batch.prompts] == named
    for made in ([batch.latents for batch in batches], [batch.images for batch in batches]):
        assert torch.equal(torch.cat(made), latents)
    assert [list(batch.scores["number"]) for batch in batches] == [
        [len(batch.prompts)] * len(batch.prompts) for batch in batches
    ]
    assert set(model.batch_sizes) == {sampling.images_per_launch(images_per_batch)}


def test_noise_of_an_image_depends_on_the_seed_the_prompt_and_the_index() -> None:
    _, first = mirrored(PROMPTS, SAMPLING)
    _, other = mirrored(PROMPTS, replace(SAMPLING, seed=4))
    everything = torch.cat([first, other]).flatten(1) % 1000
    assert len(torch.unique(everything, dim=0)) == len(everything)


@pytest.fixture(scope="module")
def generator(tiny_sd15: Path) -> Generator:
    return Generator(
        "stable_diffusion",
        {"path": str(tiny_sd15), "device": "cpu"},
        SAMPLING,
        make_scores=functools.partial(Scorer, REWARDS),
    )


@pytest.fixture(scope="module")
def made(generator: Generator) -> pa.Table:
    return generator(table(PROMPTS))


@pytest.fixture(scope="module")
def rows(made: pa.Table) -> pa.Table:
    """Rows as they are written to disk."""
    return encode_pixels(made)


def test_an_images_latents_and_png_do_not_depend_on_other_rows(generator: Generator, rows: pa.Table) -> None:
    for prompts in (PROMPTS[::-1], PROMPTS[1:2]):
        again = encode_pixels(generator(table(prompts)))
        for row, prompt in enumerate(prompts):
            for column in ("latents", "images", "score_jpeg_size"):
                assert again[column][row].as_py() == rows[column][PROMPTS.index(prompt)].as_py(), column


def test_another_seed_makes_other_images(generator: Generator, rows: pa.Table) -> None:
    generator.sampling = replace(SAMPLING, seed=4)
    try:
        other = generator(table(PROMPTS[:1]))
    finally:
        generator.sampling = SAMPLING
    assert not np.allclose(other["latents"][0].as_py(), rows["latents"][0].as_py())


def test_the_images_of_a_prompt_differ(rows: pa.Table) -> None:
    for pngs in rows["images"].to_pylist():
        assert len(set(pngs)) == 2


def test_latents_are_sampled_from_the_addressed_noise(generator: Generator, rows: pa.Table) -> None:
    model = generator.model
    conditioning, _ = model.encode_prompts([PROMPTS[2]] * 2)
    noise = torch.stack([noise_at((4, 8, 8), 3, "image", PROMPTS[2], index) for index in range(2)])
    latents = model.sample(conditioning, noise, num_denoising_steps=1, guidance_scale=1.0)
    stored = rows["latents"].combine_chunks().to_numpy_ndarray()[2]
    np.testing.assert_allclose(stored, latents.numpy(), rtol=1e-5, atol=1e-5)


def test_the_png_is_the_decoded_latents(generator: Generator, made: pa.Table, rows: pa.Table) -> None:
    latents = rows["latents"].combine_chunks().to_numpy_ndarray()
    pixels = made["pixels"].combine_chunks().to_numpy_ndarray()
    for row in range(len(PROMPTS)):
        decoded = generator.model.decode(torch.from_numpy(latents[row].copy())).numpy()
        assert np.array_equal(pixels[row], decoded)
        assert np.array_equal(np.stack([decode_png(png) for png in rows["images"][row].as_py()]), decoded)


def test_fused_scores_equal_those_of_the_pngs(rows: pa.Table) -> None:
    for name, options in REWARDS.items():
        scorer = Scorer({name: options})
        for row, prompt in enumerate(PROMPTS):
            images = torch.from_numpy(np.stack([decode_png(png) for png in rows["images"][row].as_py()]))
            later = scorer(images, [prompt] * 2)[name]
            assert rows[f"score_{name}"][row].as_py() == later.tolist()


@pytest.mark.parametrize("kept", ["images", "latents"])
@pytest.mark.parametrize("images_per_batch", [1, 3, 100])
def test_rescoring_pngs_or_latents_gives_the_fused_scores(
    rows: pa.Table, tiny_sd15: Path, kept: str, images_per_batch: int
) -> None:
    plain = rows.select(["prompt_index", "prompt", kept])
    plain = pa.concat_tables([plain.slice(0, 1), plain.slice(1)])
    model = {"path": str(tiny_sd15), "device": "cpu"}
    scored = SampleScorer("stable_diffusion", model, REWARDS, images_per_batch)(plain)
    assert scored.column_names == ["prompt_index", "prompt", *(f"score_{name}" for name in REWARDS)]
    for name in REWARDS:
        found, fused = (np.array(table[f"score_{name}"].to_pylist()) for table in (scored, rows))
        # decoded one by one instead of two together, a pixel may round to the next level
        np.testing.assert_allclose(found, fused, rtol=0, atol=0.02 if (kept, images_per_batch) == ("latents", 1) else 0)


def test_images_whose_pixels_exceed_a_row_of_a_table_are_scored_from_their_pngs(
    rows: pa.Table, tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdpo_ray.dataflow.columns.MAX_ROW_VALUES", 2 * 3 * 64 * 64)  # as 500 images of 1328 px would
    plain = rows.select(["prompt_index", "prompt", "images"])
    scored = SampleScorer("stable_diffusion", {"path": str(tiny_sd15)}, REWARDS, 100)(plain)
    assert all(scored[f"score_{name}"].equals(rows[f"score_{name}"]) for name in REWARDS)


def test_columns_match_the_schema_and_parquet_keeps_their_shape(rows: pa.Table, tmp_path: Path) -> None:
    kept = rows.drop_columns(["images_per_batch"])
    write_table(kept, tmp_path / "samples.parquet")
    back = read_table(tmp_path / "samples.parquet")
    assert {name: str(back.schema.field(name).type) for name in back.column_names} == {
        "prompt_index": "int64",
        "prompt_id": "string",
        "prompt": "string",
        "latents": "extension<arrow.fixed_shape_tensor[value_type=float, shape=[2,4,8,8]]>",
        "prompt_embedding": "extension<arrow.fixed_shape_tensor[value_type=float, shape=[77,32]]>",
        "num_tokens_cut": "int64",
        "images": "list<element: binary>",
        "score_jpeg_size": "list<element: double>",
        "score_test_generator:brightness": "list<element: double>",
    }
    assert back.equals(kept)
    assert back["prompt"].to_pylist() == PROMPTS


def test_the_stored_embedding_is_the_prompts(generator: Generator, rows: pa.Table) -> None:
    embeddings = generator.model.encode_prompts(PROMPTS)[0]["prompt_embedding"]
    assert np.array_equal(rows["prompt_embedding"].combine_chunks().to_numpy_ndarray(), embeddings.numpy())


def test_images_and_scores_are_omitted_by_default(generator: Generator) -> None:
    generator.keep_pixels, scores, generator.scores = False, generator.scores, None
    try:
        found = generator(table(["a" * 80]))
    finally:
        generator.keep_pixels, generator.scores = True, scores
    assert found.column_names[3:] == ["latents", "prompt_embedding", "num_tokens_cut", "images_per_batch"]
    assert found["num_tokens_cut"].to_pylist() == [5]


def test_a_tensor_column_groups_the_samples_of_a_row_in_order() -> None:
    values = np.arange(24, dtype=np.float32).reshape(6, 2, 2)
    assert np.array_equal(tensor_column(values, 3).to_numpy_ndarray(), values.reshape(2, 3, 2, 2))
    assert np.array_equal(tensor_column(values[:, ::-1]).to_numpy_ndarray(), values[:, ::-1])


def test_a_list_column_groups_the_samples_of_a_row_in_order() -> None:
    assert list_column([b"a", b"b", b"c", b"d"], 2, pa.binary()).to_pylist() == [[b"a", b"b"], [b"c", b"d"]]


def test_pieces_of_prompts_hold_the_images_of_whole_prompts_byte_by_byte(tiny_sd15: Path) -> None:
    sampling = replace(SAMPLING, images_per_prompt=4, max_masked_fraction=0.5)
    generate = Generator("stable_diffusion", {"path": str(tiny_sd15), "device": "cpu"}, sampling)
    prompts = table(PROMPTS).slice(1)
    whole = encode_pixels(generate(prompts)).drop_columns(IMAGES_PER_BATCH)
    calls = calls_of(PROMPTS, sampling, {}, {0})
    assert [(call["prompt_index"][0].as_py(), images_of(call)) for call in calls] == [
        (prompt, piece) for prompt in (1, 2) for piece in (range(2), range(2, 4))
    ]
    pieces = [encode_pixels(generate(call)).drop_columns(IMAGES_PER_BATCH) for call in calls]
    assert whole_prompts(pieces, 4) == whole
