import base64
import io
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from cdpo_ray.errors import StoreError
from cdpo_ray.evaluation import figures
from cdpo_ray.evaluation.report import (
    MAX_CATEGORIES,
    STEPS,
    MeasureResult,
    differences_by_prompt,
    image_grid,
    measure_results,
    signs_of_reward_hacking,
    trained_on,
    write_report,
)
from cdpo_ray.pages.previews import preview_rows
from cdpo_ray.records import EVALUATION, PREVIEW_PROMPTS, SAMPLES, STAGES, TRAINING, preview_file
from cdpo_ray.store import describe, files_within, fingerprint_of

PROMPTS = [
    "a red circle",
    "<script>alert('owned')</script>",
    "../../etc/passwd\x00\x1b[31m",
    '" onerror="alert(1)',
    "{{ 7*7 }}",
]
NUM_IMAGES = 2
BETTER = {"mean": 0.033, "low": 0.028, "high": 0.038}
WORSE = {"mean": -0.033, "low": -0.038, "high": -0.028}
NONE = {"mean": 0.0, "low": 0.0, "high": 0.0}
LARGE = {"mean": 1234.0, "low": 1100.0, "high": 1400.0}
MUCH = {"mean": 0.1, "low": 0.06, "high": 0.14}  # of 0.812: 12 %, with an interval above 5 %
MUCH_LESS = {"mean": -0.1, "low": -0.14, "high": -0.06}
UNCLEAR = {"mean": 0.004, "low": -0.011, "high": 0.019}
FEW = {"mean": 0.033, "no_interval": "an interval needs at least 10 prompts, got 5"}


def judge(difference: dict[str, float]) -> dict[str, Any]:
    base, tuned = 0.812, 0.812 + difference["mean"]
    return {
        "base": {"mean": base, "low": base - 0.01, "high": base + 0.01},
        "tuned": {"mean": tuned, "low": tuned - 0.01, "high": tuned + 0.01},
        "difference": difference,
        "win_rate": {"mean": 0.71, "low": 0.66, "high": 0.76},
        "num_missing": 1,
    }


