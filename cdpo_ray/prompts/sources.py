"""Prompt sources -> training, validation and held-out prompts."""

import hashlib
import os
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import hf_hub_download

from cdpo_ray.config import PromptSource
from cdpo_ray.config.benchmarks import BENCHMARKS
from cdpo_ray.config.section import looked_for
from cdpo_ray.errors import PromptError
from cdpo_ray.hub import FETCH_ERRORS, how_to_download
from cdpo_ray.prompts.animals import animal_photo_prompts, animal_prompts
from cdpo_ray.prompts.faults import NUM_SHOWN
from cdpo_ray.prompts.files import read_file
from cdpo_ray.prompts.rows import Columns, Row
from cdpo_ray.store import refuse_special_file
from cdpo_ray.testbed.scenes import scene_prompts, scene_prompts_apart

PROMPT_SETS = {"animals": animal_prompts, "animal_photos": animal_photo_prompts}
BUILT_IN = (*PROMPT_SETS, "scenes")


@dataclass(frozen=True)
class PromptSplit:
    """Distinct prompts, in the order of their source; no prompt is on two sides.

    Attributes:
        train: prompts to train on.
        heldout: prompts to evaluate on.
        validation: prompts to judge the trials of a search by.
        categories: category of each held-out prompt that has one.
        num_read: number of prompts that the sources hold, including duplicate and empty ones.
        num_doubled: number of prompts left out as exact duplicates of earlier ones.
        num_empty: number of prompts left out because they are empty or white space.
        num_recategorized: number of the duplicates whose category, which is dropped, differs from the first's.
        sha256: SHA-256 of the file by side; without sources that are built in or pinned.
    """

    train: list[str]
    heldout: list[str]
    num_read: int
    num_doubled: int = 0
    num_empty: int = 0
    validation: list[str] = field(default_factory=list)
    categories: Mapping[str, str] = field(default_factory=dict)
    num_recategorized: int = 0
    sha256: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def num_beyond_count(self) -> int:
        """Number of prompts left out because of `count`."""
        kept = len(self.train) + len(self.heldout) + len(self.validation)
        return self.num_read - self.num_doubled - self.num_empty - kept


@dataclass(frozen=True)
class PromptList:
    """Distinct prompts of one source, the categories that they have, and the numbers of those left out.

    See `PromptSplit`.
    """

    prompts: list[str]
    num_read: int
    num_doubled: int = 0
    num_empty: int = 0
    categories: Mapping[str, str] = field(default_factory=dict)
    num_recategorized: int = 0
    sha256: str | None = field(default=None, compare=False)


def split_prompts(
    train: PromptSource | Sequence[str], heldout: PromptSource, validation: PromptSource | None = None, *, seed: int
) -> PromptSplit:
    """Read the sources and split their prompts into training, held-out and validation prompts.

    Args:
        train: source, or prompts of preference data.
        heldout, validation: sources of the other sides.
        seed: seed of the prompts of `scenes`.

    Raises:
        PromptError: a source is missing, invalid, empty or too short, or a prompt is on two sides, possibly with other
            case, spaces or punctuation.
    """
    if isinstance(train, PromptSource):
        found, train_count = read_prompts(train, "train", seed), train.count
    else:
        found, train_count = _without_doubles([Row(prompt) for prompt in train]), None
    lists, sides, taken, start = {"train": found}, {"train": found.prompts}, set[str](), 0.0
    for side, source in {"heldout": heldout, "validation": validation}.items():
        if source is None:
            continue
        if source.fraction is None:
            lists[side] = read_prompts(source, side, seed, apart_from=sides.get("heldout", ()))
            sides[side] = lists[side].prompts
        else:
            end = start + source.fraction
            share = [prompt for prompt in found.prompts if start <= _hash_position(prompt) < end]
            taken |= {*share}
            sides[side], start = share[: source.count], end
    sides["train"] = [prompt for prompt in found.prompts if prompt not in taken]
    _refuse_shared(sides)
    counts = {
        "train": None if start else train_count,
        "heldout": heldout.count,
        "validation": validation.count if validation else None,
    }
    for side, prompts in sides.items():
        if len(prompts) < (counts[side] or 1):
            raise PromptError(
                f"`prompts.{side}`: needs {counts[side] or 'at least 1'} prompts, got {len(prompts)};"
                " add prompts, or lower `count`"
            )
    known = lists.get("heldout", found).categories
    return PromptSplit(
        sides["train"],
        sides["heldout"],
        sum(each.num_read for each in lists.values()),
        sum(each.num_doubled for each in lists.values()),
        sum(each.num_empty for each in lists.values()),
        sides.get("validation", []),
        {prompt: known[prompt] for prompt in sides["heldout"] if prompt in known},
        sum(each.num_recategorized for each in lists.values()),
        {side: each.sha256 for side, each in lists.items() if each.sha256},
    )


