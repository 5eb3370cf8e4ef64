"""Images scored per second: each reward in batches, against the same model called image by image.

The naive route is a hand-written loop: one PIL image at a time, preprocessed on the main thread by PIL or by
transformers' image processor, its prompt encoded every time. Both routes share one model. Published models have their
real architecture and random weights; those of `TINY` are 32 channels wide, and need `tests` in PYTHONPATH. Images are
scenes of the embedded world for its own judges, written words for `ocr`, and coloured squares for the others, both at
`--pixels`.
"""

import argparse
import functools
import hashlib
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as vision
from PIL import Image, ImageDraw, ImageFont
from rates import CLOCKS, machine, print_rates, rates_in_turns
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torchvision.transforms import InterpolationMode
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from cdpo_ray.config import VlmJudgeOptions
from cdpo_ray.rewards import weights
from cdpo_ray.rewards.aesthetic import AestheticReward, ratings
from cdpo_ray.rewards.clip import ClipReward
from cdpo_ray.rewards.hpsv2 import HpsV2Reward
from cdpo_ray.rewards.hpsv3 import INSTRUCTION as hpsv3_instruction
from cdpo_ray.rewards.hpsv3 import HpsV3Reward
from cdpo_ray.rewards.jpeg_size import JpegSizeReward
from cdpo_ray.rewards.ocr import OcrReward, similarity, words_of
from cdpo_ray.rewards.oracle import OracleReward
from cdpo_ray.rewards.pickscore import PickScoreReward
from cdpo_ray.rewards.scorer import Reward
from cdpo_ray.rewards.unifiedreward import INSTRUCTION as unifiedreward_instruction
from cdpo_ray.rewards.unifiedreward import UnifiedReward
from cdpo_ray.rewards.unifiedreward import ratings as written_ratings
from cdpo_ray.rewards.vlm_judge import VlmJudgeReward
from cdpo_ray.testbed.oracle import judge
from cdpo_ray.testbed.scenes import parse_caption, render, sample_scene, scene_prompts

CAPTIONS = scene_prompts("train", 8, seed=0)
HEAD_WIDTHS = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}
CLIP_L = {
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
}
CLIP_H = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "hidden_act": "gelu",
        "eos_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}


@dataclass(frozen=True)
class Judge:
    """A reward, and a hand-written computation of the same score for one image."""

    reward: Reward
    by_hand: Callable[[Image.Image, str], float]


def clip(scratch: Path) -> Judge:
    reward = ClipReward()
    settings = reward.preprocessing
    transform = open_clip.image_transform(reward.image_size, False, mean=settings["mean"], std=settings["std"])

    def by_hand(image: Image.Image, prompt: str) -> float:
        features = reward.model.encode_image(transform(image)[None].to(reward.device), normalize=True)
        texts = reward.model.encode_text(reward.tokenizer([prompt]).to(reward.device), normalize=True)
        return (features @ texts.T).item()

    return Judge(reward, by_hand)


def jpeg_size(scratch: Path) -> Judge:
    def num_bytes(image: Image.Image) -> int:
        image.save(buffer := io.BytesIO(), "jpeg", quality=90)
        return buffer.tell()

    def by_hand(image: Image.Image, prompt: str) -> float:
        return (num_bytes(image) - num_bytes(Image.new("RGB", image.size))) / 1000

    return Judge(JpegSizeReward(), by_hand)


def oracle(scratch: Path) -> Judge:
    def by_hand(image: Image.Image, prompt: str) -> float:
        return float(judge(np.asarray(image).transpose(2, 0, 1)[None], [prompt])["attr"][0])

    return Judge(OracleReward(), by_hand)


def aesthetic(scratch: Path) -> Judge:
    CLIPModel(CLIPConfig(**CLIP_L)).save_pretrained(scratch / "clip-l")
    head, width = {}, 768
    for place, outputs in HEAD_WIDTHS.items():
        head |= {f"layers.{place}.weight": torch.randn(outputs, width) / width**0.5}
        head |= {f"layers.{place}.bias": torch.randn(outputs)}
        width = outputs
    reward = AestheticReward(*saved(head, scratch / "head.pth"), str(scratch / "clip-l"), None)
    processor = CLIPImageProcessor()

    def by_hand(image: Image.Image, prompt: str) -> float:
        pixels = processor(image, return_tensors="pt").pixel_values.to(reward.device)
        return ratings(reward.model.get_image_features(pixels).pooler_output, reward.head).item()

    return Judge(reward, by_hand)


