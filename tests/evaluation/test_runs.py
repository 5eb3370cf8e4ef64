"""Comparison of several evaluated runs, on synthetic runs with known numbers."""

import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from finished_runs import config_of

from cdpo_ray.cli import main
from cdpo_ray.config import VlmAlignmentOptions, options_without_choices
from cdpo_ray.dataflow.images import decode_png, encode_png
from cdpo_ray.errors import RewardError, StoreError
from cdpo_ray.evaluation.runs import compare_runs, table_of
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
    """A run judged by `oracle` (base 0, 1, 2, ...; tuned: ``tuned`` higher) and by `jpeg_size`, unless ``without``."""
    judges = [judge for judge in ("oracle", "jpeg_size") if judge != without]
    places = [(prompt, sample) for prompt in range(settings.get("num_prompts", 3)) for sample in range(NUM_IMAGES)]
    images = {"base": [image(place) for place in range(len(places))]}
    images["tuned"] = [image(place + 20 * seed) for place in range(len(places))]
    rows: dict[str, Any] = {
        "prompt_index": [prompt for prompt, _ in places],
        "sample_index": [sample for _, sample in places],
        "prompt": settings.get("prompts") or [PROMPTS[prompt % 3] for prompt, _ in places],
    }
    for arm in ("base", "tuned"):
        rows[f"{arm}_image"] = images[arm]
        oracle = np.arange(len(places)) + (tuned if arm == "tuned" else 0.0)
        rows |= {f"{arm}_score_{judge}": oracle if judge == "oracle" else jpeg(images[arm]) for judge in judges}
    rows["implicit_value"] = np.arange(len(places), dtype=np.float32)
    judges += list(settings.get("more_judges", {}))
    made = {
        "run.seed": settings.get("run_seed", 3),
        "model": {
            "path": "embedded",
            "compile": settings.get("compile", False),
            "quantization": settings.get("quantization"),
        },
        "generation": {"guidance_scale": settings.get("guidance_scale", 1.0), "images_per_batch": 4},
        "evaluation": {"judges": judges, "images_per_prompt": NUM_IMAGES, "num_bootstrap_resamples": 100},
        "rewards.oracle": {},
        "rewards.jpeg_size": {"quality": settings.get("quality", 90)},
    }
    for judge, options in settings.get("more_judges", {}).items():
        made[f"rewards.{judge}"] = options
        rows |= {f"{arm}_score_{judge}": np.arange(len(places)) * 1.0 for arm in ("base", "tuned")}
    made |= settings.get("made", {})
    look = {"mean": 0.5, "low": 0.4, "high": 0.6}
    metrics = {"images_per_prompt": NUM_IMAGES}
    if appearance:
        comparison = {"base": look, "tuned": look, "difference": look, "win_rate": look, "num_missing": 0}
        metrics |= {"diversity": comparison, "appearance": {"saturation": comparison}}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"rewards": {"names": ["oracle"], "rank_by": None}}))
    metrics, rows = settings.get("metrics", metrics), rows | settings.get("rows", {})
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


def test_win_rates_count_images_between_all_arms(compared: tuple[Path, dict[str, Any]]) -> None:
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


def test_a_judge_that_a_run_lacks_scores_its_stored_images(compared: tuple[Path, dict[str, Any]]) -> None:
    _, found = compared
    assert found["scored_now"] == {"one": [], "<b>other": ["jpeg_size"]}
    expected = jpeg([image(place + 40) for place in range(6)]).mean()
    assert found["scores"]["<b>other"]["jpeg_size"]["tuned"]["mean"] == pytest.approx(expected)
    assert found["scores"]["<b>other"]["jpeg_size"]["base"] == found["scores"]["one"]["jpeg_size"]["base"]


def test_preference_accuracy_and_appearance_are_reported_if_measured(compared: tuple[Path, dict[str, Any]]) -> None:
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


