"""`cdpo export --format pairs`, read by the Hugging Face `datasets` and compared with the run's tables."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cdpo_ray.errors import ExportError, StoreError
from cdpo_ray.export.card import pairs_card
from cdpo_ray.export.folder import write_export
from cdpo_ray.export.pairs import DrawnPairs
from cdpo_ray.preferences.files import read_rows, scan
from cdpo_ray.preferences.rows import PreferenceSource, Row

PROMPTS = {0: "a red circle", 1: "a blue | square", 7: "a green cross"}
DRAWN = {
    1: [(0, 2, 0, 2), (7, 0, 2, 2), (0, 2, 0, 2)],
    2: [(0, 2, 1, 1), (0, 1, 0, 1), (1, 0, 1, 1), (7, 0, 1, 1), (1, 0, 1, 1), (1, 0, 1, 1)],
}
"""Stage -> prompt, chosen, rejected and rank gap of each draw."""
SETTINGS: dict[str, Any] = {
    "model": {"path": "embedded", "revision": None},
    "prompts": {"train": {"source": "scenes"}},
    "preferences": None,
    "generation": {"images_per_prompt": 3},
    "rewards": {"names": ["clip"], "weights": {}},
}


def png(prompt: int, sample: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (prompt, sample, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def drawn(tmp_path: Path) -> DrawnPairs:
    """Pairs of two stages over two shards of images."""
    (tmp_path / "samples").mkdir()
    for shard in ([0, 1], [7]):
        table = {
            "prompt_index": shard,
            "prompt": [PROMPTS[prompt] for prompt in shard],
            "images": [[png(prompt, sample) for sample in range(3)] for prompt in shard],
        }
        pq.write_table(pa.table(table), tmp_path / "samples" / f"samples-{shard[0]}.parquet")
    for stage, rows in DRAWN.items():
        (tmp_path / f"stages/stage-{stage}").mkdir(parents=True)
        columns = dict(zip(("prompt_index", "chosen", "rejected", "rank_gap"), zip(*rows, strict=True), strict=True))
        score_gap = [row[3] / 8 for row in rows]
        table = pa.table(columns | {"score_gap": score_gap, "stage": [stage] * len(rows), "draw": range(len(rows))})
        pq.write_table(table, tmp_path / f"stages/stage-{stage}/pairs-000000.parquet")
    return DrawnPairs(tmp_path / "samples", tmp_path / "stages", 2)


def test_datasets_opens_the_folder_and_every_row_is_a_drawn_pair_with_its_images(
    drawn: DrawnPairs, tmp_path: Path
) -> None:
    card = pairs_card("tuned", SETTINGS, 2, "clip", "two stages")
    write_export("pairs", drawn, card, tmp_path / "out")
    found = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {*found} == {"stage_1", "stage_2"}
    captions = {caption: prompt for prompt, caption in PROMPTS.items()}
    for stage, rows in DRAWN.items():
        split = found[f"stage_{stage}"]
        assert split.features["jpg_0"] == split.features["jpg_1"] == datasets.Image()
        seen = Counter()
        for row in split:
            sides = [np.asarray(row[side])[0, 0].tolist() for side in ("jpg_0", "jpg_1")]
            chosen, rejected = sides if row["label_0"] == 1 else reversed(sides)
            prompt = captions[row["caption"]]
            assert chosen[0] == rejected[0] == prompt and row["stage"] == stage
            assert row["score_gap"] == row["rank_gap"] / 8
            seen[(prompt, chosen[1], rejected[1], row["rank_gap"])] = row["num_draws"]
        assert seen == Counter(rows)
    labels = [row["label_0"] for split in found.values() for row in split.select_columns(["label_0"])]
    assert {*labels} == {0.0, 1.0}


def test_the_pairs_are_preferences_that_a_run_can_import(drawn: DrawnPairs, tmp_path: Path) -> None:
    write_export("pairs", drawn, "", tmp_path / "out")
    source = PreferenceSource(str(tmp_path / "out"), "pickapic")
    rows = [row for chunk in scan(source).chunks for row in read_rows(chunk, source)]
    assert all(isinstance(row, Row) for row in rows)
    assert Counter((row.prompt, tuple(sorted(row.labels))) for row in rows if isinstance(row, Row)) == {
        ("a red circle", (0.0, 1.0)): 3,
        ("a blue | square", (0.0, 1.0)): 1,
        ("a green cross", (0.0, 1.0)): 2,
    }


def test_images_that_were_not_kept_or_are_no_png_are_refused(drawn: DrawnPairs, tmp_path: Path) -> None:
    shard = drawn.samples_dir / "samples-7.parquet"
    table = pq.read_table(shard)
    damaged = table.set_column(2, "images", pa.array([[b"GIF89a"] * 3]))
    pq.write_table(damaged, shard)
    with pytest.raises(StoreError, match=r"samples-7.parquet: image 2 of prompt 7: is not a readable PNG"):
        write_export("pairs", drawn, "", tmp_path / "out")
    pq.write_table(table.drop_columns("images"), shard)
    with pytest.raises(ExportError, match=r"samples-7.parquet: holds latents but no images; `generation.keep_images"):
        write_export("pairs", drawn, "", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_card_of_pairs_names_model_rewards_and_curriculum() -> None:
    card = pairs_card("tuned", SETTINGS, 2, "clip", "two stages")
    assert "generated by the embedded model of cdpo\\_ray, for prompts of scenes." in card
    assert "Scored by clip; ranked by clip." in card and "Curriculum: two stages." in card
    imported = SETTINGS | {"preferences": {"path": "<b>judged.csv", "format": "pairs"}}
    assert "imported from &lt;b&gt;judged.csv (pairs)." in pairs_card("tuned", imported, 2, "label", "two stages")
    local = SETTINGS | {"model": {"path": "/home/alice/sd15", "revision": None}}
    assert "generated by sd15, for prompts of scenes." in pairs_card("tuned", local, 2, "clip", "two stages")
