"""`cdpo judge` without Ray: faults of candidates, and which of their steps another value invalidates."""

from pathlib import Path
from typing import Any

import pytest
from finished_runs import config_of, policy_of, save_policy, write_run

from cdpo_ray.config import Config, load_config
from cdpo_ray.errors import CdpoError, ConfigError, ModelError
from cdpo_ray.judge import judge_candidates, refuse_candidates
from cdpo_ray.records import CANDIDATES, SAMPLES, SCORES, TRAINING
from cdpo_ray.run import read_prompts, run_dir_of
from cdpo_ray.steps.candidates import Candidate, candidates_of
from cdpo_ray.store import differences


def judging(folder: Path, candidates: dict[str, Any], **sections: Any) -> Config:
    run = {"name": "judge", "dir": str(folder), "seed": 3}
    return config_of(folder, "embedded", **{"run": run, "judge": {"candidates": candidates}} | sections)


def candidate_of(config: Config, name: str) -> Candidate:
    return next(each for each in candidates_of(config, run_dir_of(config)) if each.name == name)


@pytest.mark.parametrize(
    ("candidates", "fault"),
    [
        ({}, "`judge.candidates` must not be empty"),
        ({"base": {"run": "x"}}, "`candidates.base` must have another name: 'base' is the model of `model`"),
        ({"a/b": {"run": "x"}}, r"judge.candidates: a name must have .* got 'a/b'; it names a folder"),
        ({"..": {"run": "x"}}, r"begin with a letter or digit, got '\.\.'"),
        ({"a": {"run": "x"}, "A": {"run": "y"}}, r"must differ by more than case, .* got \['a', 'A'\]"),
        ({"a": {}}, "judge.candidates.a: must have exactly one of run, adapter, model, images, got none"),
        ({"a": {"run": "x", "images": "y"}}, "must have exactly one of .*, got run and images"),
        ({"a": {"run": "x", "trained_on": ["clip"]}}, "`trained_on` must not be given with `run`"),
        (
            {"a": {"adapter": "x", "trained_on": ["hpsv2"]}},
            r"`judge.candidates.a.trained_on` must be of \['clip', 'orac",
        ),
        ({"a": {"modle": {}}}, "unknown key `judge.candidates.a.modle`; did you mean `judge.candidates.a.model`"),
        ({"a": {"model": {"path": "no/thing"}}}, "`judge.candidates.a.model`: `path` .* needs `revision`"),
    ],
)
def test_faults_of_candidates_are_found_with_the_configuration(
    candidates: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=fault):
        judging(tmp_path, candidates)


def test_the_reference_is_a_candidate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`reference` must be one of \['base', 'a'\], got 'b'"):
        judging(tmp_path, {}, judge={"candidates": {"a": {"run": "x"}}, "reference": "b"})


