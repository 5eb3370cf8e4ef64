"""Several evaluated runs -> one comparison, from hand-made runs whose every number is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from cdpo_ray.errors import StoreError
from cdpo_ray.evaluation.runs import compare_runs, table_of
from cdpo_ray.generation.images import decode_png, encode_png
from cdpo_ray.records import EVALUATION
from cdpo_ray.rewards.jpeg_size import JpegSizeReward
from cdpo_ray.store import RunFolder

PROMPTS = ["a red circle", "<script>alert('owned')</script>", '" onerror="alert(1)']
NUM_IMAGES = 2


def image(seed: int, width: int = 8) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 8 + seed, size=(3, 8, width), dtype=np.uint8))


def evaluated(
    folder: Path, *, tuned: float = 0.5, seed: int = 1, without: str = "", appearance: bool = True, **settings: Any
) -> Path:
    """A run judged by `oracle` (base 0, 1, 2, ...; tuned is ``tuned`` more) and by `jpeg_size`, if not ``without``."""
    judges = [judge for judge in ("oracle", "jpeg_size") if judge != without]
    places = [(prompt, sample) for prompt in range(len(PROMPTS)) for sample in range(NUM_IMAGES)]
    images = {"base": [image(place) for place in range(len(places))]}
    images["tuned"] = [image(place + 20 * seed) for place in range(len(places))]
    rows: dict[str, Any] = {
        "prompt_index": [prompt for prompt, _ in places],
        "sample_index": [sample for _, sample in places],
        "prompt": settings.get("prompts") or [PROMPTS[prompt] for prompt, _ in places],
    }
    for arm in ("base", "tuned"):
        rows[f"{arm}_image"] = images[arm]
        oracle = np.arange(len(places)) + (tuned if arm == "tuned" else 0.0)
        rows |= {f"{arm}_score_{judge}": oracle if judge == "oracle" else jpeg(images[arm]) for judge in judges}
    rows["implicit_value"] = np.arange(len(places), dtype=np.float32)
    made = {
        "run.seed": settings.get("run_seed", 3),
        "model": {"path": "embedded", "compile": settings.get("compile", False)},
        "generation": {"guidance_scale": settings.get("guidance_scale", 1.0), "images_per_batch": 4},
        "evaluation": {"judges": judges, "images_per_prompt": NUM_IMAGES, "num_bootstrap_resamples": 100},
        "rewards.oracle": {},
        "rewards.jpeg_size": {"quality": settings.get("quality", 90)},
    }
    look = {"mean": 0.5, "low": 0.4, "high": 0.6}
    metrics = {"images_per_prompt": NUM_IMAGES}
    if appearance:
        comparison = {"base": look, "tuned": look, "difference": look, "win_rate": look, "num_missing": 0}
        metrics |= {"diversity": comparison, "appearance": {"saturation": comparison}}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"rewards": {"names": ["oracle"], "rank_by": None}}))
    with RunFolder(folder).writing(EVALUATION, made, {}, seed=3, resumable=False) as (output_dir, _):
        pq.write_table(pa.table(rows).take(list(range(len(places)))[::-1]), output_dir / "comparison.parquet")
        (output_dir / "metrics.json").write_text(json.dumps(metrics))
    return folder


def jpeg(pngs: list[bytes]) -> np.ndarray:
    return JpegSizeReward(90)(torch.from_numpy(np.stack([decode_png(png) for png in pngs])), [""] * len(pngs))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    one = evaluated(folder / "one", tuned=0.5)
    other = evaluated(folder / "<b>other", tuned=-2.0, seed=2, without="jpeg_size", appearance=False, compile=True)
    return folder, compare_runs([one, other], folder / "out")


def test_each_run_has_its_difference_to_the_base_by_each_judge(compared: tuple[Path, dict[str, Any]]) -> None:
    _, found = compared
    assert found["judges"] == ["oracle", "jpeg_size"]
    assert found["scores"]["one"]["oracle"]["difference"]["mean"] == 0.5
    assert found["scores"]["<b>other"]["oracle"]["difference"]["mean"] == -2
    assert {run["name"]: run["trained_on"] for run in found["runs"]} == {"one": "oracle", "<b>other": "oracle"}


def test_a_win_rate_is_counted_image_by_image_between_all_arms(compared: tuple[Path, dict[str, Any]]) -> None:
    _, found = compared
    assert found["arms"] == ["one", "<b>other", "base model"]
    rates = [[cell and cell["mean"] for cell in row] for row in found["win_rates"]["oracle"]]
    assert rates == [[None, 1, 1], [0, None, 0], [0, 1, None]]
    sizes = {"base model": jpeg([image(place) for place in range(6)])}
    sizes |= {
        name: jpeg([image(place + 20 * seed) for place in range(6)]) for name, seed in (("one", 1), ("<b>other", 2))
    }
    for row, row_name in enumerate(found["arms"]):
        for column, column_name in enumerate(found["arms"]):
            if row != column:
                wins = np.sign(sizes[row_name] - sizes[column_name]) / 2 + 0.5
                assert found["win_rates"]["jpeg_size"][row][column]["mean"] == pytest.approx(wins.mean())


def test_a_judge_that_a_run_lacks_scores_the_images_it_kept(compared: tuple[Path, dict[str, Any]]) -> None:
    _, found = compared
    assert found["scored_now"] == {"one": [], "<b>other": ["jpeg_size"]}
    expected = jpeg([image(place + 40) for place in range(6)]).mean()
    assert found["scores"]["<b>other"]["jpeg_size"]["tuned"]["mean"] == pytest.approx(expected)
    assert found["scores"]["<b>other"]["jpeg_size"]["base"] == found["scores"]["one"]["jpeg_size"]["base"]


def test_preference_accuracy_and_looks_are_told_of_runs_that_have_them(compared: tuple[Path, dict[str, Any]]) -> None:
    folder, found = compared
    assert found["preference_accuracy"]["one"]["oracle"]["mean"] == 1
    assert list(found["appearance"]["one"]) == ["diversity", "saturation"] and found["appearance"]["<b>other"] == {}
    assert json.loads((folder / "out" / "compare.json").read_text()) == found


def test_page_shows_all_arms_of_the_same_prompt_and_hostile_text_stays_text(
    compared: tuple[Path, dict[str, Any]],
) -> None:
    page = (compared[0] / "out" / "compare.html").read_text(encoding="utf-8")
    assert page.count("<img ") == len(PROMPTS) * NUM_IMAGES * 3
    assert "<script" not in page and 'onerror="' not in page and "<b>" not in page
    assert "&lt;b&gt;other" in page and "&lt;script&gt;alert(&#39;owned&#39;)&lt;/script&gt;" in page
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "").replace("www.w3.org", "")


def test_terminal_shows_a_row_a_run(compared: tuple[Path, dict[str, Any]]) -> None:
    header, base, one, other = table_of(compared[1]).split("\n")
    assert header.split() == ["run", "trained", "on", "oracle", "jpeg_size"]
    assert base.startswith("base model") and "2.50" in base
    assert one.startswith("one") and "3.00 (+0.50 [+0.50, +0.50])" in one
    assert other.startswith("<b>other") and "(−2.0 [−2.0, −2.0])" in other


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"run_seed": 4}, "`run.seed` is 3 and 4"),
        ({"guidance_scale": 7.5}, r"`generation.guidance_scale` is 1.0 and 7.5"),
        ({"quality": 50}, "`rewards.jpeg_size.quality` is 90 and 50"),
        ({"prompts": ["other"] * 6}, "`prompts.heldout` gives other prompts: number 1 is 'a red circle' and 'other'"),
    ],
)
def test_runs_that_were_not_put_to_the_same_test_are_refused_with_the_key(
    changed: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    runs = [evaluated(tmp_path / "one"), evaluated(tmp_path / "two", **changed)]
    with pytest.raises(StoreError, match=f"one and .*two were not put to the same test: {difference}; evaluate one"):
        compare_runs(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_given_twice_or_with_rounds_or_altered_is_refused(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "one")
    with pytest.raises(StoreError, match=r"one is given twice; name each run once"):
        compare_runs([run, tmp_path / "." / "one"], tmp_path)
    rounds = evaluated(tmp_path / "many" / "round-2").parent
    with pytest.raises(StoreError, match=r"many: has rounds; give the folder of one, for example .*many/round-2"):
        compare_runs([run, rounds], tmp_path)
    (rounds / "round-2" / EVALUATION / "metrics.json").write_text("{}")
    with pytest.raises(StoreError, match=r"metrics.json: was altered"):
        compare_runs([run, rounds / "round-2"], tmp_path)


def test_a_round_is_called_by_its_run(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / "many" / f"round-{number}", seed=number) for number in (1, 2)]
    assert compare_runs(runs, tmp_path)["arms"][:2] == ["many/round-1", "many/round-2"]
