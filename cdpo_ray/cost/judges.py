"""Reward -> cost of scoring an image; does not import torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cdpo_ray.prompts.questions import read_questions


class JudgeCost(NamedTuple):
    """Cost of one judge.

    Attributes:
        flops: per image (2 per multiply-add), without the prompt, which is encoded once.
        parameters: number of parameters.
        parameter_bytes: bytes of each; judges are loaded in fp32, a vision-language model as its weights are stored.
    """

    flops: float
    parameters: int
    parameter_bytes: int = 4


class JudgesCost(NamedTuple):
    """Total cost of several judges.

    Attributes:
        flops: per image, see `JudgeCost`.
        weights_bytes: bytes of all weights.
        unknown: names of judges of unknown cost, which are not included.
    """

    flops: float
    weights_bytes: int
    unknown: list[str]


CLIP_MODELS = {
    # a vision transformer of width w and depth d with n tokens takes d * n * (24 w^2 + 4 n w) FLOPs
    "ViT-B-32": JudgeCost(8.7e9, 151_277_313),
    "ViT-B-16": JudgeCost(35.1e9, 149_620_737),
    "ViT-L-14": JudgeCost(162e9, 427_616_513),
    "ViT-H-14": JudgeCost(335e9, 986_109_441),
    "ViT-bigG-14": JudgeCost(967e9, 2_539_567_362),
    "embedded": JudgeCost(0.1e9, 1_000_000),
}
REWARD_COSTS = {
    "hpsv2": CLIP_MODELS["ViT-H-14"],
    "pickscore": CLIP_MODELS["ViT-H-14"],
    "aesthetic": CLIP_MODELS["ViT-L-14"],
    # Qwen2-VL-7B without its output layer: 1024 patches; 840 tokens, of which 256 are the image's, 20 the prompt's
    "hpsv3": JudgeCost(12.7e12, 7_748_610_610, parameter_bytes=2),
    "imagereward": JudgeCost(135e9, 478_000_000),  # BLIP: ViT-L/16 at 224 pixels, and BERT with cross-attention to it
}
ON_CPU = ("jpeg_size", "ocr", "oracle", "oracle_strict")


def judges_cost(judges: Mapping[str, Mapping[str, Any]]) -> JudgesCost:
    """Total cost of the judges.

    Args:
        judges: name -> options, as in `RewardsSection.judges`.
    """
    known: list[JudgeCost] = []
    unknown = []
    for name, options in judges.items():
        cost = CLIP_MODELS.get(options["architecture"]) if name == "clip" else REWARD_COSTS.get(name)
        if cost:
            known.append(cost)
        elif name not in ON_CPU and not options.get("endpoint"):
            unknown.append(name)
    weights_bytes = sum(cost.parameters * cost.parameter_bytes for cost in known)
    return JudgesCost(sum(cost.flops for cost in known), weights_bytes, unknown)


def num_model_questions(name: str, options: Mapping[str, Any], prompts: Sequence[str], images_per_prompt: int) -> int:
    """Number of questions that a vision-language judge asks about the images of some prompts; 0 for other judges.

    Args:
        name, options: as in `RewardsSection.judges`.

    Raises:
        PromptError: the file of `vqa` cannot be read.
    """
    num_images = len(prompts) * images_per_prompt
    if name == "vlm_judge" and options["mode"] == "pairwise":
        others = images_per_prompt - 1
        return num_images * min(options["opponents"] or others, others)
    if name == "vqa":
        questions = read_questions(Path(options["questions"]))
        return sum(len(questions.get(prompt, ())) for prompt in prompts) * images_per_prompt
    return num_images if name in ("vlm_alignment", "vlm_judge") else 0