def test_terminal_shows_one_row_per_run(compared: tuple[Path, dict[str, Any]]) -> None:
    header, base, one, other, no_interval = table_of(compared[1]).split("\n")
    assert header.split() == ["run", "trained", "on", "oracle", "jpeg_size"]
    assert base.startswith("base model") and "2.50" in base
    assert one.startswith("one") and "3.00 (+0.50 [no interval])" in one
    assert other.startswith("<b>other") and "(−2.0 [no interval])" in other
    assert no_interval == (
        "no interval and no verdict: an interval needs at least 10 prompts, got 3; add held-out prompts"
    )


def test_page_says_why_there_is_no_interval_and_gives_no_verdict(compared: tuple[Path, dict[str, Any]]) -> None:
    page = (compared[0] / "out" / "compare.html").read_text(encoding="utf-8")
    reason = "No interval and no verdict where a table says so: an interval needs at least 10 prompts, got 3;"
    assert page.count(reason) == 1 and "[no interval]" in page
    assert 'class="better' not in page and 'class="worse' not in page and "tinted" not in page.split("</style>")[1]
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)


def test_enough_prompts_have_intervals_and_no_remark(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / "one", num_prompts=30), evaluated(tmp_path / "two", tuned=-2.0, num_prompts=30)]
    found = compare_runs(runs, tmp_path / "out")
    assert "(+0.50 [+0.50, +0.50])" in table_of(found) and "no interval" not in table_of(found)
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert "[+0.50, +0.50]" in page and "no interval" not in page.lower()


def test_a_run_may_have_the_name_of_a_key(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / name) for name in ("no_interval", "low")]
    compare_runs(runs, tmp_path / "out")
    assert "at least 10 prompts, got 3" in (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"run_seed": 4}, "`run.seed` is 3 and 4"),
        ({"guidance_scale": 7.5}, r"`generation.guidance_scale` is 1.0 and 7.5"),
        ({"quality": 50}, "`rewards.jpeg_size.quality` is 90 and 50"),
        ({"quantization": "int8"}, "`model.quantization` is None and int8"),
        (
            {"prompts": ["other"] * 6},
            "`prompts.heldout` gives different prompts: number 1 is 'a red circle' and 'other'",
        ),
    ],
)
def test_runs_that_are_not_comparable_are_refused_with_the_key(
    changed: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    runs = [evaluated(tmp_path / "one"), evaluated(tmp_path / "two", **changed)]
    with pytest.raises(StoreError, match=f"one and .*two are not comparable: {difference}; evaluate one"):
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


def test_the_name_of_a_round_includes_its_run(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / "many" / f"round-{number}", seed=number) for number in (1, 2)]
    assert compare_runs(runs, tmp_path)["arms"][:2] == ["many/round-1", "many/round-2"]


SECRET = "CDPO_TEST_SECRET"
OWN_CODE = """
import pathlib

pathlib.Path(__file__).with_name("ran").touch()


def judge(images, prompts):
    return [1.0] * len(prompts)
"""


def test_fault_29_another_runs_endpoint_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "hunter2")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        options = VlmAlignmentOptions(endpoint={"url": url, "model": "any", "token_variable": SECRET})
        theirs = evaluated(tmp_path / "theirs", more_judges={"vlm_alignment": options.model_dump()})
        found = compare_runs([evaluated(tmp_path / "mine"), theirs], tmp_path / "out")
        with pytest.raises(BlockingIOError):  # no connection was made
            server.accept()
    assert found["judges"] == ["oracle", "jpeg_size"]
    sentence = found["left_out"]["vlm_alignment"]
    assert "needs `rewards.vlm_alignment.endpoint`, which another run may not choose" in sentence
    assert "pass `--judges CONFIG`" in sentence
    assert "vlm_alignment` is left out" in (tmp_path / "out" / "compare.html").read_text()


