"""Folders of tiny vision-language models and sentence encoders with random weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace, WhitespaceSplit
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

BERT_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("a", "the", "cat", "dog", "bird", "plays", "chess", "rides", "bike", "red", "blue", "one", "two", "of", "and")
CHOICES = ("Yes", "no", "yes", "YES", "1", "2")
"""Words that `build_llava` may have beside `WORDS`, which has "two"."""
SIZE, PATCH = 32, 8
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def bert_tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: number for number, word in enumerate((*BERT_MARKS, *WORDS))})


def build_sentence_encoder(folder: Path) -> Path:
    """Build a folder in Sentence-BERT's layout: encoder, tokenizer and pooling."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(BERT_MARKS) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=12,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


def build_blip(folder: Path) -> Path:
    """Build a captioning BLIP, which takes no instruction."""
    torch.manual_seed(1)
    tokenizer = bert_tokenizer()
    config = BlipConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 40,
            "bos_token_id": tokenizer.cls_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "initializer_range": 0.5,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
            "initializer_range": 0.5,
        },
    )
    config.initializer_range = 0.5
    BlipForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    BlipProcessor(BlipImageProcessorPil(size=size), tokenizer).save_pretrained(folder)
    return folder


LLAVA_MARKS = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "USER", "ASSISTANT")


def build_llava(folder: Path, more_words: Sequence[str] = ()) -> Path:
    """Build a LLaVA, a chat model whose tokens are words between spaces.

    Args:
        more_words: tokens after `LLAVA_MARKS` and `WORDS`; with any, punctuation belongs to the words.
    """
    torch.manual_seed(2)
    vocabulary = {word: number for number, word in enumerate((*LLAVA_MARKS, *WORDS, *more_words))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit() if more_words else Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    template = (
        "{% for message in messages %}USER {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT{% endif %}"
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
            initializer_range=0.5,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def smooth_images(count: int) -> Tensor:
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(coarse, (32, 32)) * 255).to(torch.uint8)


def prepared(image: Tensor) -> Tensor:
    return ((image / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]


def token_of(word: str) -> int:
    """Number of a word in the vocabulary of a LLaVA with `CHOICES`."""
    return [*LLAVA_MARKS, *WORDS, *CHOICES].index(word)


@torch.no_grad()
def first_token_softmax(folder: Path, images: list[Tensor], words: str) -> Tensor:
    """Probabilities ``[token]`` after a question, by one plain forward pass in float64."""
    net = LlavaForConditionalGeneration.from_pretrained(folder).double().eval()
    prompt = ["USER", *["<image>"] * (16 * len(images)), *words.split(), "ASSISTANT"]
    pixels = torch.cat([prepared(image) for image in images]).double()
    return net(torch.tensor([[token_of(word) for word in prompt]]), pixel_values=pixels).logits[0, -1].softmax(-1)
