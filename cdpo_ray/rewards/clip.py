"""Images -> similarity to the prompt, by any open_clip model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import open_clip
import torch
from numpy.typing import NDArray
from open_clip import CLIPTextCfg, CLIPVisionCfg
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import TypedDict

from cdpo_ray.errors import RewardError, printable
from cdpo_ray.rewards.agreement import cosines
from cdpo_ray.rewards.pixels import centre_crop, normalized, squash
from cdpo_ray.rewards.precision import net_precision
from cdpo_ray.rewards.weights import hub_folder
from cdpo_ray.store import read_untrusted
from cdpo_ray.store.untrusted import other_keys_allowed
from cdpo_ray.testbed.clip import load_clip

WEIGHTS, SETTINGS = "open_clip_model.safetensors", "open_clip_config.json"
FILES = (WEIGHTS, "*.json", "*.txt", "*.model")
"""Files of a folder or hub repository in open_clip's layout: weights, settings, and any of a tokenizer."""

Channels = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)]


@other_keys_allowed
class _Preprocessing(TypedDict):
    mean: Channels
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
    interpolation: NotRequired[Literal["bicubic", "bilinear"]]
    resize_mode: NotRequired[Literal["shortest", "squash"]]


@other_keys_allowed
class _Architecture(TypedDict):
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]


@other_keys_allowed
class _Settings(TypedDict):
    """Keys of `open_clip_config.json` that are used."""

    model_cfg: _Architecture
    preprocess_cfg: _Preprocessing


_SETTINGS: TypeAdapter[_Settings] = TypeAdapter(_Settings)


class ClipReward:
    """Cosine similarity of image and prompt embeddings, -1 to 1. Source: arXiv:2103.00020, arXiv:2104.08718.

    The preprocessing is that of the checkpoint's `open_clip_config.json`. As in open_clip, ``interpolation`` and
    ``resize_mode`` are bicubic and shortest where it has none.

    Args:
        architecture: ``embedded``, or one of `open_clip.list_models`.
        checkpoint: folder in open_clip's layout, or hub id; `None` for ``embedded``.
        revision: commit of the hub id.
        scale: ``cosine``, or ``logit``: cosine times the learned logit scale, up to 100.

    Raises:
        RewardError: if the architecture is unknown, is not that of the checkpoint's settings, or the checkpoint cannot
            be loaded.
        StoreError: if the checkpoint's settings are incomplete or not supported.
    """

    def __init__(
        self,
        architecture: str = "embedded",
        checkpoint: str | None = None,
        revision: str | None = None,
        scale: Literal["cosine", "logit"] = "cosine",
    ) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any
        if architecture == "embedded":
            model, self.tokenizer, mean, std, self.image_size = load_clip()
            self.preprocessing = _Preprocessing(mean=[*mean], std=[*std])
        else:
            model, self.tokenizer, self.preprocessing = _load(architecture, checkpoint, revision)
            size = model.visual.image_size
            self.image_size = size[0] if isinstance(size, tuple) else size
        self.model = model.eval().to(self.device)
        self.scale = self.model.logit_scale.exp().item() if scale == "logit" else 1

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[Any]:
        pixels = self.preprocess(images)
        with net_precision(self.device):
            features = self.model.encode_image(pixels)
        scores = cosines(features, prompts, self._embed)
        return (self.scale * scores.double()).cpu().numpy()

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize and normalise as the checkpoint's settings say: uint8 -> fp32 ``[image, 3, size, size]``."""
        settings = self.preprocessing
        resize = squash if settings.get("resize_mode") == "squash" else centre_crop
        pixels = resize(images.to(self.device), self.image_size, mode=settings.get("interpolation", "bicubic"))
        return normalized(pixels, settings["mean"], settings["std"])

    def _embed(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts).to(self.device)
        with net_precision(self.device):
            return self.model.encode_text(tokens)


def check_architecture(architecture: str, *, key: str) -> None:
    """Check the name of an open_clip model.

    Args:
        key: config key to name in errors.

    Raises:
        RewardError: if open_clip has no such model.
    """
    if architecture not in open_clip.list_models():
        raise RewardError(f"`{key}` must be an architecture of open_clip, got {architecture!r}")


def _load(
    architecture: str, checkpoint: str | None, revision: str | None
) -> tuple[torch.nn.Module, Any, _Preprocessing]:
    """Model, tokenizer and preprocessing of a checkpoint."""
    assert checkpoint is not None, "the config requires a checkpoint for an architecture"
    check_architecture(architecture, key="rewards.clip.architecture")
    key = "rewards.clip.checkpoint"
    folder = hub_folder(checkpoint, revision, key=key, files=FILES)
    if missing := [name for name in (WEIGHTS, SETTINGS) if not (folder / name).is_file()]:
        raise RewardError(
            f"`{key}` {folder}: must be in open_clip's layout, but has no {' and no '.join(missing)}; weights alone do"
            f" not say which activation and preprocessing they need: give a folder with {WEIGHTS} and {SETTINGS}, as in"
            " their hub repository"
        )
    settings: _Settings = read_untrusted(
        folder / SETTINGS, _SETTINGS, remedy="restore the file that was published with the weights"
    )
    _check_same_model(architecture, settings["model_cfg"], folder / SETTINGS)
    try:
        model = open_clip.create_model(architecture, pretrained=str(folder / WEIGHTS))
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise RewardError(f"`{key}` {folder}: does not fit {architecture}: {reason}") from None
    return model, tokenizer, settings["preprocess_cfg"]


def _check_same_model(architecture: str, found: Mapping[str, Any], path: Path) -> None:
    """Compare the settings in a file with those of an architecture of open_clip.

    Many of them, such as QuickGELU, change the embeddings without changing the shape of any weight.

    Raises:
        RewardError: if they differ; names the architectures that fit.
    """
    expected, given = (_with_defaults(config) for config in (open_clip.get_model_config(architecture), found))
    differing = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    if not differing:
        return
    shown = ", ".join(f"`{name}` is {given.get(name)!r}, not {expected.get(name)!r}" for name in differing[:3])
    fitting = [name for name in open_clip.list_models() if _with_defaults(open_clip.get_model_config(name)) == given]
    remedy = f"give {' or '.join(map(repr, fitting))}" if fitting else "no architecture of open_clip has these settings"
    raise RewardError(
        f"`rewards.clip.architecture` must be that of {path}, got {architecture!r}: there {printable(shown)}; {remedy}"
    )


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a model that decide its embeddings, in one level."""
    towers = {"vision_cfg": CLIPVisionCfg(), "text_cfg": CLIPTextCfg()}
    flat = {"quick_gelu": False, "custom_text": False} | {k: v for k, v in config.items() if k not in towers}
    for tower, defaults in towers.items():
        flat |= {f"{tower}.{name}": value for name, value in (asdict(defaults) | config[tower]).items()}
    # initial weights, which the checkpoint replaces, and where the tokenizer comes from
    for name in ("vision_cfg.timm_model_pretrained", "text_cfg.hf_model_pretrained"):
        del flat[name]
    return flat | {"text_cfg.hf_tokenizer_name": bool(flat["text_cfg.hf_tokenizer_name"])}
