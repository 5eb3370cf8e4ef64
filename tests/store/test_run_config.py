"""`config.yaml` of a run agrees with the manifests of its steps; differences are named."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_runs import config_of, judged, write_run

from cdpo_ray.errors import StoreError
from cdpo_ray.records import EVALUATION
from cdpo_ray.run import round_folders
from cdpo_ray.store import CONFIG, MANIFEST, RunFolder

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "another ranks": {"rewards": {"names": ["clip", "jpeg_size"], "rank_by": "jpeg_size"}},
    "a weighted sum": {
        "rewards": {"names": ["clip", "jpeg_size"], "rank_by": "weighted_sum", "weights": {"clip": 2.0}},
        "generation": {"images_per_prompt": 6},
    },
    "perturbed prompts": {"rewards": {"names": ["perturbation"]}},
    "a pairwise judge": {
        "rewards": {
            "names": ["vlm_judge", "clip"],
            "rank_by": "vlm_judge",
            "vlm_judge": {"mode": "pairwise", "endpoint": {"url": "http://127.0.0.1:8000/v1", "model": "judge"}},
        },
    },
    "full": {"training": {"method": "full", "seed": 3}},
    "two rounds": {"rounds": 2},
}


def finished(folder: Path, name: str) -> RunFolder:
    config = config_of(folder, "embedded", **CONFIGS[name])
    metrics = {"judges": {"clip": judged(0.1, 0.2)}, "num_prompts": 4, "images_per_prompt": 4}
    write_run(config, lambda number, path: None, lambda number: metrics)
    run = round_folders(config)[-1]
    (run.path / CONFIG).write_text(yaml.safe_dump(config.plain(), sort_keys=False))
    return run


@pytest.mark.parametrize("name", CONFIGS)
def test_fault_59_the_configuration_of_a_run_agrees_with_its_manifests(name: str, tmp_path: Path) -> None:
    assert finished(tmp_path, name).config()["run"]["name"] == "tuned"


def test_a_manifest_of_an_earlier_version_says_nothing_about_the_grid_of_the_report(tmp_path: Path) -> None:
    run = finished(tmp_path, "plain")
    path = run.step(EVALUATION) / MANIFEST
    manifest = json.loads(path.read_text())
    assert "grid_prompts" not in manifest["settings"]["evaluation"]
    manifest["settings"]["evaluation"]["grid_prompts"] = 99
    path.write_text(json.dumps(manifest))
    assert run.config()["evaluation"]["grid_prompts"] == 12


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.beta", 501),
        ("training.lora.rank", 3),
        ("curriculum.num_stages", 2),
        ("generation.guidance_scale", 1.5),
        ("rewards.rank_by", "jpeg_size"),
        ("rewards.clip.scale", "logit"),
        ("evaluation.judges", ["clip"]),
        ("model.path", "elsewhere"),
        ("run.seed", 4),
        ("prompts.heldout.count", 5),
    ],
)
def test_fault_59_an_edited_setting_that_affects_results_is_named(key: str, value: object, tmp_path: Path) -> None:
    run = finished(tmp_path, "plain")
    values = yaml.safe_load((run.path / CONFIG).read_text())
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section[last] = value
    (run.path / CONFIG).write_text(yaml.safe_dump(values))
    with pytest.raises(StoreError, match=rf"config\.yaml: is not the configuration that .* was made with: .*`{key}`"):
        run.config()
