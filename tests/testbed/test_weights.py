"""The weights in the repository load with stock libraries and reach their figures."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from benchmarks.testbed.measure import (
    generate,
    heldout_renders,
    load_pipeline,
    measure_autoencoder,
    measure_clip,
)
from cdpo_ray.testbed import CLIP_DIR, PIPELINE_DIR
from cdpo_ray.testbed.clip import load_clip
from cdpo_ray.testbed.oracle import judge
from cdpo_ray.testbed.scenes import all_scenes, caption, scene_prompts

MAX_WEIGHTS_BYTES = 24_000_000


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return load_pipeline(PIPELINE_DIR)


def test_the_paths_are_available_without_torch() -> None:
    code = "import sys, cdpo_ray.testbed; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_weights_are_small_and_have_a_card() -> None:
    files = [path for path in PIPELINE_DIR.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_WEIGHTS_BYTES
    assert PIPELINE_DIR.parent / "README.md" in files


def test_no_file_of_the_weights_holds_an_absolute_path() -> None:
    configs = [*PIPELINE_DIR.parent.rglob("*config.json"), PIPELINE_DIR / "model_index.json"]
    assert len(configs) == 9
    for path in configs:
        assert '"/' not in path.read_text(), path


def test_the_pipeline_has_the_layer_names_that_adapters_target(pipeline: StableDiffusionPipeline) -> None:
    names = {
        name.split(".attn1.")[1].removesuffix(".weight") for name in pipeline.unet.state_dict() if ".attn1." in name
    }
    assert {"to_q", "to_k", "to_v", "to_out.0"} <= names


def test_the_schedule_is_stable_diffusions(pipeline: StableDiffusionPipeline) -> None:
    config = pipeline.scheduler.config
    assert (config.beta_schedule, config.beta_start, config.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert (config.prediction_type, config.steps_offset, config.num_train_timesteps) == ("epsilon", 1, 1000)
    assert not config.clip_sample and not config.set_alpha_to_one


def test_both_tokenizers_give_every_caption_the_same_ids(pipeline: StableDiffusionPipeline) -> None:
    captions = [caption(scene) for scene in all_scenes()]
    _, clip_tokenizer, *_ = load_clip()
    ours = pipeline.tokenizer(captions).input_ids
    theirs = [[token for token in row if token] for row in clip_tokenizer(captions).tolist()]
    assert ours == theirs
    assert max(map(len, ours)) <= pipeline.tokenizer.model_max_length


def test_latents_have_unit_deviation_and_decode_to_the_original(pipeline: StableDiffusionPipeline) -> None:
    scenes, images = heldout_renders(200, seed=1)
    pixels = torch.from_numpy(images).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert latents.shape == (200, 4, 8, 8)
    assert float(latents.std()) == pytest.approx(1, abs=0.1)
    figures = measure_autoencoder(pipeline.vae, scenes, images)
    assert figures["psnr_db"] > 29
    assert figures["reconstructions_strict"] > 0.9


def test_the_pipeline_is_good_but_not_perfect_on_heldout_prompts(pipeline: StableDiffusionPipeline) -> None:
    prompts = scene_prompts("heldout", 64, seed=0)
    attr = judge(generate(pipeline, prompts, guidance_scale=1.0, seed=0), prompts)["attr"].mean()
    assert 0.4 < attr < 0.9


def test_clip_prefers_the_true_caption_of_heldout_renders() -> None:
    scenes, images = heldout_renders(300, seed=1)
    shares = measure_clip(CLIP_DIR, scenes, images, seed=1)
    assert shares["colour"] >= 0.9
    assert np.mean(list(shares.values())) >= 0.8