def pickscore(scratch: Path) -> Judge:
    words = open_clip.tokenizer.SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(token, token): number for token, number in words.encoder.items()}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(words.bpe_ranks))
    processor = CLIPProcessor(CLIPImageProcessor(), tokenizer)
    processor.save_pretrained(scratch / "clip-h")
    CLIPModel(CLIPConfig(**CLIP_H)).save_pretrained(scratch / "clip-h")
    reward = PickScoreReward(str(scratch / "clip-h"), None, str(scratch / "clip-h"), None)

    def by_hand(image: Image.Image, prompt: str) -> float:
        inputs = processor(
            text=prompt, images=image, padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).to(reward.device)
        return reward.model(**inputs).logits_per_image.item()

    return Judge(reward, by_hand)


def hpsv2(scratch: Path) -> Judge:
    model = open_clip.create_model("ViT-H-14", precision="fp16")
    path, checksum = saved({"state_dict": model.state_dict()}, scratch / "hpsv2.pt")
    del model
    reward = HpsV2Reward("ViT-H-14", path, None, checksum)

    def by_hand(image: Image.Image, prompt: str) -> float:
        size = 224
        height, width = (round(side * size / max(image.size)) for side in (image.height, image.width))
        pixels = vision.resize(vision.to_tensor(image), [height, width], InterpolationMode.BICUBIC)
        left, top = (size - width) // 2, (size - height) // 2
        pixels = vision.pad(pixels, [left, top, size - width - left, size - height - top])
        pixels = vision.normalize(pixels, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        features = reward.model.encode_image(pixels[None].to(reward.device), normalize=True)
        texts = reward.model.encode_text(reward.tokenizer([prompt]).to(reward.device), normalize=True)
        return (features @ texts.T).item()

    return Judge(reward, by_hand)


def hpsv3(scratch: Path) -> Judge:
    from tiny_qwen import build_hpsv3

    build_hpsv3(scratch)
    reward = HpsV3Reward(str(scratch / "HPSv3.safetensors"), None, str(scratch / "processor"), None)

    def by_hand(image: Image.Image, prompt: str) -> float:
        chat = chat_of(reward.processor, hpsv3_instruction.format(prompt=prompt))
        resized = image.resize((448, 448), Image.Resampling.BICUBIC)
        inputs = reward.processor(text=[chat], images=[resized], return_tensors="pt").to(reward.device)
        tokens = inputs["input_ids"][0]
        positions = torch.arange(len(tokens), device=reward.device).expand(3, 1, -1)
        states = reward.model(**inputs, position_ids=positions).last_hidden_state[0, tokens == reward.reward_token]
        return reward.head(states[-1].float())[0].item()

    return Judge(reward, by_hand)


def unifiedreward(scratch: Path) -> Judge:
    from tiny_qwen import build_qwen3_vl

    build_qwen3_vl(scratch, ["Alignment Score (1-5): 3\n", "Coherence Score (1-5): 2\n", "Style Score (1-5): 4"])
    reward = UnifiedReward(str(scratch), None, "mean")
    processor, model = reward.ask.processor, reward.ask.model

    def by_hand(image: Image.Image, prompt: str) -> float:
        chat = chat_of(processor, unifiedreward_instruction.format(prompt=prompt))
        inputs = processor(text=[chat], images=[image], return_tensors="pt").to(model.device)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=160)[0, inputs["input_ids"].shape[1] :]
        rated = written_ratings(processor.tokenizer.decode(tokens, skip_special_tokens=True))
        return sum(rated.values()) / 3 if rated else float("nan")

    return Judge(reward, by_hand)


def chat_of(processor: Any, text: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )


def ocr(scratch: Path) -> Judge:
    from rapidocr import RapidOCR

    engine = RapidOCR(params={"Global.log_level": "error"})  # all cores, and a net that finds upside-down text

    def by_hand(image: Image.Image, prompt: str) -> float:
        words = words_of(" ".join(engine(image).txts or ()))
        return similarity("".join(words_of(prompt.split('"')[1])), words)

    return Judge(OcrReward(), by_hand)


def vlm_judge(scratch: Path) -> Judge:
    """A small LLaVA with random weights; its tokens are words."""
    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "yes", "no", *sorted(set(" ".join(CAPTIONS).split()))]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special, additional_special_tokens=["<image>"])
    processor = LlavaProcessor(
        CLIPImageProcessor(),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for part in messages[0]['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}",
    )
    narrow = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**narrow, num_hidden_layers=4, image_size=224, patch_size=14),
        text_config=LlamaConfig(
            **narrow, vocab_size=len(words), num_hidden_layers=4, bos_token_id=2, eos_token_id=3, pad_token_id=0
        ),
        image_token_index=words.index("<image>"),
    )
    processor.save_pretrained(scratch / "vlm")
    LlavaForConditionalGeneration(config).save_pretrained(scratch / "vlm")
    options = VlmJudgeOptions(mode="yes_no", checkpoint=str(scratch / "vlm")).model_dump()
    reward = VlmJudgeReward(**options)
    net = LlavaForConditionalGeneration.from_pretrained(scratch / "vlm").eval()

    def by_hand(image: Image.Image, prompt: str) -> float:
        text = f'<image> Does this figure show "{prompt}"? Please answer yes or no.'
        inputs = processor(text=text, images=image, return_tensors="pt")
        return net(**inputs).logits[0, -1].softmax(-1)[words.index("yes")].item()

    return Judge(reward, by_hand)