def _hash_position(prompt: str) -> float:
    """Hash of a prompt's `wording`, scaled to [0, 1)."""
    digest = hashlib.blake2b(f"heldout:{wording(prompt)}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def is_held_out(prompt: str, fraction: float) -> bool:
    """Whether a prompt is in the held-out fraction; depends only on its `wording`."""
    return _hash_position(prompt) < fraction


def held_out(prompts: Sequence[str], fraction: float | None) -> list[bool]:
    """For each prompt, whether it is in the held-out fraction; ``None``: no prompt is."""
    return [fraction is not None and is_held_out(prompt, fraction) for prompt in prompts]


def wording(prompt: str) -> str:
    """Words of a prompt, without regard to case, spaces and punctuation; the prompt itself if it has no words."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).casefold())) or prompt


def read_prompts(source: PromptSource, side: str, seed: int, apart_from: Sequence[str] = ()) -> PromptList:
    """Distinct prompts of a source, at most its ``count``.

    Args:
        side: `train`, `heldout` or `validation`; named in errors, and selects the split of `scenes`.
        seed: seed of `scenes`.
        apart_from: held-out prompts of `scenes`, whose scenes the validation prompts must not show.

    Raises:
        PromptError: the source is missing, invalid or empty.
    """
    assert source.source is not None, "checked by the config"
    if source.source == "scenes":
        try:
            count = source.count or 128
            if side == "validation":
                scenes = scene_prompts_apart(apart_from, count, seed)
            else:
                scenes = scene_prompts("train" if side == "train" else "heldout", count, seed)
        except ValueError as error:
            raise PromptError(f"`prompts.{side}.source` scenes: {error}") from None
        return PromptList(scenes, len(scenes))
    built_in = PROMPT_SETS.get(source.source)
    given, sha256 = ([Row(prompt) for prompt in built_in()], None) if built_in else _read_files(source, side)
    rows = [Row(prompt.strip(), category) for prompt, category in given]
    found = _without_doubles([row for row in rows if row.prompt])
    if not found.prompts:
        raise PromptError(f"`prompts.{side}.source` {source.source}: has no prompts; write one prompt per line")
    return replace(
        found,
        prompts=found.prompts[: source.count],
        num_read=len(rows),
        num_empty=len(rows) - found.num_read,
        sha256=sha256,
    )


def _without_doubles(rows: Sequence[Row]) -> PromptList:
    """The first row of each prompt decides its category."""
    first: dict[str, str] = {}
    for prompt, category in rows:
        first.setdefault(prompt, category)
    num_recategorized = sum(category not in ("", first[prompt]) for prompt, category in rows)
    return PromptList(
        [*first],
        len(rows),
        len(rows) - len(first),
        categories={prompt: category for prompt, category in first.items() if category},
        num_recategorized=num_recategorized,
    )


def content_sha256(source: PromptSource, side: str) -> str | None:
    """SHA-256 of a local file, or of all files of a benchmark; ``None``: the name or the revision identifies them.

    Raises:
        PromptError: a file cannot be read.
    """
    if source.source is None or source.source in BUILT_IN or source.revision is not None:
        return None
    digest = hashlib.sha256()
    for path in _files(source, side):
        try:
            refuse_special_file(path)
            with path.open("rb") as handle:
                while block := handle.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise _cannot_be_read(side, source, path, error) from None
    return digest.hexdigest()


def _read_files(source: PromptSource, side: str) -> tuple[list[Row], str | None]:
    """Prompts of a source's files, unchanged, and its `content_sha256`."""
    sha256 = content_sha256(source, side)
    paths, rows = _files(source, side), list[Row]()
    for path in paths:
        try:
            found = read_file(path, Columns(source.column, source.category_column))
        except OSError as error:
            raise _cannot_be_read(side, source, path, error) from None
        rows += found if len(paths) == 1 else [Row(row.prompt, path.stem) for row in found]
    if content_sha256(source, side) != sha256:
        raise PromptError(
            f"`prompts.{side}.source` {source.source}: changed while it was being read; run the same command again"
        )
    return rows, sha256


def _files(source: PromptSource, side: str) -> list[Path]:
    """Files that hold the prompts of a source; those on the hub are downloaded, unless they are in its cache.

    Raises:
        PromptError: a file cannot be downloaded.
    """
    name = str(source.source)
    benchmark = BENCHMARKS.get(name)
    if source.revision is None:
        place = Path(source.path or name)
        return [place / Path(file).name for file in benchmark.files] if benchmark and benchmark.files[1:] else [place]
    hub_id, files = (benchmark.hub_id, benchmark.files) if benchmark else (name, (str(source.file),))
    found = []
    for file in files:
        try:
            found.append(Path(hf_hub_download(hub_id, file, repo_type="dataset", revision=source.revision)))
        except FETCH_ERRORS as error:
            key, file = f"prompts.{side}.source", shlex.quote(file)
            raise PromptError(how_to_download(hub_id, file, source.revision, error, key=key, dataset=True)) from None
    return found


def _cannot_be_read(side: str, source: PromptSource, path: Path, error: OSError) -> PromptError:
    key, name = ("path", str(path)) if source.path else ("source", str(source.source))
    reason = f"{error.strerror}: {looked_for(str(path))}"
    if os.path.isdir(path):
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        reason = f"is a folder; name one of its files: {', '.join(files[:NUM_SHOWN]) or 'it holds none'}"
    elif "://" in name:
        reason = "is a URL; download the file first"
    names = ", ".join((*BUILT_IN, *BENCHMARKS))
    return PromptError(
        f"`prompts.{side}.{key}` {name}: {reason}; give a file of prompts, one of {names}, or a hub data set with its"
        " `file` and `revision`"
    )


def _refuse_shared(sides: Mapping[str, list[str]]) -> None:
    for side, prompts in sides.items():
        for other, theirs in sides.items():
            if other == side:
                break
            words = {wording(prompt) for prompt in theirs}
            if both := [prompt for prompt in prompts if wording(prompt) in words]:
                shown = ", ".join(repr(prompt) for prompt in sorted(both)[:3])
                use, consequence = {
                    "train": ("trained on", "a gain on them would prove nothing"),
                    "heldout": ("held out", "the schedule chosen by them would be evaluated on prompts it has seen"),
                }[other]
                raise PromptError(
                    f"`prompts.{side}`: {len(both)} of its {len(prompts)} prompts are also {use}"
                    f" ({shown}{', ...' * (len(both) > 3)}), so {consequence};"
                    f" remove them from one side, or give `{side}` a `fraction` of the training source"
                )