def png(size: int = 16, shade: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (shade, 120, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def build_run(
    folder: Path, *, clip: dict = BETTER, oracle: dict = BETTER, diversity: dict | None = None, **measured: Any
) -> Path:
    """A run folder with two judges: `clip` ranked the pairs, `oracle` is held out."""
    config = {
        "rewards": {"names": ["clip", "jpeg_size"], "rank_by": None},
        "evaluation": {"judges": ["oracle", "clip"], "grid_prompts": 4},
    }
    for step in STEPS:
        (folder / step).mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / SAMPLES / "samples.parquet").write_text("not shown")
    (folder / TRAINING / "lora").mkdir()
    (folder / TRAINING / "lora" / "adapter.safetensors").write_text("not shown")
    write_stages(folder)
    metrics = {
        "judges": {"oracle": judge(oracle), "clip": judge(clip)},
        "num_prompts": len(PROMPTS),
        "images_per_prompt": NUM_IMAGES,
    }
    (folder / EVALUATION / "metrics.json").write_text(
        json.dumps(metrics | ({"diversity": judge(diversity)} if diversity else {}) | measured)
    )
    pq.write_table(comparison(), folder / EVALUATION / "comparison.parquet")
    for step in STEPS:
        write_manifest(folder / step)
    return folder


def write_manifest(folder: Path) -> None:
    """Describe the current files."""
    files = {name: describe(path) for name, path in files_within(folder).items() if name != "manifest.json"}
    manifest = {
        "step": folder.name,
        "settings": {},
        "inputs": {},
        "files": files,
        "fingerprint": fingerprint_of(files),
        "counts": {"images": 1234},
        "warnings": ["3 prompts <b>cut</b>"] if folder.name == SAMPLES else [],
        "details": {},
        "versions": {"torch": "2.10"},
        "machine": {"cpus": "2"},
        "seed": 7,
        "seconds": 12.5,
        "created": "2026-01-01T00:00:00+00:00",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_stages(folder: Path) -> None:
    pairs = [
        {
            "stage": stage,
            "min_rank_gap": 5 - 2 * stage,
            "max_rank_gap": 6 - 2 * stage,
            "num_candidate_pairs": 4321,
            "margin_reliability": None,
            "num_new_pairs": 2345 if stage == 1 else None,
            "num_drawn_pairs": 6,
            "num_prompts": 3,
            "drawn_by_rank_gap": {str(6 - 2 * stage): 6},
        }
        for stage in (1, 2)
    ]
    (folder / STAGES / "stages.json").write_text(json.dumps(pairs))
    measured = {"loss": 0.68, "margin": 0.02, "implicit_accuracy": 0.625}
    measured |= {f"{net}_error_{arm}": 0.11 for net in ("policy", "reference") for arm in "wl"}
    stages = [{"stage": stage, "num_updates": 3, "num_pairs": 6, "seconds": 1.5} | measured for stage in (1, 2)]
    (folder / TRAINING / "stages.json").write_text(json.dumps(stages))
    updates = [{"update": update, "stage": 1 + update // 4} | measured for update in range(1, 7)]
    (folder / TRAINING / "updates.jsonl").write_text("\n".join(map(json.dumps, updates)))


def add_previews(folder: Path, *, num_stages: int = 2, size: int = 16) -> None:
    """Images of two prompts; the first one's after stage 1 is missing."""
    for prompt in PROMPTS[:2]:
        for stage in range(num_stages + 1):
            path = folder / TRAINING / preview_file(stage, prompt)
            path.parent.mkdir(parents=True, exist_ok=True)
            if (prompt, stage) != (PROMPTS[0], 1):
                path.write_bytes(png(size, shade=20 * stage))
    (folder / TRAINING / PREVIEW_PROMPTS).write_text(json.dumps(PROMPTS[:2]))
    write_manifest(folder / TRAINING)


def comparison() -> pa.Table:
    """The tuned score exceeds the base's by 0.5 x (prompt index - 2); one is missing; rows are out of order."""
    rows = [
        {
            "prompt_index": index,
            "prompt_id": f"{index:016x}",
            "prompt": prompt,
            "sample_index": sample,
            "base_image": png(),
            "tuned_image": png(shade=30),
            **{f"base_score_{name}": 1.0 for name in ("clip", "oracle")},
            **{f"tuned_score_{name}": 1.0 + 0.5 * (index - 2) for name in ("clip", "oracle")},
        }
        for index, prompt in enumerate(PROMPTS)
        for sample in range(NUM_IMAGES)
    ]
    rows[0]["tuned_score_clip"] = float("nan")
    return pa.Table.from_pylist(rows[::-1])


def page_of(run_dir: Path) -> str:
    write_report(run_dir, run_dir / "report.html")
    return (run_dir / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(build_run(tmp_path_factory.mktemp("report") / "run"))


def results(rewards: dict[str, Any] | None = None, **judges: dict[str, float]) -> list[MeasureResult]:
    metrics: dict[str, Any] = {name: judge(difference) for name, difference in judges.items()}
    diversity = {"diversity": metrics.pop("diversity")} if "diversity" in metrics else {}
    appearance = {name: metrics.pop(name) for name in ("saturation", "edge_density") if name in metrics}
    return measure_results(
        {"judges": metrics, "appearance": appearance} | diversity,
        rewards or {"names": ["clip", "jpeg_size"], "rank_by": None},
    )


@pytest.mark.parametrize(
    ("difference", "sentence"),
    [
        (BETTER, "clip 0.812 → 0.845, +0.033 [+0.028, +0.038], win rate 71 %: improved"),
        (UNCLEAR, "clip 0.812 → 0.816, +0.004 [−0.011, +0.019], win rate 71 %: no significant change"),
        (WORSE, "clip 0.812 → 0.779, −0.033 [−0.038, −0.028], win rate 71 %: got worse"),
        (NONE, "clip 0.812 → 0.812, +0.000 [+0.000, +0.000], win rate 71 %: no significant change"),
        (LARGE, "clip 1 → 1235, +1234 [+1100, +1400], win rate 71 %: improved"),
        (FEW, "clip 0.812 → 0.845, +0.033 [no interval], win rate 71 %: no verdict"),
    ],
)
def test_sentence_states_scores_difference_interval_win_rate_and_verdict(
    difference: dict[str, float], sentence: str
) -> None:
    assert [result.sentence for result in results(clip=difference)] == [sentence]


def test_interval_that_touches_zero_is_no_significant_change() -> None:
    [result] = results(clip={"mean": 0.1, "low": 0.0, "high": 0.2})
    assert result.verdict == "no significant change"


def test_diversity_is_reported_without_a_win_rate() -> None:
    *_, found = results(clip=BETTER, diversity=WORSE)
    assert found.sentence == "diversity 0.812 → 0.779, −0.033 [−0.038, −0.028]: fell by 4.1 %"


def test_only_the_reward_that_ranks_counts_as_trained_on() -> None:
    roles = {"clip": "scored, did not rank", "jpeg_size": "trained on", "oracle": "held out"}
    found = results({"names": ["clip", "jpeg_size"], "rank_by": "jpeg_size"}, **dict.fromkeys(roles, BETTER))
    assert {result.name: result.role for result in found} == roles
    assert found[0].name == "jpeg_size"


def test_all_rewards_with_a_weight_in_a_combination_count_as_trained_on() -> None:
    roles = {"clip": "trained on", "oracle": "scored, did not rank", "jpeg_size": "trained on"}
    weighted = {"names": [*roles], "rank_by": "weighted_sum", "weights": {"jpeg_size": -0.2, "oracle": 0.0}}
    found = results(weighted, **dict.fromkeys(roles, BETTER))
    assert {result.name: result.role for result in found} == roles
    agreed = results({"names": [*roles], "rank_by": "pareto", "weights": {}}, **dict.fromkeys(roles, BETTER))
    assert {result.role for result in agreed} == {"trained on"}


@pytest.mark.parametrize(
    ("judges", "fallen"),
    [
        ({"clip": BETTER, "oracle": WORSE}, ["oracle"]),
        ({"clip": BETTER, "jpeg_size": WORSE}, ["jpeg_size"]),
        ({"clip": BETTER, "oracle": BETTER, "diversity": WORSE}, []),
        ({"clip": BETTER, "oracle": UNCLEAR, "diversity": WORSE}, ["diversity"]),
        ({"clip": BETTER, "diversity": WORSE}, ["diversity"]),
        ({"clip": BETTER, "oracle": WORSE, "diversity": WORSE}, ["oracle", "diversity"]),
        ({"clip": BETTER, "oracle": UNCLEAR, "diversity": UNCLEAR}, []),
        ({"clip": BETTER, "oracle": BETTER, "diversity": BETTER}, []),
        ({"clip": UNCLEAR, "jpeg_size": BETTER, "oracle": WORSE}, []),
        ({"clip": WORSE, "oracle": WORSE, "diversity": WORSE}, []),
        ({"oracle": WORSE}, []),
        ({"clip": BETTER, "oracle": BETTER, "edge_density": MUCH}, ["edge_density"]),
        ({"clip": BETTER, "oracle": BETTER, "saturation": MUCH_LESS, "diversity": WORSE}, ["diversity", "saturation"]),
        ({"clip": BETTER, "saturation": WORSE, "edge_density": UNCLEAR}, []),
        ({"clip": UNCLEAR, "edge_density": MUCH}, []),
        ({"clip": FEW, "oracle": WORSE, "edge_density": MUCH}, []),
        ({"clip": BETTER, "oracle": FEW, "edge_density": FEW, "diversity": FEW}, []),
    ],
)
def test_reward_hacking_is_a_rise_of_the_trained_reward_and_an_undesired_change_of_another_measure(
    judges: dict[str, dict[str, float]], fallen: list[str]
) -> None:
    assert [sign.name for sign in signs_of_reward_hacking(results(**judges))] == fallen


@pytest.mark.parametrize(
    ("judges", "signs"),
    [
        ({"clip": BETTER, "oracle": WORSE}, ["oracle"]),
        ({"clip": BETTER, "diversity": WORSE}, ["diversity"]),
        ({"clip": BETTER, "oracle": BETTER, "diversity": WORSE}, []),
        ({"clip": BETTER, "oracle": BETTER, "edge_density": MUCH}, ["edge_density"]),
        ({"clip": UNCLEAR, "oracle": WORSE, "edge_density": MUCH}, []),
    ],
)
def test_if_the_reward_is_unknown_any_judge_that_rose_may_be_it(
    judges: dict[str, dict[str, float]], signs: list[str]
) -> None:
    found = results(**judges)
    metrics = {"judges": {name: judge(judges[name]) for name in judges if name in ("clip", "oracle")}}
    metrics |= {"appearance": {name: judge(judges[name]) for name in judges if name not in metrics["judges"]}}
    assert len(found) == len(measure_results(metrics, None))
    assert [sign.name for sign in signs_of_reward_hacking(measure_results(metrics, None))] == signs


def test_page_shows_the_previews_from_the_base_model_to_the_last_stage_and_escapes_their_prompts(
    page: str, tmp_path: Path
) -> None:
    run = build_run(tmp_path / "run")
    add_previews(run)
    (strip,) = re.findall(r"Images stage by stage.*?</section>", page_of(run), re.DOTALL)
    shown = [
        (alt, base64.b64decode(uri)) for uri, alt in re.findall(r'base64,([^"]+)".*?alt="([^"]*)"', strip, re.DOTALL)
    ]
    images = [(stage, png(shade=20 * stage)) for stage in range(3)]
    names = {0: "base model", 1: "after stage 1", 2: "after stage 2"}
    prompts = [PROMPTS[0], "&lt;script&gt;alert(&#39;owned&#39;)&lt;/script&gt;"]
    expected = [(f"{names[stage]}: {prompt}", image) for prompt in prompts for stage, image in images]
    assert shown == [expected[0], *expected[2:]]
    assert "<script" not in strip
    assert "Images stage by stage" not in page, "a run without previews has no such section"


def test_of_many_stages_the_previews_of_the_first_and_last_and_evenly_spaced_ones_are_shown(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    add_previews(run, num_stages=20)
    second = preview_rows(run / TRAINING)[1]
    assert [image["name"].rpartition(" ")[2] for image in second.images] == ["model", "3", "7", "10", "13", "17", "20"]


@pytest.mark.parametrize("fault", ["a link out", "not a PNG", "too many prompts"])
def test_fault_52_previews_that_somebody_altered_are_named(tmp_path: Path, fault: str) -> None:
    run = build_run(tmp_path / "run")
    add_previews(run)
    image = run / TRAINING / preview_file(0, PROMPTS[0])
    if fault == "a link out":
        image.unlink()
        image.symlink_to("/etc/passwd")
    elif fault == "not a PNG":
        image.write_bytes(b"<svg onload=alert(1)>")
    else:
        (run / TRAINING / PREVIEW_PROMPTS).write_text(json.dumps(["a"] * 101))
    with pytest.raises(StoreError, match=r"leads out of|is not a readable PNG|prompts\.json: is damaged"):
        preview_rows(run / TRAINING)


def test_page_warns_of_reward_hacking(tmp_path: Path) -> None:
    page = page_of(build_run(tmp_path / "run", oracle=WORSE, diversity=WORSE, appearance={"saturation": judge(MUCH)}))
    assert "Signs of reward hacking" in page
    assert "while\noracle got worse, diversity fell by 4.1 %, saturation rose by 12.3 %." in page


def category(name: str, num_prompts: int, **judges: dict | None) -> dict[str, Any]:
    return {"category": name, "num_prompts": num_prompts, "judges": judges}


def test_page_breaks_the_judges_down_by_category(tmp_path: Path) -> None:
    found = [
        category("<b>$Colors$</b>", 25, clip=judge(BETTER), oracle=judge(WORSE)),
        category("Rare", 5, clip=judge(FEW), oracle=None),
    ]
    page = page_of(build_run(tmp_path / "run", categories=found))
    section = re.search(r"<h2>By category</h2>.*?</section>", page, re.DOTALL)
    assert section and "corrected for the number of categories" in section[0]
    rows = re.findall(r"<tr>(<td dir.*?)</tr>", section[0], re.DOTALL)
    text = [re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", row)).strip() for row in rows]
    assert text == [
        "&lt;b&gt;$Colors$&lt;/b&gt; 25 +0.033 [+0.028, +0.038] win rate 71 % −0.033 [−0.038, −0.028] win rate 71 %",
        "Rare 5 +0.033 [no interval] win rate 71 % no score",
    ]
    assert section[0].count("<svg") == 2 and "got 5" not in page, "the run is not to blame for a small category"
    assert "By category" not in page_of(build_run(tmp_path / "without"))


def test_page_shows_the_largest_of_many_categories_in_their_order(tmp_path: Path) -> None:
    found = [category(f"name {n}", 11 + (n % 60), clip=judge(BETTER), oracle=judge(BETTER)) for n in range(100)]
    page = page_of(build_run(tmp_path / "run", categories=found))
    assert f"Shown are the {MAX_CATEGORIES} largest of 100 categories" in re.sub(r"\s+", " ", page)
    shown = [int(number) for number in re.findall(r'<td dir="auto">name (\d+)', page)]
    assert len(shown) == MAX_CATEGORIES and shown == sorted(shown) and {59, 58} <= {*shown}


def test_page_of_few_prompts_says_why_there_is_no_interval_and_gives_no_verdict(tmp_path: Path) -> None:
    few = judge(FEW) | {arm: {"mean": 0.8, "no_interval": FEW["no_interval"]} for arm in ("base", "tuned", "win_rate")}
    metrics = {"judges": {"oracle": few, "clip": few}, "appearance": {"saturation": few}}
    accuracy = {"clip": FEW | {"mean": 0.6, "num_prompts": 5}}
    page = page_of(build_run(tmp_path / "run", **metrics, preference_accuracy=accuracy))
    assert page.count("where a table says so: an interval needs at least 10 prompts, got 5. Add held-out prompts") == 1
    assert "<li>no verdict <small>appearance</small>" in page and "+4.1 %</td><td>[no interval]" in page
    assert '60 %<span class="under">[no interval]</span>' in page
    assert "no significant change" not in page and ": improved" not in page
    assert not re.search(r"\b(nan|None)\b", page)


def test_page_shows_the_change_of_appearance_in_per_cent(tmp_path: Path) -> None:
    appearance = {"saturation": judge(MUCH), "edge_density": judge(UNCLEAR)}
    page = page_of(build_run(tmp_path / "run", diversity=WORSE, appearance=appearance))
    assert "<li>diversity fell by 4.1 %, saturation rose by 12.3 % <small>appearance</small>" in page
    assert "<td>+12.3 %</td><td>[+7.4, +17.2] %</td>" in page


def test_page_has_the_cross_reward_table_and_the_agreement_between_judges(tmp_path: Path) -> None:
    agreement = [{"judges": ["oracle", "clip"], "base": 0.454, "tuned": -0.12}]
    accuracy = {"clip": {"mean": 0.641, "low": 0.6, "high": 0.68, "num_prompts": 5}, "oracle": None}
    page = page_of(build_run(tmp_path / "run", agreement=agreement, preference_accuracy=accuracy))
    assert "<td>trained on clip</td>" in page
    assert page.count("<td>0.45 → −0.12</td>") == 2
    assert '64 %<span class="under">[60, 68] %</span>' in page


HEALTH = {"max_error_rise": 0.5, "window": 50, "highest_error_rise": 0.731}


def set_health(run: Path, health: dict[str, Any]) -> None:
    path = run / TRAINING / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"details": {"health": health}}))


def test_page_shows_the_bound_of_the_training_alarm_and_the_highest_rise(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    set_health(run, HEALTH)
    page = page_of(run)
    assert "over 50 updates, the error on chosen images exceeds the reference's by more than 50 %" in page
    assert "Highest here: 73.1 %." in page and "Training alarm" not in page


def test_page_warns_of_a_training_alarm_as_literal_text(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    set_health(run, HEALTH | {"alarm": "the error <b>rose</b>"})
    assert "<strong>Training alarm.</strong> In training, the error &lt;b&gt;rose&lt;/b&gt;. See" in page_of(run)


def test_the_alarm_is_drawn_if_the_chosens_error_comes_near_it_and_norms_if_they_were_recorded() -> None:
    errors = {f"{net}_error_{arm}": 0.1 for net in ("policy", "reference") for arm in "wl"}
    other = {"loss": 0.6, "margin": 0.1, "implicit_accuracy": 0.5, "stage": 1}
    updates = [other | errors | {"policy_error_w": 0.13, "update": number} for number in range(1, 11)]
    far, near = (figures.training_curves(updates, alarm=alarm)["error_change"] for alarm in (0.2, 0.05))
    assert "alarm" not in far and "alarm" in near
    assert set(figures.training_curves(updates)) == {"error_change", "loss", "implicit_accuracy", "margin"}
    recorded = [update | {"grad_norm": 1.0, "update_norm": 0.01, "learning_rate": 1e-4} for update in updates]
    assert {"grad_norm", "update_norm", "learning_rate"} <= set(figures.training_curves(recorded))


def test_a_run_that_an_alarm_stopped_shows_the_stages_that_were_trained(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    path = run / TRAINING / "stages.json"
    (first, _) = json.loads(path.read_text())
    for stages, is_whole in (([first], False), ([first | {"is_stopped": True}], True)):
        path.write_text(json.dumps(stages))
        write_manifest(run / TRAINING)
        if is_whole:
            assert page_of(run).count("<td>4,321</td>") == 1
        else:
            with pytest.raises(StoreError, match="must have 2 stages, got 1"):
                page_of(run)


def test_page_does_not_warn_if_nothing_fell(page: str) -> None:
    assert "reward hacking" not in page


def test_page_has_a_headline_and_a_role_for_each_judge(page: str) -> None:
    assert "clip 0.812 → 0.845, +0.033 [+0.028, +0.038], win rate 71 %: improved <small>trained on</small>" in page
    assert '<td>oracle</td><td class="text">held out</td>' in page


def test_hostile_text_stays_text(page: str) -> None:
    assert "<script" not in page and "&lt;script&gt;alert(&#39;owned&#39;)&lt;/script&gt;" in page
    assert 'onerror="' not in page and "onerror=&#34;alert(1)" in page
    assert "3 prompts &lt;b&gt;cut&lt;/b&gt;" in page and "../../etc/passwd␀␛[31m" in page
    assert not set(page) & {"\x00", "\x1b"}


def test_no_file_but_the_report_is_written(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    before = set(tmp_path.rglob("*"))
    write_report(run, tmp_path / "page.html")
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "page.html"}


def test_page_refers_to_nothing_outside_itself(page: str) -> None:
    targets = re.findall(r'(?:src|href|action|data|poster)\s*=\s*"([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert targets and all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    assert "@import" not in page and "default-src 'none'" in page


def test_page_shows_the_first_prompts_with_all_images_and_their_scores(page: str) -> None:
    assert page.count("<img ") == 4 * NUM_IMAGES * 2
    assert 'alt="base model, image 1: a red circle" title="clip 1, oracle 1"' in page
    assert 'alt="fine-tuned model, image 1: a red circle" title="clip no score, oracle 0"' in page


def test_large_images_are_shrunk_and_small_ones_are_enlarged_without_blur(tmp_path: Path) -> None:
    table = comparison().slice(0, 2)
    large = pa.array([png(600), png(64)])
    path = tmp_path / "comparison.parquet"
    pq.write_table(table.set_column(table.column_names.index("base_image"), "base_image", large), path)
    [row] = image_grid(path, ["clip"], num_prompts=1)
    assert sorted((image["width"], image["pixelated"]) for image in row["base"]) == [(64, True), (256, False)]


def test_difference_of_a_prompt_excludes_missing_scores(tmp_path: Path) -> None:
    pq.write_table(comparison(), tmp_path / "comparison.parquet")
    found = differences_by_prompt(tmp_path / "comparison.parquet", ["clip"])
    np.testing.assert_allclose(found["clip"], [-1, -0.5, 0, 0.5, 1])


def test_tables_hold_counts_stages_config_and_timings(page: str) -> None:
    for expected in (
        "<td>4,321</td><td>2,345</td>",
        "<td>4,321</td><td>–</td>",
        "3–4",
        "62.5 %",
        "0.6800",
        "share of 62.5 s",
        "width: 20.0%",
        "images 1,234",
        "grid_prompts: 4",
    ):
        assert expected in page


def test_grid_prompts_of_0_shows_no_grid(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluation"]["grid_prompts"] = 0
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "<img " not in page_of(run)


def test_run_without_evaluation_says_which_step_is_missing(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    (run / EVALUATION).rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="5-evaluation: is missing or not finished; run the step that makes it first"):
        page_of(run)


@pytest.mark.parametrize(
    "name",
    [
        "1-samples/samples.parquet",
        "4-training/lora/adapter.safetensors",
        "4-training/updates.jsonl",
        "5-evaluation/comparison.parquet",
        "5-evaluation/metrics.json",
        "config.yaml",
    ],
)
def test_fault_59_missing_file_is_named_with_what_to_do_and_leaves_the_old_report(name: str, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    (run / "report.html").write_text("old")
    (run / name).unlink()
    with pytest.raises(StoreError, match=rf"{name}: is missing.* to regenerate it"):
        page_of(run)
    assert (run / "report.html").read_text() == "old"


@pytest.mark.parametrize(
    "name", ["3-stages/stages.json", "5-evaluation/comparison.parquet", "4-training/updates.jsonl"]
)
def test_damaged_file_is_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    (run / name).write_text("{broken")
    with pytest.raises(StoreError, match=rf"{name}: was altered .* delete .* to regenerate it"):
        page_of(run)
    write_manifest((run / name).parent)
    with pytest.raises(StoreError, match=rf"{name}(:1)?: is damaged .* delete .* and run `cdpo run CONFIG`"):
        page_of(run)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("5-evaluation/metrics.json", [[], 3, None, {}, {"judges": {}}, {"judges": {"clip": {"base": 1}}}]),
        ("3-stages/stages.json", [{}, [], [1], [{"stage": 1}], "\x1b[31m"]),
        ("4-training/stages.json", [{}, [], [None], [{"stage": 10**9}]]),
        ("4-training/updates.jsonl", [[], {"update": 1}, "text"]),
    ],
)
def test_fault_52_a_file_with_malformed_content_is_named(name: str, values: list[Any], tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    for value in values:
        (run / name).write_text(json.dumps(value))
        write_manifest((run / name).parent)
        with pytest.raises(StoreError, match=rf"{name}(:1)?: is damaged") as caught:
            page_of(run)
        assert "\x1b" not in str(caught.value)


def test_fault_59_a_metric_that_was_edited_is_not_shown(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    path = run / EVALUATION / "metrics.json"
    path.write_text(path.read_text().replace("0.71", "0.99"))
    with pytest.raises(StoreError, match=r"metrics\.json: was altered \(its SHA-256 differs\)"):
        page_of(run)


@pytest.mark.parametrize("text", ["[]", "rewards: 3", "rewards: {names: [], rank_by: null}", "rewards: {names: [1]}"])
def test_fault_52_a_malformed_config_is_named(text: str, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    (run / "config.yaml").write_text(text)
    with pytest.raises(StoreError, match=r"config\.yaml: is damaged"):
        page_of(run)


def test_fault_53_images_of_another_format_or_of_too_many_pixels_are_named_by_row(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 20_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    images = {
        "not a PNG": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n",
        "too many pixels": bomb + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")),
        "none": None,
    }
    for data in images.values():
        rows = comparison().to_pylist()
        rows[3]["tuned_image"] = data
        table = pa.Table.from_pylist(rows, schema=comparison().schema)
        pq.write_table(table, run / EVALUATION / "comparison.parquet")
        write_manifest(run / EVALUATION)
        with pytest.raises(StoreError, match=r"comparison\.parquet: image 0 of prompt 3: is not a readable PNG"):
            page_of(run)


def test_fault_52_a_table_with_a_missing_column_is_named(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    for column in ("prompt", "tuned_image", "base_score_oracle", "prompt_index"):
        for table in (
            comparison().drop_columns(column),
            comparison().drop_columns(column).append_column(column, pa.array([True] * comparison().num_rows)),
        ):
            pq.write_table(table, run / EVALUATION / "comparison.parquet")
            write_manifest(run / EVALUATION)
            with pytest.raises(StoreError, match=rf"comparison\.parquet: is damaged .*one column `{column}`"):
                page_of(run)


def test_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    assert page_of(run) == page_of(run)


def test_smoothing_is_a_windowed_mean_within_a_stage() -> None:
    values = np.concatenate([np.zeros(20), np.ones(20)])
    stages = np.repeat([1.0, 2.0], 20)
    np.testing.assert_array_equal(figures.smooth_within_stages(values, stages), values)
    ramp = np.arange(20.0)
    ramp[10] = np.nan
    smoothed = figures.smooth_within_stages(ramp, np.ones(20))
    assert smoothed[0] == pytest.approx(1) and smoothed[5] == pytest.approx(5) and smoothed[10] == pytest.approx(10)


@pytest.mark.parametrize(
    ("ranking", "preferences", "expected"),
    [
        ("clip", None, "clip"),
        ("clip", {"path": "set.parquet"}, "people's labels, sorted by clip"),
        ("preference", {"path": "set.parquet"}, "people's labels"),
    ],
)
def test_a_run_on_human_preferences_is_trained_on_peoples_labels(
    ranking: str, preferences: object, expected: str
) -> None:
    assert trained_on({"rewards": {"rank_by": None, "names": [ranking]}, "preferences": preferences}) == expected
