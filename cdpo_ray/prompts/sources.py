"""Prompt source -> training and held-out prompts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cdpo_ray.errors import PromptError
from cdpo_ray.prompts.animals import animal_prompts
from cdpo_ray.testbed.scenes import scene_prompts

BUILT_IN = ("animals", "scenes")


@dataclass(frozen=True)
class PromptSplit:
    """Distinct prompts, in the order of their source; no prompt is in both.

    Attributes:
        num_doubled: lines left out because the very same prompt came earlier.
        num_empty: lines left out because they hold nothing but white space.
    """

    train: list[str]
    heldout: list[str]
    num_doubled: int = 0
    num_empty: int = 0


def split_prompts(
    *,
    train_source: str | None,
    train_count: int | None,
    heldout_source: str | None,
    heldout_count: int | None,
    heldout_fraction: float | None,
    seed: int,
    train: Sequence[str] | None = None,
) -> PromptSplit:
    """The prompts to train on and the prompts to judge on.

    Args:
        train_source, heldout_source: a name of `BUILT_IN`, or a text file with one prompt a line.
        train_count, heldout_count: how many to keep, from the front.
        heldout_fraction: in place of a source: the share of the training source held out, chosen by hash, so that a
            prompt stays on its side when the file grows.
        seed: draws the prompts of `scenes`.
        train: in place of a source: prompts that came with preferences.

    Raises:
        PromptError: a source is missing, broken or empty, too short, or a prompt is on both sides.
    """
    if train is not None:
        distinct = list(dict.fromkeys(train))
        train, doubled, empty = distinct, len(train) - len(distinct), 0
    else:
        assert train_source is not None, "config: `train` has a source, or there are preferences"
        train, doubled, empty = read_prompts(train_source, "train", train_count, seed)
    if heldout_source is None:
        assert heldout_fraction is not None, "config: `heldout` has a source or a fraction"
        heldout = [prompt for prompt in train if is_held_out(prompt, heldout_fraction)][:heldout_count]
        train = [prompt for prompt in train if not is_held_out(prompt, heldout_fraction)]
    else:
        heldout, heldout_doubled, heldout_empty = read_prompts(heldout_source, "heldout", heldout_count, seed)
        doubled, empty = doubled + heldout_doubled, empty + heldout_empty
    both = set(train) & set(heldout)
    if both:
        shown = ", ".join(repr(prompt) for prompt in sorted(both)[:3])
        raise PromptError(
            f"`prompts.heldout`: {len(both)} of its {len(heldout)} prompts are trained on"
            f" ({shown}{', ...' * (len(both) > 3)}); a gain on them would prove nothing:"
            " remove them from one side, or give `heldout` a `fraction` of the training source"
        )
    wanted = {"train": (train, train_count if heldout_source else None), "heldout": (heldout, heldout_count)}
    for side, (prompts, count) in wanted.items():
        if len(prompts) < (count or 1):
            raise PromptError(
                f"`prompts.{side}`: wants {count or 'at least 1'} prompts, got {len(prompts)};"
                " give more, or ask for fewer"
            )
    return PromptSplit(train, heldout, doubled, empty)


def is_held_out(prompt: str, fraction: float) -> bool:
    """Whether a prompt falls into the held-out share; a function of the prompt alone."""
    digest = hashlib.blake2b(f"heldout:{prompt}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 < fraction


def read_prompts(source: str, split: str, count: int | None, seed: int) -> tuple[list[str], int, int]:
    """Distinct prompts of a source, and how many lines were doubled and empty."""
    if source == "scenes":
        try:
            return scene_prompts("train" if split == "train" else "heldout", count or 128, seed), 0, 0
        except ValueError as error:
            raise PromptError(f"`prompts.{split}.source` scenes: {error}") from None
    lines = animal_prompts() if source == "animals" else _lines(Path(source), split)
    prompts = [line.strip() for line in lines]
    kept = [prompt for prompt in prompts if prompt]
    distinct = list(dict.fromkeys(kept))
    if not distinct:
        raise PromptError(f"`prompts.{split}.source` {source}: has no prompts; write one prompt a line")
    return distinct[:count], len(kept) - len(distinct), len(prompts) - len(kept)


def _lines(path: Path, split: str) -> list[str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(
            f"`prompts.{split}.source` {path}: {error.strerror}; give a text file with one prompt a line,"
            f" or one of {', '.join(BUILT_IN)}"
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PromptError(
            f"{path}:{line}: is not UTF-8 (byte {data[error.start]:#04x}); save the file as UTF-8"
        ) from None
    return text.removesuffix("\n").split("\n") if text else []
