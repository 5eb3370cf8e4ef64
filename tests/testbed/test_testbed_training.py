"""Training scripts of the testbed and their parts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.testbed.__main__ import main
from benchmarks.testbed.contrasts import CONTRASTS, train_contrasts
from benchmarks.testbed.denoiser import BinnedError
from benchmarks.testbed.dual_encoder import contrastive_loss, fits
from benchmarks.testbed.measure import generate, load_pipeline
from benchmarks.testbed.pool import draw_pool
from benchmarks.testbed.tokenizer import WORDS, make_tokenizer
from cdpo_ray.testbed.clip import load_clip
from cdpo_ray.testbed.consistency import load_consistency_pipeline
from cdpo_ray.testbed.scenes import all_scenes, is_heldout, parse_caption

PROMPT = "a red circle on the left and a blue square on the right, on a white background"


def test_no_training_scene_is_held_out() -> None:
    pool = draw_pool(500, seed=0)
    assert not any(map(is_heldout, pool.scenes))
    rng = np.random.default_rng(0)
    assert not any(is_heldout(wrong) for scene in pool.scenes[:100] for wrong in train_contrasts(scene, 2, rng))


def test_equal_seeds_draw_equal_pools() -> None:
    assert torch.equal(draw_pool(20, seed=0).images, draw_pool(20, seed=0).images)
    assert not torch.equal(draw_pool(20, seed=0).images, draw_pool(20, seed=1).images)


def test_every_word_is_one_token() -> None:
    ids = make_tokenizer()(list(WORDS), add_special_tokens=False).input_ids
    assert all(len(word_ids) == 1 for word_ids in ids)
    assert len({word_ids[0] for word_ids in ids}) == len(WORDS)


@pytest.mark.parametrize("name", CONTRASTS)
def test_a_contrast_is_a_different_scene_of_the_same_size(name: str) -> None:
    rng = np.random.default_rng(0)
    for scene in list(all_scenes())[::50]:
        wrong = CONTRASTS[name](scene, rng)
        if wrong is not None:
            assert len(wrong.objects) == len(scene.objects)
            assert (frozenset(wrong.objects), wrong.background) != (frozenset(scene.objects), scene.background)


def test_a_caption_fits_every_scene_that_it_is_true_of() -> None:
    captions = [
        PROMPT,
        "a blue square on the right and a red circle on the left",
        "a red circle on the left and a blue square on the right, on a black background",
        "a blue square on the left and a red circle on the right",
    ]
    assert fits([parse_caption(PROMPT)], [parse_caption(text) for text in captions]).tolist() == [
        [True, True, False, False]
    ]


def test_other_true_captions_do_not_change_the_loss() -> None:
    logits = torch.tensor([[3.0, 9.0], [0.0, 3.0]])
    true = torch.tensor([[True, True], [False, True]])
    alone = contrastive_loss(torch.tensor([[3.0, -torch.inf], [0.0, 3.0]]), torch.eye(2, dtype=torch.bool))
    assert torch.equal(contrastive_loss(logits, true), alone)


def test_binned_errors_of_all_timesteps_converge_to_the_same_weight() -> None:
    torch.manual_seed(0)
    binned = BinnedError()
    for _ in range(3000):
        timesteps = torch.randint(1000, (32,))
        binned(torch.where(timesteps < 100, 0.3, 0.01), timesteps)
    low, high = binned(torch.tensor([0.3]), torch.tensor([50])), binned(torch.tensor([0.01]), torch.tensor([950]))
    assert float(low) == pytest.approx(1, abs=0.05)
    assert float(high) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(300)  # starts four processes, each of which loads torch and diffusers
def test_the_training_writes_loadable_weights_and_their_card(tmp_path: Path) -> None:
    few = ["--autoencoder-updates=2", "--dual-encoder-updates=2", "--denoiser-updates=2", "--consistency-updates=2"]
    small = ["--num-scenes=64", "--num-eval-prompts=2", "--num-eval-scenes=10"]
    main(["--out", str(tmp_path), *few, *small])
    assert "| denoiser | 0 | 2 | 128 |" in (tmp_path / "README.md").read_text()
    assert "| consistency | 0 | 2 | 128 |" in (tmp_path / "README.md").read_text()
    for model_dir in (tmp_path / "pipeline" / "vae", tmp_path / "consistency" / "unet"):
        assert str(tmp_path) not in (model_dir / "config.json").read_text()
    images = generate(load_pipeline(tmp_path / "pipeline"), [PROMPT], guidance_scale=1.0, seed=0)
    assert images.shape == (1, 3, 32, 32)
    distilled = load_consistency_pipeline(pipeline_dir=tmp_path / "pipeline", consistency_dir=tmp_path / "consistency")
    images = generate(distilled, [PROMPT], guidance_scale=3.0, seed=0, num_denoising_steps=2)
    assert images.shape == (1, 3, 32, 32)
    model, tokenizer, *_ = load_clip(tmp_path / "clip")
    assert model.encode_text(tokenizer([PROMPT])).shape == (1, 128)
