"""Votes of people on pairs of a run's images: the pairs, and the files that hold the votes."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from cdpo_ray.dataflow.images import NO_IMAGES
from cdpo_ray.errors import StoreError, printable
from cdpo_ray.evaluation.report import check_columns, check_comparison, checked_schema, read_table
from cdpo_ray.randomness.numbers import Permutation, key_of
from cdpo_ray.records import ARMS, EVALUATION, HELDOUT, SAMPLES
from cdpo_ray.store import RunFolder, exists, is_local, make_folder, path_within, validate_untrusted, write_text
from cdpo_ray.store.failures import storage_errors
from cdpo_ray.store.untrusted import Count, Timestamp, read_untrusted_bytes

SAMPLED = "samples"
STEP_OF = {HELDOUT: EVALUATION, SAMPLED: SAMPLES}
"""Kind of pairs -> step that made the images: base against fine-tuned model, or two samples of a training prompt."""
SIDES = ("left", "right")
VOTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MAX_VOTERS = 1000
PAIRS_PER_PROMPT = 8  # of samples, each of which is in one pair
PROMPTS_AT_ONCE = 8  # bounds the memory
SHOWN_FAULTS = 5

ImageName = Annotated[str, Field(pattern=r"^(base|tuned|sample)-\d{1,7}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Vote(TypedDict):
    """One line of a file of votes.

    Attributes:
        left, right: names of the images, such as ``tuned-0``, at the sides where they were shown.
        left_digest, right_digest: BLAKE2b of the PNGs: a vote does not count for other images of the same name.
        choice: the better image.
    """

    prompt_index: Count
    left: ImageName
    right: ImageName
    left_digest: Digest
    right_digest: Digest
    choice: Literal["left", "right", "tie"]
    time: Timestamp


_VOTE: TypeAdapter[Vote] = TypeAdapter(Vote)


class Pair(NamedTuple):
    """Two images of one prompt, in an order that does not depend on where they are shown."""

    prompt_index: int
    images: tuple[str, str]


@dataclass(frozen=True)
class RatedImages:
    """Images of a run that people rate.

    Attributes:
        kind: key of `STEP_OF`.
        seed: seed of the run; it decides the order of the pairs and who sees which image on the left.
        pairs: all pairs in the order in which everybody sees them: the first ones cover all prompts.
        prompts: text by ``prompt_index``.
        tables: by ``prompt_index``, the table that holds its images.
    """

    kind: str
    seed: int
    pairs: Sequence[Pair]
    prompts: Mapping[int, str]
    tables: Mapping[int, Path]

    def pngs(self, prompt_indices: Collection[int]) -> dict[tuple[int, str], bytes]:
        """Images of prompts, by prompt and name; each table is read once."""
        found: dict[tuple[int, str], bytes] = {}
        for table in dict.fromkeys(self.tables[index] for index in prompt_indices):
            wanted = [("prompt_index", "in", list(prompt_indices))]
            if self.kind == HELDOUT:
                columns = ["prompt_index", "sample_index", *(f"{arm}_image" for arm in ARMS)]
                for row in read_table(table, columns, wanted).to_pylist():
                    for arm in ARMS:
                        found[row["prompt_index"], f"{arm}-{row['sample_index']}"] = row[f"{arm}_image"] or b""
                continue
            for row in read_table(table, ["prompt_index", "images"], wanted).to_pylist():
                for number, png in enumerate(row["images"] or []):
                    found[row["prompt_index"], f"sample-{number}"] = png or b""
        return found

    def swapped(self, pair: Pair, voter: str) -> bool:
        """Whether a voter sees the pair's second image on the left."""
        return key_of(self.seed, "side", voter, pair.prompt_index, *pair.images) % 2 == 1

    def current(self, votes: Sequence[Vote]) -> list[Vote]:
        """Votes on the images as they are now; others are of images that were made again or do not exist."""
        pairs = {*self.pairs}
        votes = [vote for vote in votes if pair_of(vote) in pairs]
        voted = sorted({vote["prompt_index"] for vote in votes})
        digests: dict[tuple[int, str], str] = {}
        for start in range(0, len(voted), PROMPTS_AT_ONCE):
            pngs = self.pngs(voted[start : start + PROMPTS_AT_ONCE])
            digests |= {place: digest_of(png) for place, png in pngs.items()}
        return [
            vote
            for vote in votes
            if all(digests.get((vote["prompt_index"], vote[side])) == vote[f"{side}_digest"] for side in SIDES)  # type: ignore[literal-required]
        ]


