"""Votes of people and the images that they rated -> preferences to train on."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from cdpo_ray.dataflow.images import refuse_other_images
from cdpo_ray.errors import ExportError
from cdpo_ray.evaluation.votes import PROMPTS_AT_ONCE, Pair, RatedImages, Vote, digest_of, pair_of, read_all_votes
from cdpo_ray.export.pairs import IMAGE_SIDES, pair_schema
from cdpo_ray.store import make_folder, write_tables

SCHEMA = pair_schema({"caption": "string", "label_0": "float64", "label_1": "float64", "num_votes": "int64"})


def export_votes(images: RatedImages, votes_dir: Path, path: Path) -> str:
    """Write one row per rated pair, in the columns of `preferences.format` pickapic; replaces an earlier file.

    ``label_0`` and ``label_1`` are the images' shares of the votes, a tie is half a vote. Which image is ``jpg_0``
    depends on their content alone.

    Args:
        votes_dir: folder of the votes.

    Returns:
        The number of rows, and how to train on them.

    Raises:
        ExportError: there are no votes.
        StoreError: a file of votes is damaged, or an image is not a PNG of a limited size.
    """
    by_voter, _ = read_all_votes(votes_dir, images)
    if not by_voter:
        raise ExportError(
            f"{votes_dir / images.kind}: there are no votes on images of this run; `cdpo rate` makes them"
        )
    votes: dict[int, list[Vote]] = defaultdict(list)
    for vote in (vote for found in by_voter.values() for vote in found):
        votes[vote["prompt_index"]].append(vote)
    make_folder(path.parent)
    write_tables(_tables(images, votes), path)
    num_pairs = len({pair_of(vote) for found in votes.values() for vote in found})
    return (
        f"{num_pairs:,} pairs, rated by {len(by_voter):,} {'voter' if len(by_voter) == 1 else 'voters'};"
        f" to train on them: preferences.path={path} preferences.format=pickapic"
    )


def _tables(images: RatedImages, votes: Mapping[int, Sequence[Vote]]) -> Iterator[pa.Table]:
    prompts = sorted(votes)
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        here = prompts[start : start + PROMPTS_AT_ONCE]
        pngs = images.pngs(here)
        by_pair: dict[Pair, list[Vote]] = defaultdict(list)
        for prompt in here:
            for vote in votes[prompt]:
                by_pair[pair_of(vote)].append(vote)
        yield pa.Table.from_pylist([_row(images, pair, found, pngs) for pair, found in by_pair.items()], SCHEMA)


def _row(
    images: RatedImages, pair: Pair, votes: Sequence[Vote], pngs: Mapping[tuple[int, str], bytes]
) -> dict[str, object]:
    named = {name: pngs[pair.prompt_index, name] for name in pair.images}
    for name, png in named.items():
        refuse_other_images(png, f"{images.tables[pair.prompt_index]}: {name} of prompt {pair.prompt_index}")
    order = sorted(named, key=lambda name: digest_of(named[name]))
    share = sum(0.5 if vote["choice"] == "tie" else vote[vote["choice"]] == order[0] for vote in votes) / len(votes)
    return {
        "caption": images.prompts[pair.prompt_index],
        "label_0": share,
        "label_1": 1 - share,
        "num_votes": len(votes),
        **{side: {"bytes": named[name], "path": None} for side, name in zip(IMAGE_SIDES, order, strict=True)},
    }
