"""Reward -> cost of scoring an image; does not import torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cdpo_ray.prompts.questions import read_questions


class JudgeCost(NamedTuple):
    """FLOPs per image (2 per multiply-add), without the prompt, which is encoded once; and number of parameters."""

    flops: float
    parameters: int


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
    "hpsv3": JudgeCost(12.7e12, 7_748_610_610),
    "imagereward": JudgeCost(135e9, 478_000_000),  # BLIP: ViT-L/16 at 224 pixels, and BERT with cross-attention to it
}
ON_CPU = ("jpeg_size", "ocr", "oracle", "oracle_strict")


def judges_cost(judges: Mapping[str, Mapping[str, Any]]) -> tuple[JudgeCost, list[str]]:
    """Total cost of the judges, and the names of judges of unknown cost.

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
    return JudgeCost(sum(cost.flops for cost in known), sum(cost.parameters for cost in known)), unknown


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