def rated_images(run: RunFolder, kind: str) -> RatedImages:
    """Images of a run's finished step, for people to rate.

    Args:
        kind: key of `STEP_OF`.

    Raises:
        StoreError: the step is not finished or damaged, or the run did not keep its images.
    """
    step = STEP_OF[kind]
    seed = run.manifest(step)["seed"]
    if kind == HELDOUT:
        path = run.step(step) / "comparison.parquet"
        run.refuse_damage(step)
        check_comparison(path, [])
        rows = read_table(path, ["prompt_index", "sample_index", "prompt"])
        prompts = dict(zip(rows["prompt_index"].to_pylist(), rows["prompt"].to_pylist(), strict=True))
        turns = [
            (turn, Pair(index, (f"base-{turn}", f"tuned-{turn}")))
            for index, turn in zip(rows["prompt_index"].to_pylist(), rows["sample_index"].to_pylist(), strict=True)
        ]
        return _in_order(kind, seed, turns, prompts, dict.fromkeys(prompts, path))
    run.refuse_damage(step, read_up_to=0)  # may be very large; images are checked when they are shown
    prompts, tables, turns = {}, {}, []
    for name in run.manifest(step)["files"]:
        if name.endswith(".parquet"):
            shard = path_within(run.step(step), name)
            num_samples = _num_samples(shard)
            rows = read_table(shard, ["prompt_index", "prompt"])
            for index, prompt in zip(rows["prompt_index"].to_pylist(), rows["prompt"].to_pylist(), strict=True):
                prompts[index], tables[index] = prompt, shard
                turns += enumerate(_matched(index, num_samples, seed))
    return _in_order(kind, seed, turns, prompts, tables)


def _num_samples(shard: Path) -> int:
    """Number of images of each prompt of a shard of samples."""
    schema = checked_schema(shard)
    if "images" not in schema.names:
        raise StoreError(f"{shard}: {NO_IMAGES}")
    check_columns(shard, schema, integers=("prompt_index",), text=("prompt",), lists=("images",))
    latents = schema.field("latents").type if "latents" in schema.names else None
    if not isinstance(latents, pa.FixedShapeTensorType):
        raise StoreError(f"{shard}: must have one column `latents` of tensors; delete {shard.parent} to regenerate it")
    return int(latents.shape[0])


