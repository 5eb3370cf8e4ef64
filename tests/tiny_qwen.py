"""Tiny models of the Qwen-VL family with random weights, and processors with the real kinds of tokens and templates."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from open_clip.tokenizer import bytes_to_unicode
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

MARKS = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIAL = tuple(f"<|{mark}|>" for mark in MARKS)
LETTERS = tuple(bytes_to_unicode().values())
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a"
    " helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token per byte, and the special tokens."""
    tokens = {letter: number for number, letter in enumerate(LETTERS)}
    tokenizer = Qwen2Tokenizer(vocab=tokens, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    return tokenizer


def build_qwen2_vl(folder: Path, vocab_size: int | None = None) -> Qwen2VLForConditionalGeneration:
    """Write processor and configuration of a random Qwen2-VL, and return the model.

    Args:
        vocab_size: number of embedded tokens in the configuration; `None`: as many as the tokenizer has.
    """
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": vocab_size or len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0},
            "initializer_range": 0.2,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    config.save_pretrained(folder)
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE
    ).save_pretrained(folder)
    return Qwen2VLForConditionalGeneration(config).eval()


def build_hpsv3(folder: Path) -> tuple[Qwen2VLForConditionalGeneration, dict[str, Tensor]]:
    """Write `processor` and `HPSv3.safetensors` as released; returns the model and the weights of the head."""
    model = build_qwen2_vl(folder / "processor", vocab_size=300)  # as published, more than the tokenizer has
    model.resize_token_embeddings(len(qwen_tokenizer()) + 1)
    head = {
        f"{number}.{kind}": torch.randn(shape) / shape[-1] ** 0.5
        for number, sizes in {0: (1024, 32), 3: (16, 1024), 5: (2, 16)}.items()
        for kind, shape in {"weight": sizes, "bias": sizes[:1]}.items()
    }
    weights = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): weight.contiguous()
        for name, weight in model.state_dict().items()
    }
    save_file(weights | {f"rm_head.{name}": weight for name, weight in head.items()}, folder / "HPSv3.safetensors")
    return model, head


@torch.no_grad()
def build_qwen3_vl(folder: Path, answer: Sequence[str] = ()) -> Qwen3VLForConditionalGeneration:
    """Write a folder of a random Qwen3-VL.

    Args:
        answer: pieces of a text, all different; the model writes it whatever it sees. Empty: it writes anything.
    """
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(list(answer))
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10_000.0},
            "initializer_range": 0.2,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = Qwen3VLForConditionalGeneration(config).eval()
    if answer:  # each token decides the next alone: layers add nothing to it
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        pieces = tokenizer.convert_tokens_to_ids(["Ċ", *answer, "<|im_end|>"])
        embedded, head = model.get_input_embeddings().weight.zero_(), model.lm_head.weight.zero_()
        for place, (token, following) in enumerate(itertools.pairwise(pieces)):
            embedded[token, place] = head[following, place] = 1
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(folder)
    image_processor = Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32)
    Qwen3VLProcessor(image_processor, tokenizer, Qwen3VLVideoProcessor(), chat_template=TEMPLATE).save_pretrained(
        folder
    )
    return model
