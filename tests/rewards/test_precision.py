"""Judges in TF32 order images as in fp32; on the CPU, precision is not reduced."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reward_models
import test_aesthetic
import test_imagereward
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cdpo_ray.evaluation.statistics import rank_correlation
from cdpo_ray.rewards import weights
from cdpo_ray.rewards.precision import net_precision

PROMPTS = ["a cat", "a red circle in the middle", "a dog"]
IMAGES_PER_PROMPT = 32
PRODUCTS = [getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm", "convolution")]


def clip(folder: Path) -> Any:
    from cdpo_ray.rewards.clip import ClipReward

    return ClipReward()


def hpsv2(folder: Path) -> Any:
    from cdpo_ray.rewards.hpsv2 import HpsV2Reward

    model = reward_models.tiny_open_clip(folder)
    torch.save({"state_dict": model.state_dict()}, folder / "hps.pt")
    return HpsV2Reward(
        reward_models.TINY_OPEN_CLIP, str(folder / "hps.pt"), None, reward_models.sha256(folder / "hps.pt")
    )


def pickscore(folder: Path) -> Any:
    from cdpo_ray.rewards.pickscore import PickScoreReward

    clip_dir = str(reward_models.build_tiny_clip(folder))
    return PickScoreReward(clip_dir, None, clip_dir, None)


def aesthetic(folder: Path) -> Any:
    from cdpo_ray.rewards.aesthetic import AestheticReward

    head = test_aesthetic.save_head(folder / "head.pth", 12)
    return AestheticReward(str(head), reward_models.sha256(head), str(reward_models.build_tiny_clip(folder)), None)


def imagereward(folder: Path) -> Any:
    from cdpo_ray.rewards.imagereward import ImageReward

    words = folder / "vocab.txt"
    words.write_text("\n".join(test_imagereward.WORDS) + "\n")
    return ImageReward(*test_imagereward.saved(test_imagereward.random_weights(), folder), str(words), None)


class EmulatedTF32(TorchDispatchMode):
    """Rounds inputs of matrix products and convolutions to TF32's 10-bit mantissa while TF32 is allowed."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: Any = None) -> Any:
        if function.overloadpacket in PRODUCTS and torch.backends.cuda.matmul.allow_tf32:
            arguments = tuple(rounded(value) if isinstance(value, Tensor) else value for value in arguments)
        return function(*arguments, **options or {})


def rounded(values: Tensor) -> Tensor:
    if values.dtype != torch.float32:
        return values
    return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def scored(judge: Any) -> np.ndarray:
    images = torch.cat([reward_models.smooth_images(IMAGES_PER_PROMPT, 64 + row, 72)[:, :, :64] for row in range(3)])
    named = [prompt for prompt in PROMPTS for _ in range(IMAGES_PER_PROMPT)]
    found: np.ndarray = judge(images, named).reshape(3, -1)
    return found


@pytest.mark.parametrize("make", [clip, hpsv2, pickscore, aesthetic, imagereward])
def test_tf32_orders_the_images_of_a_prompt_as_fp32_does(
    make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CONVERTED_DIR", tmp_path / "converted")
    judge = make(tmp_path)
    with EmulatedTF32():
        full = scored(judge)
        monkeypatch.setattr(sys.modules[type(judge).__module__], "net_precision", lambda device: net_precision("cuda"))
        reduced = scored(judge)
    assert 0 < np.abs(full - reduced).max() < 0.02 * full.std(axis=1).mean()
    assert rank_correlation(full, reduced).min() > 0.99


def test_precision_is_reduced_on_cuda_only_and_restored() -> None:
    for before in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = before
        try:
            for device in ("cpu", "cuda"):
                with net_precision(device):
                    assert torch.backends.cuda.matmul.allow_tf32 is (before or device == "cuda")
                assert torch.backends.cuda.matmul.allow_tf32 is before
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
