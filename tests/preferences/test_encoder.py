"""Imported images are encoded once, as in diffusers, and the stored posterior decodes to them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import AutoencoderKL
from preference_sets import judged_scenes

from cdpo_ray.dataflow.columns import list_column, tensor_column
from cdpo_ray.dataflow.images import decode_png, encode_pixels
from cdpo_ray.dataflow.parts import QUARANTINE, join_quarantined
from cdpo_ray.models import load_model
from cdpo_ray.preferences.encoder import Encoder
from cdpo_ray.preferences.rows import Fault
from cdpo_ray.store import make_folder

NUM_ROWS = 5


def rows_with_pixels() -> pa.Table:
    judged = list(judged_scenes(NUM_ROWS))
    return pa.table(
        {
            "prompt_index": pa.array(range(NUM_ROWS), pa.int64()),
            "prompt": [one.prompt for one in judged],
            "label": list_column(np.tile([1.0, 0.0], NUM_ROWS), 2, pa.float64()),
            "pixels": tensor_column(np.stack([[one.right, one.wrong] for one in judged])),
        }
    )


def encoder(path: Path, **options: object) -> Encoder:
    arguments = {"images_per_batch": 4, "make_scores": None, "keep_images": True, "quarantine_dir": path}
    arguments |= {"row_at": lambda index: ("judged.jsonl", index + 1)} | options
    return Encoder("stable_diffusion", {"path": str(path)}, **arguments)  # type: ignore[arg-type]


def test_mean_and_standard_deviation_equal_the_autoencoders_posterior(embedded: Path) -> None:
    rows = rows_with_pixels()
    encoded = encoder(embedded)(rows)
    vae = AutoencoderKL.from_pretrained(embedded, subfolder="vae")
    images = torch.from_numpy(rows["pixels"].combine_chunks().to_numpy_ndarray().copy()).flatten(0, 1)
    with torch.no_grad():
        moments = vae.quant_conv(vae.encoder(images.float() / 127.5 - 1))
    mean, logvar = moments.chunk(2, dim=1)
    for name, expected in (("latents", mean), ("latents_std", torch.exp(logvar / 2))):
        found = torch.from_numpy(encoded[name].combine_chunks().to_numpy_ndarray().copy()).flatten(0, 1)
        torch.testing.assert_close(found, expected * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)


def test_stored_latents_decode_to_the_image(embedded: Path) -> None:
    rows = rows_with_pixels()
    encoded = encoder(embedded)(rows)
    model = load_model("stable_diffusion", path=str(embedded))
    latents = torch.from_numpy(encoded["latents"].combine_chunks().to_numpy_ndarray().copy()).flatten(0, 1)
    images = rows["pixels"].combine_chunks().to_numpy_ndarray().reshape(-1, 3, 32, 32) / 255
    error = np.mean((model.decode(latents).numpy() / 255 - images) ** 2)
    assert -10 * np.log10(error) > 30  # dB; another scaling or order of images gives less than 15


@pytest.mark.parametrize("family", ["stable_diffusion_3", "flux", "z_image"])
def test_decoding_inverts_the_shift_of_a_latent_space(tiny_models: object, family: str) -> None:
    model = load_model(family, path=str(tiny_models(family)), device="cpu")  # type: ignore[operator]
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean, _ = model.encode(images)
    vae = model.pipeline.vae
    assert vae.config.shift_factor
    with torch.no_grad():
        plain = vae.decode(vae.encode(images.float() / 127.5 - 1).latent_dist.mean).sample
    expected = ((plain / 2 + 0.5).clamp(0, 1) * 255).round()
    torch.testing.assert_close(model.decode(mean).float(), expected, rtol=0, atol=1)


def test_scores_and_images_are_those_of_the_input_pixels_not_the_decoded_ones(embedded: Path) -> None:
    rows = rows_with_pixels()

    class Brightness:
        def __call__(self, images: torch.Tensor, prompts: list[str]) -> dict[str, np.ndarray]:
            assert len(images) == len(prompts) <= 4
            return {"brightness": images.double().mean((1, 2, 3)).numpy() + [len(prompt) for prompt in prompts]}

    encoded = encoder(embedded, make_scores=Brightness)(rows)
    pixels = rows["pixels"].combine_chunks().to_numpy_ndarray()
    lengths = np.array([len(prompt) for prompt in rows["prompt"].to_pylist()])[:, None]
    np.testing.assert_allclose(encoded["score_brightness"].to_pylist(), pixels.mean((2, 3, 4)) + lengths)
    kept = [[decode_png(png) for png in pngs] for pngs in encode_pixels(encoded)["images"].to_pylist()]
    np.testing.assert_array_equal(kept, pixels)
    assert "pixels" not in encoder(embedded, keep_images=False)(rows).column_names


def test_fault_36_images_with_non_finite_latents_are_quarantined_by_name(embedded: Path, tmp_path: Path) -> None:
    pixels = np.stack([[one.right, one.wrong, one.wrong] for one in judged_scenes(3)])
    labels = np.array([[2.0, 1, 0]] * 3)
    labels[2, 2] = np.nan  # padding of a row of two images
    rows = pa.table({"prompt_index": pa.array([4, 5, 6], pa.int64()), "prompt": ["a", "b", "c"]})
    for name in ("score_label", "score_preference"):
        rows = rows.append_column(name, list_column(labels.ravel(), 3, pa.float64()))
    rows = rows.append_column("pixels", tensor_column(pixels))
    encode = encoder(embedded, images_per_batch=100, quarantine_dir=tmp_path / QUARANTINE)
    make_folder(tmp_path / QUARANTINE)
    whole = encode(rows)

    def overflow(_: object, __: object, moments: torch.Tensor) -> None:
        moments[1, 0, 0, 0] = torch.inf
        moments[7] = torch.nan

    encode.model.pipeline.vae.encoder.register_forward_hook(overflow)
    encoded = encode(rows)
    assert encoded["prompt"].to_pylist() == ["a", "b"], "the third has one image left"
    assert encoded.slice(1).equals(whole.slice(1, 1))
    for name in ("score_label", "score_preference"):
        np.testing.assert_array_equal(encoded[name].to_pylist(), [[2, np.nan, 0], [2, 1, 0]])
    assert [str(Fault(**entry)) for entry in join_quarantined(tmp_path)] == [
        "judged.jsonl:5: image 1: latents are not finite; try another `model.dtype`",
        "judged.jsonl:7: image 1: latents are not finite; try another `model.dtype`",
    ]