JUDGES = {
    "clip": clip,
    "jpeg_size": jpeg_size,
    "ocr": ocr,
    "oracle": oracle,
    "aesthetic": aesthetic,
    "pickscore": pickscore,
    "hpsv2": hpsv2,
    "hpsv3": hpsv3,
    "unifiedreward": unifiedreward,
    "vlm_judge": vlm_judge,
}
OF_THE_EMBEDDED_WORLD = ("clip", "oracle")
HEAVY = ("pickscore", "hpsv2")  # 4 GB of weights, and twice that while they are built
TINY = ("hpsv3", "unifiedreward")  # their real classes, but 32 channels wide: 16 GB otherwise


def saved(content: Any, path: Path) -> tuple[str, str]:
    """Path and SHA-256 of a pickle."""
    torch.save(content, path)
    with path.open("rb") as handle:
        return str(path), hashlib.file_digest(handle, "sha256").hexdigest()


def pictures(name: str, num_prompts: int, images_per_prompt: int, pixels: int) -> tuple[Tensor, list[str]]:
    """Images uint8 ``[image, 3, height, width]`` grouped by prompt, and the prompt of each."""
    rng = np.random.default_rng(0)
    count = num_prompts * images_per_prompt
    prompts = [prompt for prompt in scene_prompts("train", num_prompts, seed=0) for _ in range(images_per_prompt)]
    if name in OF_THE_EMBEDDED_WORLD:
        scenes = [parse_caption(prompt) if place % 2 else sample_scene(rng) for place, prompt in enumerate(prompts)]
        return torch.from_numpy(np.stack([render(scene, rng) for scene in scenes])), prompts
    if name == "ocr":
        texts = [" ".join(prompt.split()[:2]) for prompt in prompts]
        return torch.cat([written(text, pixels) for text in texts]), [f'a sign that says "{text}"' for text in texts]
    coarse = torch.from_numpy(rng.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8))
    return F.interpolate(coarse, (pixels, pixels)), prompts


def written(text: str, pixels: int) -> Tensor:
    """Image of a text, ``[1, 3, pixels, pixels]``."""
    image = Image.new("RGB", (pixels, pixels), "white")
    ImageDraw.Draw(image).text((0, pixels // 3), text, fill="black", font=ImageFont.load_default(pixels // 12))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def ours(judge: Judge, images: Tensor, prompts: Sequence[str], images_per_batch: int) -> np.ndarray:
    starts = range(0, len(prompts), images_per_batch)
    batches = [slice(start, start + images_per_batch) for start in starts]
    return np.concatenate([judge.reward(images[batch], prompts[batch]) for batch in batches])


@torch.no_grad()
def naive(judge: Judge, images: Tensor, prompts: Sequence[str]) -> np.ndarray:
    pairs = zip(images.permute(0, 2, 3, 1).numpy(), prompts, strict=True)
    return np.array([judge.by_hand(Image.fromarray(pixels), prompt) for pixels, prompt in pairs])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    light = [name for name in JUDGES if name not in HEAVY + TINY]
    parser.add_argument("--rewards", nargs="+", choices=JUDGES, default=light)
    parser.add_argument("--pixels", type=int, default=512, help="side of an image that is not a scene")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--images", type=int, default=8, help="images per prompt")
    parser.add_argument("--images-per-batch", type=int, default=8, help="our batch size")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    return parser.parse_args()


def main() -> None:
    """Check that both routes agree, then time them alternately, reward by reward."""
    options = parse()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(
        f"{options.prompts} prompts x {options.images} images, batches of {options.images_per_batch},"
        f" {machine(device)}, {options.clock} time"
    )
    for name in options.rewards:
        images, prompts = pictures(name, options.prompts, options.images, options.pixels)
        with tempfile.TemporaryDirectory() as scratch:
            weights.CONVERTED_DIR = Path(scratch)
            judge = JUDGES[name](Path(scratch))
            routes = {
                "ours": functools.partial(ours, judge, images, prompts, options.images_per_batch),
                "naive": functools.partial(naive, judge, images, prompts),
            }
            mine, theirs = (route() for route in routes.values())
            side = images.shape[-1]
            print(f"\n{name}, {side} px: scores differ by {np.abs(mine - theirs).max():.1e}, spread {mine.std():.1e}")
            rates = rates_in_turns(
                routes, num_items=len(prompts), repeats=options.repeats, device=device, clock=options.clock
            )
            print_rates(rates, "images")


if __name__ == "__main__":
    main()