@pytest.mark.parametrize(
    ("judge", "options", "reason"),
    [
        ("clip", {"architecture": "ViT-B-32", "checkpoint": "/dev/zero"}, "needs `rewards.clip.architecture`"),
        ("clip", {"architecture": "embedded", "checkpoint": "x/y"}, "needs `rewards.clip.checkpoint`"),
        ("pickscore", {"revision": "0" * 40}, "needs `rewards.pickscore.revision`"),
        ("aesthetic", {}, "needs `rewards.aesthetic.head`"),
        ("aesthetic", {"head": "/etc/passwd"}, "needs `rewards.aesthetic.head`"),
        ("imagereward", {"sha256": "0" * 64}, "needs `rewards.imagereward.sha256`"),
        ("vlm_alignment", {"captioner": "some/model"}, "needs `rewards.vlm_alignment.captioner`"),
        ("vlm_alignment", {}, "needs `rewards.vlm_alignment.captioner` or"),
        ("vlm_judge", {}, "needs `rewards.vlm_judge.checkpoint` or"),
        ("vlm_judge", {"endpoint": {"url": "http://evil/v1", "model": "m"}}, "needs `rewards.vlm_judge.endpoint`"),
        ("vlm_judge", {"checkpoint": "some/model"}, "needs `rewards.vlm_judge.checkpoint`, which"),
        ("vlm_judge", {"question": "{prompt} Say yes."}, "needs `rewards.vlm_judge.question`"),
        ("vqa", {"questions": "/etc/passwd"}, "needs `rewards.vqa.questions`"),
        ("vqa", {}, "needs `rewards.vqa.questions`"),
        ("jpeg_size", {"quality": 1e9}, "has options that cannot be used"),
        ("jpeg_size", {"quality": [90]}, "has options that cannot be used"),
        ("jpeg_size", {"path": "x"}, "has no option"),
        ("theirs:judge", {}, "is a user-defined function"),
        ("os:system", {}, "is a user-defined function"),
    ],
)
def test_fault_29_options_that_choose_something_are_refused(judge: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        options_without_choices(judge, options)


@pytest.mark.parametrize(
    ("judge", "options"), [("clip", {"scale": "logit"}), ("jpeg_size", {"quality": 50}), ("oracle", {}), ("hpsv2", {})]
)
def test_fault_29_options_that_choose_nothing_are_used(judge: str, options: dict[str, Any]) -> None:
    assert options_without_choices(judge, options).items() >= options.items()


def test_fault_42_another_runs_custom_reward_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = evaluated(tmp_path / "theirs", more_judges={"judge_of_theirs:judge": {}})
    (theirs / "judge_of_theirs.py").write_text(OWN_CODE)
    monkeypatch.chdir(theirs)
    runs = [evaluated(tmp_path / "mine"), theirs]
    found = compare_runs(runs, tmp_path / "out")
    assert list(found["left_out"]) == ["judge_of_theirs:judge"]
    with pytest.raises(RewardError, match=r"would be imported from .*theirs, the folder of a compared run"):
        compare_runs(runs, tmp_path / "out", {"judge_of_theirs:judge": {}})
    assert not (theirs / "ran").exists() and "judge_of_theirs" not in sys.modules


def test_fault_42_my_custom_reward_scores_if_my_configuration_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "judge_of_mine.py").write_text(OWN_CODE)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [*sys.path])
    runs = [evaluated(tmp_path / "mine", more_judges={"judge_of_mine:judge": {}}), evaluated(tmp_path / "theirs")]
    found = compare_runs(runs, tmp_path / "out", {"judge_of_mine:judge": {}})
    assert found["scored_now"]["theirs"] == ["judge_of_mine:judge"] and not found["left_out"]


def test_fault_42_the_command_says_what_to_pass_and_accepts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    judge = "judge_of_the_command:judge"
    (tmp_path / "judge_of_the_command.py").write_text(OWN_CODE)
    config = config_of(tmp_path, "embedded", evaluation={"judges": [judge]})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    runs = [str(evaluated(tmp_path / "one", more_judges={judge: {}})), str(evaluated(tmp_path / "two"))]
    assert main(["compare", *runs]) == 0
    assert f"`{judge}` is left out: two lacks its scores" in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()
    assert main(["compare", *runs, "--judges", "mine.yaml"]) == 0
    header = capsys.readouterr().out.splitlines()[0].split()
    assert header == ["run", "trained", "on", "oracle", "jpeg_size", judge] and (tmp_path / "ran").exists()


