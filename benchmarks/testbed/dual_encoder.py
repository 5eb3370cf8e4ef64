"""Scenes and captions -> a dual encoder in open_clip's format."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from benchmarks.testbed.contrasts import train_contrasts
from benchmarks.testbed.figures import save_figures
from benchmarks.testbed.pool import cosine_schedule, draw_pool
from benchmarks.testbed.tokenizer import CONTEXT_LENGTH, save_bpe
from cdpo_ray.testbed.clip import to_pixels
from cdpo_ray.testbed.scenes import BACKGROUNDS, Scene, caption

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
BATCH_SIZE = 48
NUM_CONTRASTS = 2  # wrong captions for each image
IMAGE_SIZE = 32
HALVES = (0.5, 0.5, 0.5)  # mean and deviation of each channel: pixels in [-1, 1]
PIXEL_NOISE = 0.05  # standard deviation in [-1, 1]: judged images are decoded, not rendered
MAX_LOGIT_SCALE = 100.0


def model_config(vocab_size: int) -> dict[str, Any]:
    """Model configuration of open_clip: a small ModifiedResNet and a two-layer text transformer."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 14},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "width": 128,
            "heads": 4,
            "layers": 2,
        },
    }


def fits(images: list[Scene], captions: list[Scene]) -> Tensor:
    """``[image, caption]`` bool: whether a caption is true of an image."""
    names: dict[frozenset[Any], int] = {}
    of_images = torch.tensor([names.setdefault(frozenset(scene.objects), len(names)) for scene in images])
    of_captions = torch.tensor([names.setdefault(frozenset(scene.objects), len(names)) for scene in captions])
    grounds = torch.tensor([BACKGROUNDS.index(scene.background) for scene in images])
    wanted = torch.tensor([BACKGROUNDS.index(s.background) if s.background_named else -1 for s in captions])
    same_ground = (wanted[None] < 0) | (wanted[None] == grounds[:, None])
    return (of_images[:, None] == of_captions[None]) & same_ground


def contrastive_loss(logits: Tensor, true: Tensor) -> Tensor:
    """Cross-entropy of both directions; true captions other than an image's own are excluded.

    Args:
        logits: ``[image, caption]``; the first captions are the images' own, in order, the others are wrong.
        true: ``[image, caption]`` bool, see ``fits``.
    """
    own = torch.arange(len(logits))
    others_true = true.clone()
    others_true[own, own] = False
    logits = logits.masked_fill(others_true, -torch.inf)
    return (cross_entropy(logits, own) + cross_entropy(logits[:, : len(own)].T, own)) / 2


def train_dual_encoder(weights_dir: Path, *, num_updates: int, num_scenes: int, seed: int) -> None:
    """Train and save to ``clip``, with wrong captions in addition to each image's own."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 1)  # the pool is drawn with the seed itself
    start = time.perf_counter()
    clip_dir = weights_dir / "clip"
    clip_dir.mkdir(parents=True, exist_ok=True)
    save_bpe(clip_dir / "bpe.txt.gz")
    tokenizer = SimpleTokenizer(str(clip_dir / "bpe.txt.gz"), context_length=CONTEXT_LENGTH)
    config = model_config(tokenizer.vocab_size)
    model = CLIP(**config).train().to(memory_format=torch.channels_last)
    pool = draw_pool(num_scenes, seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = cosine_schedule(optimizer, num_updates, num_warmup_updates=100)
    progress = tqdm(range(num_updates), desc="dual encoder", mininterval=5)
    for update in progress:
        index = torch.randint(num_scenes, (BATCH_SIZE,))
        scenes = [pool.scenes[i] for i in index]
        captioned = scenes + [wrong for scene in scenes for wrong in train_contrasts(scene, NUM_CONTRASTS, rng)]
        pixels = to_pixels(pool.images[index], HALVES, HALVES, IMAGE_SIZE).contiguous(memory_format=torch.channels_last)
        image_features = model.encode_image(pixels + PIXEL_NOISE * torch.randn_like(pixels), normalize=True)
        text_features = model.encode_text(tokenizer([caption(scene) for scene in captioned]), normalize=True)
        logits = model.logit_scale.exp() * image_features @ text_features.T
        loss = contrastive_loss(logits, fits(scenes, captioned))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(MAX_LOGIT_SCALE)))
        if update % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    save_clip(model, config, clip_dir)
    figures = {"seed": seed, "num_updates": num_updates, "images_seen": num_updates * BATCH_SIZE}
    save_figures(weights_dir, "dual_encoder", {**figures, "train_seconds": time.perf_counter() - start})


def save_clip(model: CLIP, config: dict[str, Any], clip_dir: Path) -> None:
    """Write weights and config as open_clip's ``local-dir:`` reads them; the weights in fp16."""
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    save_file(weights, clip_dir / "open_clip_model.safetensors", metadata={"format": "pt"})
    preprocess = {"mean": HALVES, "std": HALVES, "interpolation": "bicubic", "resize_mode": "squash"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (clip_dir / "open_clip_config.json").write_text(text + "\n")
