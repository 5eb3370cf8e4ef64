"""Human preferences through the whole pipeline on a real local Ray, in the embedded world."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from preference_sets import pickapic_rows, write_parquet
from safetensors.torch import load_file

from cdpo_ray.cli import main
from cdpo_ray.prompts.sources import is_held_out
from cdpo_ray.records import SAMPLES, SCORES, STAGES, TRAINING
from cdpo_ray.store import read_shards

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

NUM_ROWS, FRACTION = 60, 0.3
TIED, UNLABELLED, BROKEN, NO_PROMPT, SWAPPED = 1, 4, 7, 20, (10, 11, 12)


@pytest.fixture(scope="module")
def config_path(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pick-a-Pic's columns, CLIP's gap as difficulty; two rows cannot be used, some labels are against CLIP."""
    folder = tmp_path_factory.mktemp("imported")
    rows = pickapic_rows(NUM_ROWS)
    rows[TIED] |= {"label_0": 0.5, "label_1": 0.5}
    rows[UNLABELLED]["has_label"] = False
    rows[BROKEN]["jpg_1"] = rows[BROKEN]["jpg_1"][:50]
    rows[NO_PROMPT]["caption"] = None
    for row in SWAPPED:
        rows[row] |= {"label_0": rows[row]["label_1"], "label_1": rows[row]["label_0"]}
    write_parquet(rows, folder / "judged.parquet", rows_per_group=25)
    values = {
        "run": {"name": "judged", "dir": str(folder / "runs")},
        "prompts": {"heldout": {"fraction": FRACTION, "count": 4}},
        "preferences": {"path": str(folder / "*.parquet"), "format": "pickapic", "max_bad_fraction": 0.04},
        "model": {"path": "embedded"},
        "generation": {"num_denoising_steps": 3, "guidance_scale": 1.0, "images_per_batch": 16},
        "rewards": {"names": ["clip"]},
        "curriculum": {"measure": "score_gap_quantile", "num_stages": 2, "updates_per_stage": 3},
        "training": {"beta": 200, "learning_rate": 1e-3, "global_batch_size": 8},
        "evaluation": {"images_per_prompt": 2, "judges": ["oracle"], "num_bootstrap_resamples": 200},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def test_checking_names_the_faulty_image_by_file_and_row_and_writes_nothing(
    config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(config_path), "--check"]) == 2
    printed = capsys.readouterr()
    where = f"{config_path.parent}/judged.parquet"
    no_prompt, broken, *_ = printed.out.split("\n")
    assert no_prompt == f"{where}:{NO_PROMPT + 1}: `caption` must be a non-empty string, got None"
    assert broken.startswith(f"{where}:{BROKEN + 1}: image 1 is ")
    assert printed.out.endswith(
        f"1 file, {NUM_ROWS} rows: {NUM_ROWS - 3} with a preference, 1 tied, 1 unlabelled, 1 cannot be read\n"
        f"tied: {where}:{TIED + 1}\nunlabelled: {where}:{UNLABELLED + 1}\n"
    )
    assert printed.err.endswith("PreferenceError: 2 faults\n")
    assert not (config_path.parent / "runs").exists()


@pytest.fixture(scope="module")
def run_dir(config_path: Path) -> Path:
    assert main(["run", str(config_path)]) == 0
    return config_path.parent / "runs" / "judged"


def test_every_row_is_imported_or_counted(run_dir: Path) -> None:
    manifest = json.loads((run_dir / SAMPLES / "manifest.json").read_text())
    counts = manifest["counts"]
    left_out = counts["rows_tied"] + counts["rows_unlabelled"] + counts["rows_set_aside"]
    assert (counts["rows"], left_out, counts["rows_imported"]) == (NUM_ROWS, 4, NUM_ROWS - 4)
    faults = list(map(json.loads, (run_dir / SAMPLES / "set_aside.jsonl").read_text().splitlines()))
    assert [fault["number"] for fault in faults] == [BROKEN + 1, NO_PROMPT + 1]
    assert counts["rows_with_faults"] == 2
    imported = read_shards(run_dir / SAMPLES, ["prompt_index"])["prompt_index"].to_pylist()
    assert imported == [row for row in range(NUM_ROWS) if row not in (TIED, UNLABELLED, BROKEN, NO_PROMPT)]


def test_pairs_are_in_the_labels_order_with_clips_gap_and_never_of_a_held_out_prompt(run_dir: Path) -> None:
    samples = read_shards(run_dir / SAMPLES, ["prompt_index", "prompt", "score_label", "score_clip"]).to_pylist()
    by_index = {row["prompt_index"]: row for row in samples}
    seen = set()
    for stage in (1, 2):
        for pair in read_shards(
            run_dir / STAGES / f"stage-{stage}", ["prompt_index", "chosen", "rejected", "score_gap"]
        ).to_pylist():
            row = by_index[pair["prompt_index"]]
            chosen, rejected = pair["chosen"], pair["rejected"]
            assert row["score_label"][chosen] > row["score_label"][rejected]
            assert pair["score_gap"] == row["score_clip"][chosen] - row["score_clip"][rejected] > 0
            assert not is_held_out(row["prompt"], FRACTION)
            seen.add(pair["prompt_index"])
    trained = pq.read_table(run_dir / SCORES / "label.parquet")["prompt_index"].unique().to_pylist()
    assert seen <= set(trained)
    assert trained == [index for index, row in by_index.items() if not is_held_out(row["prompt"], FRACTION)]
    counts = json.loads((run_dir / STAGES / "manifest.json").read_text())["counts"]
    against = [
        index
        for index in trained
        if np.diff(by_index[index]["score_label"])[0] * np.diff(by_index[index]["score_clip"])[0] <= 0
    ]
    assert counts["pairs_disagreeing_with_label"] == len(against) >= 1
    assert not seen & set(against)


def test_what_was_imported_trains_a_lora_and_is_measured_on_labels_held_out(run_dir: Path) -> None:
    weights = load_file(run_dir / TRAINING / "lora" / "pytorch_lora_weights.safetensors")
    assert max(float(value.abs().max()) for name, value in weights.items() if "lora_B" in name or "up" in name) > 0
    labels = json.loads((run_dir / "5-evaluation" / "metrics.json").read_text())["labels"]
    samples = read_shards(run_dir / SAMPLES, ["prompt", "score_label", "score_clip"]).to_pylist()
    held = [row for row in samples if is_held_out(row["prompt"], FRACTION)]
    agreeing: dict[str, list[bool]] = {}
    for row in held:
        agrees = np.diff(row["score_label"])[0] * np.diff(row["score_clip"])[0] > 0
        agreeing.setdefault(row["prompt"], []).append(agrees)
    assert labels["clip"]["mean"] == pytest.approx(np.mean([np.mean(each) for each in agreeing.values()]))
    assert labels["policy"]["num_prompts"] == len(agreeing)
    assert 0 <= labels["policy"]["mean"] <= 1
    assert "Agreement with human preferences" in (run_dir / "report.html").read_text()


def test_the_same_command_finds_all_done_and_a_changed_file_is_refused(
    run_dir: Path, config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifests = {path: path.stat().st_mtime_ns for path in run_dir.glob("*/manifest.json")}
    assert main(["run", str(config_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in run_dir.glob("*/manifest.json")} == manifests
    write_parquet(pickapic_rows(NUM_ROWS + 1), config_path.parent / "judged.parquet")
    assert main(["import", str(config_path)]) == 2
    assert f"StoreError: {run_dir}/1-samples was made with `preferences.files` = " in capsys.readouterr().err
