"""Images, and tiny checkpoints with random weights in the formats of published rewards."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import bytes_to_unicode
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from cdpo_ray.rewards.clip import SETTINGS, WEIGHTS

TINY_OPEN_CLIP = "tiny-of-a-test"
TINY_OPEN_CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def smooth_images(count: int, height: int, width: int) -> Tensor:
    """Enlarged noise, with detail similar to photographs."""
    coarse = torch.rand(count, 3, 5, 6, generator=torch.Generator().manual_seed(height))
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 255).to(torch.uint8)


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def register_open_clip(folder: Path, name: str, config: dict[str, Any]) -> None:
    """Make an architecture known to open_clip."""
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")


def tiny_open_clip(folder: Path) -> open_clip.CLIP:
    """Register and build a random ViT of open_clip with the name `TINY_OPEN_CLIP`."""
    register_open_clip(folder, TINY_OPEN_CLIP, TINY_OPEN_CLIP_CONFIG)
    torch.manual_seed(0)
    return open_clip.create_model(TINY_OPEN_CLIP).eval()


def build_tiny_open_clip(folder: Path, name: str, config: dict[str, Any], preprocess: dict[str, Any]) -> Path:
    """Folder of a random model in open_clip's layout, whose architecture is registered with the name."""
    folder.mkdir(exist_ok=True)
    register_open_clip(folder, name, config)
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    with torch.no_grad():
        for weight in model.parameters():  # else activations are too small to show which function they are
            weight.add_(0.3 * torch.randn_like(weight) * (weight.ndim > 0))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / WEIGHTS)
    (folder / SETTINGS).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


def build_tiny_clip(folder: Path) -> Path:
    """Folder of a random CLIP in transformers' layout, with the image settings and the tokenizer of a processor.

    The tokenizer's files are those of the hub's CLIPs: `vocab.json`, `merges.txt`; one token per byte, and two merges.
    """
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokens),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 20,
            "bos_token_id": 0,  # these three are wrong in published configurations, too
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=12,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for weight in model.parameters():  # else all images have about the same embedding
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **special}))
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class MakesFolder:
    """Creates a folder if a reader that runs code unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)
