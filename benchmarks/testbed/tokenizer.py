"""Words of the captions -> one byte-level BPE vocabulary for CLIPTokenizer and open_clip."""

import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from open_clip.tokenizer import bytes_to_unicode
from transformers import CLIPTokenizer

from cdpo_ray.testbed.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES

CONTEXT_LENGTH = 20  # the longest caption, two objects and a background, has 18 tokens between start and end
START, END = "<start_of_text>", "<end_of_text>"  # open_clip's names
WORDS = (*COLOURS, *SHAPES, *PLACES, *BACKGROUNDS, "a", "on", "in", "the", "and", "background", ",")

Merge = tuple[str, str]


def learn_merges(words: tuple[str, ...]) -> list[Merge]:
    """Merge the most frequent neighbours, ties in alphabetical order, until each word is one token."""
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[Merge] = []
    while counts := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        spellings = [apply_merge(spelling, merges[-1]) for spelling in spellings]
    return merges


def apply_merge(spelling: list[str], merge: Merge) -> list[str]:
    """Join each occurrence of the two tokens of ``merge``, from left to right."""
    joined: list[str] = []
    for token in spelling:
        if joined and (joined[-1], token) == merge:
            joined[-1] += token
        else:
            joined.append(token)
    return joined


def vocabulary(merges: list[Merge]) -> dict[str, int]:
    """Token -> id, in the order that open_clip's SimpleTokenizer derives from the merges."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
    return {token: index for index, token in enumerate(tokens)}


def make_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the pipeline, ``CONTEXT_LENGTH`` tokens long."""
    merges = learn_merges(WORDS)
    return CLIPTokenizer(
        vocab=vocabulary(merges),
        merges=merges,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=CONTEXT_LENGTH,
    )


def save_tokenizer(tokenizer_dir: Path) -> None:
    """Write the tokenizer, with the classic ``vocab.json`` and ``merges.txt`` beside transformers' own file."""
    make_tokenizer().save_pretrained(tokenizer_dir)
    merges = learn_merges(WORDS)
    (tokenizer_dir / "vocab.json").write_text(json.dumps(vocabulary(merges)))
    (tokenizer_dir / "merges.txt").write_text(_merges_text(merges))


def save_bpe(bpe_path: Path) -> None:
    """Write the merges in SimpleTokenizer's format, without a time stamp, so that equal merges give equal bytes."""
    bpe_path.write_bytes(gzip.compress(_merges_text(learn_merges(WORDS)).encode(), mtime=0))


def _merges_text(merges: list[Merge]) -> str:
    return "\n".join(["#version: 0.2", *map(" ".join, merges)])