def _matched(prompt_index: int, num_samples: int, seed: int) -> list[Pair]:
    """Random pairs of a prompt's samples; each sample is in one of them at most."""
    num_pairs = min(num_samples // 2, PAIRS_PER_PROMPT)
    drawn = Permutation(num_samples, f"rated pairs of {prompt_index}", seed)(np.arange(2 * num_pairs)).tolist()
    return [
        Pair(prompt_index, (f"sample-{min(two)}", f"sample-{max(two)}"))
        for two in zip(drawn[::2], drawn[1::2], strict=True)
    ]


def _in_order(
    kind: str, seed: int, turns: Iterable[tuple[int, Pair]], prompts: Mapping[int, str], tables: Mapping[int, Path]
) -> RatedImages:
    """All prompts in random order, one pair of each, then the next turn."""
    ordered = sorted(turns, key=lambda turn: (turn[0], key_of(seed, "order", turn[1].prompt_index, turn[0])))
    return RatedImages(kind, seed, [pair for _, pair in ordered], prompts, tables)


def pair_of(vote: Vote) -> Pair:
    first, second = sorted((vote["left"], vote["right"]), key=lambda name: (name.partition("-")[0], _number(name)))
    return Pair(vote["prompt_index"], (first, second))


def _number(name: str) -> int:
    return int(name.partition("-")[2])


def digest_of(png: bytes) -> str:
    """32 hex digits of a PNG's BLAKE2b."""
    return hashlib.blake2b(png, digest_size=16).hexdigest()


def votes_path(votes_dir: Path, kind: str, voter: str) -> Path:
    """File of a voter's votes on pairs of a kind.

    Raises:
        StoreError: a symbolic link on the way leads out of the folder of votes.
    """
    return path_within(votes_dir, f"{kind}/{voter}.jsonl")


def voted_files(votes_dir: Path, kind: str) -> dict[str, Path]:
    """Files of votes on pairs of a kind, by voter.

    Raises:
        StoreError: a name is not that of a voter, there are too many, or the storage fails.
    """
    folder = votes_dir / kind
    if not exists(folder):
        return {}
    with storage_errors(folder, "read"):
        names = sorted(path.name.removesuffix(".jsonl") for path in folder.glob("*.jsonl"))
    if len(names) > MAX_VOTERS or (wrong := [name for name in names if not VOTER.fullmatch(name)]):
        fault = (
            f"{len(names):,} voters, at most {MAX_VOTERS:,}" if len(names) > MAX_VOTERS else printable(repr(wrong[0]))
        )
        raise StoreError(f"{folder}: must hold files named after voters, got {fault}; delete or rename them")
    return {name: votes_path(votes_dir, kind, name) for name in names}


def read_votes(path: Path) -> list[Vote]:
    """Votes of a file, which somebody else may have written; empty if there is no such file.

    Raises:
        StoreError: lines are not votes, or two are on the same pair; names all of them, at most `SHOWN_FAULTS` in full.
    """
    try:
        lines = read_untrusted_bytes(path, remedy="delete it").splitlines()
    except FileNotFoundError:
        return []
    votes: list[Vote] = []
    faults: list[str] = []
    first: dict[Any, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            vote: Vote = validate_untrusted(line, _VOTE, where=f"line {number}", remedy="")
        except StoreError as error:
            faults.append(str(error).rstrip("; "))
            continue
        same = first.setdefault((pair_of(vote), *sorted((vote["left_digest"], vote["right_digest"]))), number)
        if vote["left"] == vote["right"]:
            faults.append(f"line {number}: must have two images, got {vote['left']} twice")
        elif same != number:
            faults.append(f"line {number}: is on the same pair as line {same}")
        votes.append(vote)
    if faults:
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise StoreError(f"{path}: {'; '.join(faults[:SHOWN_FAULTS])}{more}; delete these lines, or the file")
    return votes


def read_all_votes(votes_dir: Path, images: RatedImages) -> tuple[dict[str, list[Vote]], int]:
    """Votes of all voters on a run's images, by voter, and the number of votes on images that it does not have.

    Args:
        votes_dir: folder of the votes.

    Raises:
        StoreError: a file of votes is damaged, or an image cannot be read.
    """
    votes = {voter: read_votes(path) for voter, path in voted_files(votes_dir, images.kind).items()}
    current = {voter: found for voter in votes if (found := images.current(votes[voter]))}
    return current, sum(map(len, votes.values())) - sum(map(len, current.values()))


def write_votes(path: Path, votes: Iterable[Vote]) -> None:
    """Replace a file of votes atomically; also after a power failure it has the new content once this returns.

    Raises:
        StoreError: the storage fails.
    """
    make_folder(path.parent)
    write_text(path, "".join(f"{json.dumps(vote)}\n" for vote in votes))
    if is_local(path):
        with storage_errors(path):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name
            finally:
                os.close(folder)