def test_fault_29_if_no_judge_is_left_the_reasons_are_reported(tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, judge in zip(runs, ("one:judge", "two:judge"), strict=True):
        made = {"judges": [judge], "images_per_prompt": NUM_IMAGES, "num_bootstrap_resamples": 100}
        evaluated(run, more_judges={judge: {}}, made={"evaluation": made})
    with pytest.raises(
        StoreError, match=r"no judge is left; `one:judge` is left out: two lacks its scores, .*`two:judge`"
    ):
        compare_runs(runs, tmp_path / "out")


JUDGED = {"judges": ["oracle"], "images_per_prompt": NUM_IMAGES, "num_bootstrap_resamples": 100}


@pytest.mark.parametrize(
    "changed",
    [
        {"made": {"evaluation": []}},
        {"made": {"evaluation": JUDGED | {"judges": [["oracle"]]}}},
        {"made": {"evaluation": JUDGED | {"judges": ["\x1b[31m"]}}},
        {"made": {"evaluation": JUDGED | {"judges": ["clip"]}}},
        {"made": {"evaluation": JUDGED | {"num_bootstrap_resamples": 10**9}}},
        {"made": {"evaluation": JUDGED | {"images_per_prompt": 3}}},
        {"made": {"generation": {"images_per_batch": 0}}},
        {"made": {"run.seed": "zero"}},
        {"made": {"rewards.oracle": "options"}},
        {"metrics": []},
        {"metrics": {"images_per_prompt": 0}},
        {"metrics": {"images_per_prompt": 3}},
        {"metrics": {"images_per_prompt": 2, "diversity": {"base": 1}}},
        {"rows": {"sample_index": [0] * 6}},
        {"rows": {"prompt": [None] * 6}},
        {"rows": {"prompt_index": [0.5] * 6}},
        {"rows": {"base_score_oracle": ["a"] * 6}},
        {"rows": {"implicit_value": ["a"] * 6}},
        {"rows": {"base_score_oracle": [float("nan")] * 6}},
    ],
)
def test_fault_52_a_run_with_malformed_content_is_refused_by_name(changed: dict[str, Any], tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / "mine"), evaluated(tmp_path / "theirs", **changed)]
    with pytest.raises(StoreError, match=r"theirs/5-evaluation|no image has a finite score") as caught:
        compare_runs(runs, tmp_path / "out")
    assert str(caught.value).isprintable()


def test_fault_53_an_image_that_is_not_a_png_is_named_by_its_row(tmp_path: Path) -> None:
    postscript = [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n"] * 6
    wide = [image(0)] * 5 + [image(0, width=9)]
    for images, reason in ((postscript, "is not a readable PNG"), (wide, "is . x 8 pixels, another image")):
        theirs = evaluated(tmp_path / f"theirs-{reason}", without="jpeg_size", rows={"tuned_image": images})
        with pytest.raises(StoreError, match=rf"comparison\.parquet: tuned image \d of prompt \d: {reason}"):
            compare_runs([evaluated(tmp_path / f"mine-{reason}"), theirs], tmp_path / "out")


@pytest.mark.parametrize("name", [EVALUATION, f"{EVALUATION}/comparison.parquet", f"{EVALUATION}/manifest.json"])
def test_fault_30_a_link_out_of_a_run_is_not_followed(name: str, tmp_path: Path) -> None:
    theirs = evaluated(tmp_path / "theirs")
    (theirs / name).rename(tmp_path / "outside")
    (theirs / name).symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match="is a symbolic link that leads out of"):
        compare_runs([evaluated(tmp_path / "mine"), theirs], tmp_path / "out")


def test_fault_59_an_edited_configuration_is_reported_before_it_is_used(tmp_path: Path) -> None:
    theirs = evaluated(tmp_path / "theirs")
    with RunFolder(theirs).writing("3-stages", {"rewards.rank_by": "oracle"}, {}, seed=3, resumable=False):
        pass
    compare_runs([evaluated(tmp_path / "mine"), theirs], tmp_path / "out")
    (theirs / "config.yaml").write_text("rewards: {names: [oracle, clip], rank_by: clip}")
    message = (
        r"config\.yaml: is not the configuration that 3-stages was made with: `rewards.rank_by` was oracle, .* clip"
    )
    with pytest.raises(StoreError, match=message):
        compare_runs([tmp_path / "mine", theirs], tmp_path / "out")
