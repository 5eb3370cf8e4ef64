"""Drawn pairs and their images -> one Parquet file per stage, which other trainers read."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from cdpo_ray.dataflow.images import NO_IMAGES, refuse_other_images
from cdpo_ray.errors import ExportError
from cdpo_ray.store import read_table, table_schema, write_tables

IMAGE_SIDES = ("jpg_0", "jpg_1")
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pair_schema(values: Mapping[str, str]) -> pa.Schema:
    """Columns of Pick-a-Pic and more; the metadata make the Hugging Face `datasets` decode the images.

    Args:
        values: column -> its type, of columns other than images.
    """
    features = {name: {"_type": "Value", "dtype": kind} for name, kind in values.items()}
    features |= {side: {"_type": "Image"} for side in IMAGE_SIDES}
    return pa.schema(
        [(name, pa.type_for_alias(kind)) for name, kind in values.items()] + [(side, _IMAGE) for side in IMAGE_SIDES],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )


SCHEMA = pair_schema(
    {
        "caption": "string",
        "label_0": "float64",
        "label_1": "float64",
        "rank_gap": "int64",
        "score_gap": "float64",
        "stage": "int64",
        "num_draws": "int64",
    }
)
_PAIR = ["prompt_index", "chosen", "rejected", "rank_gap", "score_gap"]


@dataclass(frozen=True)
class DrawnPairs:
    """Pairs of a run.

    Attributes:
        samples_dir: `1-samples`, with images.
        stages_dir: `3-stages`.
        num_stages: number of stages.
    """

    samples_dir: Path
    stages_dir: Path
    num_stages: int


def write_pairs(drawn: DrawnPairs, output_dir: Path) -> None:
    """Write ``stage-<k>.parquet`` for each stage, one row per distinct pair; one shard of images is held in memory.

    ``label_0`` is 1 where ``jpg_0`` is the chosen image, else 0; both are about equally frequent. ``label_1`` is the
    opposite.

    Raises:
        ExportError: the run did not keep its images.
        StoreError: an image is not a PNG of a limited size.
    """
    shards = sorted(drawn.samples_dir.glob("*.parquet"))
    for shard in shards:
        if "images" not in table_schema(shard).names:
            raise ExportError(f"{shard}: {NO_IMAGES}")
    for stage in range(1, drawn.num_stages + 1):
        files = sorted((drawn.stages_dir / f"stage-{stage}").glob("*.parquet"))
        pairs = pd.concat([read_table(file, _PAIR).to_pandas(ignore_metadata=True) for file in files])
        distinct = pairs.groupby(_PAIR, as_index=False, dropna=False).size().assign(stage=stage)
        write_tables(_stage_tables(shards, distinct), output_dir / stage_file(stage))


def stage_file(stage: int) -> str:
    """Name of the file of a stage, 1-based."""
    return f"stage-{stage}.parquet"


def _stage_tables(shards: list[Path], pairs: pd.DataFrame) -> Iterator[pa.Table]:
    """One table per shard of images that has pairs of the stage."""
    for shard in shards:
        prompts = read_table(shard, ["prompt_index", "prompt"]).to_pandas(ignore_metadata=True)
        own = pairs[pairs["prompt_index"].isin(prompts["prompt_index"])]
        if own.empty:
            continue
        images = read_table(shard, ["prompt_index", "images"], [("prompt_index", "in", own["prompt_index"].unique())])
        pngs = dict(zip(images["prompt_index"].to_pylist(), images["images"].to_pylist(), strict=True))
        captions = dict(zip(prompts["prompt_index"], prompts["prompt"], strict=True))
        yield pa.Table.from_pylist([_row(pair, captions, pngs, shard) for pair in own.to_dict("records")], SCHEMA)


def _row(pair: dict[str, Any], captions: dict[int, str], pngs: dict[int, list[bytes]], shard: Path) -> dict[str, Any]:
    prompt, sides = pair["prompt_index"], [pair["chosen"], pair["rejected"]]
    is_swapped = (prompt + sum(sides)) % 2 == 1
    images = []
    for sample in reversed(sides) if is_swapped else sides:
        png = pngs[prompt][sample]
        refuse_other_images(png, f"{shard}: image {sample} of prompt {prompt}")
        images.append({"bytes": png, "path": None})
    return {
        "caption": captions[prompt],
        **dict(zip(IMAGE_SIDES, images, strict=True)),
        "label_0": 0.0 if is_swapped else 1.0,
        "label_1": 1.0 if is_swapped else 0.0,
        "rank_gap": pair["rank_gap"],
        "score_gap": pair["score_gap"],
        "stage": pair["stage"],
        "num_draws": pair["size"],
    }