def test_a_single_file_is_a_model_of_the_families_that_have_them(tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").touch()
    model = {"family": "flux", "path": str(tmp_path)}
    candidates = {"a": {"model": {"path": str(tmp_path / "file.safetensors")}}}
    with pytest.raises(ConfigError, match=r"`judge\.candidates\.a\.model`: .* single files are loaded for"):
        config_of(tmp_path, tmp_path, judge={"candidates": candidates}, model=model)


def test_a_configuration_without_candidates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`judge` is missing, but `cdpo judge` needs it"):
        judge_candidates(config_of(tmp_path, "embedded"))


def test_fault_65_all_candidates_that_cannot_be_tried_are_named_before_ray_starts(tmp_path: Path) -> None:
    trained = config_of(tmp_path, "embedded")
    write_run(trained, lambda number, folder: save_policy(policy_of(trained), folder))
    (tmp_path / "images").mkdir()
    candidates = {
        "absent": {"run": str(tmp_path / "nothing")},
        "file": {"adapter": str(tmp_path / "nothing.safetensors")},
        "theirs": {"images": str(tmp_path / "images")},
        "fine": {"run": str(run_dir_of(trained))},
    }
    config = judging(tmp_path, candidates)
    with pytest.raises(ConfigError) as caught:
        judge_candidates(config)
    head, *lines = str(caught.value).split("\n")
    assert head == "3 problems"
    for line, (name, what) in zip(
        lines,
        {
            "absent.run": "has no finished 4-training; give the folder of a trained run",
            "file.adapter": "no such file or folder; give a LoRA in safetensors",
            "theirs.images": "has none of metadata.jsonl",
        }.items(),
        strict=True,
    ):
        assert f"`judge.candidates.{name}` " in line and what in line
    assert not run_dir_of(config).exists()


def test_a_run_of_another_base_model_and_a_damaged_one_are_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    trained = config_of(tmp_path, "embedded")
    write_run(trained, lambda number, folder: save_policy(policy_of(trained), folder))
    candidates = {"mine": {"run": str(run_dir_of(trained))}}

    def refuse(config: Config) -> None:
        refuse_candidates(config, candidates_of(config, run_dir_of(config)), read_prompts(config))

    refuse(judging(tmp_path, candidates))
    other = judging(tmp_path, candidates, model={"path": str(tiny_sd15)})
    with pytest.raises(ModelError, match=r"was trained on embedded, of the family stable_diffusion, unlike `model`;"):
        refuse(other)
    weights = next((run_dir_of(trained) / TRAINING).rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(CdpoError, match="was altered"):
        refuse(judging(tmp_path, candidates))


CHANGES: dict[str, tuple[list[str], set[str]]] = {
    "a judge": (["evaluation.judges=[clip,oracle,jpeg_size]"], {SCORES}),
    "an option of a judge": (["rewards.clip.scale=logit"], {SCORES}),
    "images per prompt": (["evaluation.images_per_prompt=2"], {SAMPLES}),
    "held-out prompts": (["prompts.heldout.count=5"], {SAMPLES}),
    "the seed": (["run.seed=4"], {SAMPLES}),
    "sampling": (["generation.num_denoising_steps=4"], {SAMPLES}),
    "the base model": (["model.dtype=bfloat16"], {SAMPLES}),
    "training prompts": (["prompts.train.count=7"], set()),
    "training images": (["generation.images_per_prompt=5"], set()),
    "training": (["training.beta=1"], set()),
    "another candidate": (["judge.candidates.other={adapter: x}"], set()),
    "the reference": (["judge.reference=mine"], set()),
    "what is known of the reward": (["judge.candidates.mine.trained_on=[clip]"], set()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_invalidates_only_what_it_decides(what: str, tmp_path: Path) -> None:
    overrides, invalidated = CHANGES[what]
    before = judging(tmp_path, {"mine": {"adapter": "x"}})
    after = load_config(before.model_dump(mode="json", exclude_unset=True), overrides)
    changed = set()
    for step, now in zip(*(candidate_of(config, "base").steps for config in (before, after)), strict=True):
        then = step.settings(candidate_of(before, "base").config)
        if differences(then, now.settings(candidate_of(after, "base").config)):
            changed.add(step.folder)
    assert changed == invalidated


def test_other_content_of_a_candidate_invalidates_it(tmp_path: Path) -> None:
    file, images = tmp_path / "a.safetensors", tmp_path / "images"
    images.mkdir()
    config = judging(tmp_path, {"mine": {"adapter": str(file)}, "theirs": {"images": str(images)}})
    made = []
    for content in ("one", "other"):
        file.write_text(content)
        (images / "metadata.jsonl").write_text(content)
        made.append([step.settings(config) for step in (candidate_of(config, n).steps[0] for n in ("mine", "theirs"))])
    assert "`adapter.sha256`" in differences(made[0][0], made[1][0])
    assert "`images.sha256`" in differences(made[0][1], made[1][1])


def test_a_later_judge_is_missing_from_the_scores_and_not_from_the_images(tmp_path: Path) -> None:
    before = judging(tmp_path, {"mine": {"adapter": "x"}})
    base = candidate_of(before, "base")
    assert base.folder.path == run_dir_of(before) / CANDIDATES / "base"
    base.folder.path.mkdir(parents=True)
    for step in base.steps:
        settings, inputs = step.settings(base.config), step.fingerprints(base.config, base.folder)
        with base.folder.writing(step.folder, settings, inputs, seed=3, resumable=False, grows=step.grows):
            pass
    after = candidate_of(load_config(before.model_dump(mode="json", exclude_unset=True), CHANGES["a judge"][0]), "base")
    complete = {
        step.folder: after.folder.is_complete(
            step.folder,
            step.settings(after.config),
            step.fingerprints(after.config, after.folder),
            grows=step.grows,
        )
        for step in after.steps
    }
    assert complete == {SAMPLES: True, SCORES: False}
