"""Run folder -> one self-contained page."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from cdpo_ray.config import ranking_weights
from cdpo_ray.errors import StoreError
from cdpo_ray.evaluation import figures
from cdpo_ray.records import EVALUATION, SAMPLES, SCORES, STAGES, TRAINING, score_column
from cdpo_ray.store import RunFolder

STEPS = (SAMPLES, SCORES, STAGES, TRAINING, EVALUATION)
ARMS = ("base", "tuned")
CONFIG = "config.yaml"
DIVERSITY = "diversity"
MAX_IMAGES = 6  # shown of a prompt and model; more would be too small to compare
MAX_PIXELS = 256  # larger images are shrunk, so that the page stays of a size that opens
PIXELATED_BELOW = 128  # smaller images are enlarged without blur, which would hide what the model made


@dataclass(frozen=True)
class Finding:
    """What one judge says of base against fine-tuned.

    Attributes:
        name: the judge, or `diversity`.
        role: `trained on`: ranked the pairs; `scored, did not rank`: seen at training, without a say; `held out`;
            `no judge`: diversity.
        change: -1, 0 or 1: worse, no significant change, better; significant when the 95 % interval excludes 0.
        values: base, tuned, difference, interval (of the difference), win_rate and win_rate_interval, as text.
    """

    name: str
    role: str
    change: int
    values: Mapping[str, str]
    num_missing: int

    @property
    def verdict(self) -> str:
        fell, rose = ("fell", "rose") if self.name == DIVERSITY else ("got worse", "improved")
        return {-1: fell, 0: "no significant change", 1: rose}[self.change]

    @property
    def sentence(self) -> str:
        values = self.values
        wins = f", win rate {values['win_rate']}" if self.name != DIVERSITY else ""
        return (
            f"{self.name} {values['base']} → {values['tuned']}, {values['difference']} {values['interval']}{wins}:"
            f" {self.verdict}"
        )


def write_report(run_dir: Path, output_path: Path) -> None:
    """Write the page of a finished run, whole or not at all; it needs no other file and no network.

    Args:
        run_dir: `runs/<name>` with its configuration and all five steps.
        output_path: an HTML file; replaced if it is there.

    Raises:
        StoreError: a file of the run is missing or damaged.
    """
    run = RunFolder(run_dir)
    manifests = {step: run.manifest(step) for step in STEPS}
    config_text = _text(run_dir / CONFIG)
    config = yaml.safe_load(config_text)
    metrics = _json(run_dir / EVALUATION / "metrics.json")
    findings = find(metrics, config["rewards"])
    judges = [finding.name for finding in findings if finding.name in metrics["judges"]]
    comparison_path = run_dir / EVALUATION / "comparison.parquet"
    page = _template().render(
        name=run_dir.resolve().name,
        created=manifests[EVALUATION]["created"],
        metrics=metrics,
        findings=findings,
        hacking=signs_of_reward_hacking(findings),
        grid=image_grid(comparison_path, judges, config["evaluation"]["grid_prompts"]),
        shown_images=min(MAX_IMAGES, metrics["images_per_prompt"]),
        charts={name: Markup(svg) for name, svg in _charts(run_dir, comparison_path, metrics, judges).items()},
        pair_stages=_pair_stages(run_dir),
        trained_stages=_json(run_dir / TRAINING / "stages.json"),
        manifests=manifests,
        total_seconds=sum(manifest["seconds"] for manifest in manifests.values()),
        versions=_merged(manifests.values(), "versions"),
        machine=_merged(manifests.values(), "machine"),
        config=config_text,
    )
    aside = output_path.with_name(f"{output_path.name}.tmp")
    aside.write_text(page, encoding="utf-8")
    aside.replace(output_path)


def find(metrics: Mapping[str, Any], rewards: Mapping[str, Any]) -> list[Finding]:
    """Metrics -> a finding a judge, those trained on first, diversity last.

    Args:
        metrics: content of `metrics.json`.
        rewards: `names`, `rank_by` and `weights` of the configuration.
    """
    roles = dict.fromkeys(rewards["names"], "scored, did not rank")
    roles |= dict.fromkeys(ranking_weights(rewards), "trained on")
    order = ["trained on", "scored, did not rank", "held out"]
    found = [_finding(name, roles.get(name, "held out"), judge) for name, judge in metrics["judges"].items()]
    found.sort(key=lambda finding: order.index(finding.role))
    if DIVERSITY in metrics:
        found.append(_finding(DIVERSITY, "no judge", metrics[DIVERSITY]))
    return found


def signs_of_reward_hacking(findings: Sequence[Finding]) -> list[str]:
    """What fell significantly though training never asked for it, while what it asked for rose; empty when nothing.

    A model that errs less also varies less: diversity alone is no sign while a judge held out says better.
    """
    rose = {finding.role for finding in findings if finding.change > 0}
    fell = [finding.name for finding in findings if finding.role != "trained on" and finding.change < 0]
    if "trained on" not in rose or (fell == [DIVERSITY] and "held out" in rose):
        return []
    return fell


def image_grid(comparison_path: Path, judges: Sequence[str], num_prompts: int) -> list[dict[str, Any]]:
    """The first held-out prompts: each with its text and, of `base` and `tuned`, images as data URIs with scores."""
    first = sorted(set(_table(comparison_path, ["prompt_index"])["prompt_index"].to_pylist()))[:num_prompts]
    columns = ["prompt_index", "prompt", "sample_index", *(f"{arm}_image" for arm in ARMS)]
    columns += [f"{arm}_{score_column(judge)}" for arm in ARMS for judge in judges]
    rows = _table(comparison_path, columns, [("prompt_index", "in", first)]) if first else None
    grid: dict[int, dict[str, Any]] = {}
    for row in rows.sort_by([("prompt_index", "ascending"), ("sample_index", "ascending")]).to_pylist() if rows else ():
        shown = grid.setdefault(row["prompt_index"], {"prompt": row["prompt"], "base": [], "tuned": []})
        if len(shown["base"]) == MAX_IMAGES:
            continue
        for arm in ARMS:
            scores = [f"{judge} {_score(row[f'{arm}_{score_column(judge)}'])}" for judge in judges]
            where = f"{comparison_path}: image {row['sample_index']} of prompt {row['prompt_index']}"
            shown[arm].append(_inlined(row[f"{arm}_image"], where) | {"scores": ", ".join(scores)})
    return list(grid.values())


def differences_by_prompt(comparison_path: Path, judges: Sequence[str]) -> dict[str, NDArray[np.floating]]:
    """By judge, ``[prompt]`` mean of tuned minus base; prompts without two finite scores are left out."""
    columns = [f"{arm}_{score_column(judge)}" for arm in ARMS for judge in judges]
    rows = _table(comparison_path, ["prompt_index", *columns])
    _, prompt = np.unique(rows["prompt_index"].to_numpy(), return_inverse=True)
    found: dict[str, NDArray[np.floating]] = {}
    for judge in judges:
        base, tuned = (np.array(rows[f"{arm}_{score_column(judge)}"].to_pylist(), dtype=float) for arm in ARMS)
        valid = np.isfinite(base) & np.isfinite(tuned)
        total, count = np.bincount(prompt[valid], (tuned - base)[valid]), np.bincount(prompt[valid])
        found[judge] = total[count > 0] / count[count > 0]
    return found


def _pair_stages(run_dir: Path) -> list[dict[str, Any]]:
    """What each stage held: as drawn before training, or as training drew it anew by the policy's margins."""
    planned = _json(run_dir / STAGES / "stages.json")
    trained = _json(run_dir / TRAINING / "stages.json")
    return [stage.get("pairs", plan) for stage, plan in zip(trained, planned, strict=True)]


def _charts(run_dir: Path, comparison_path: Path, metrics: Mapping[str, Any], judges: Sequence[str]) -> dict[str, str]:
    return figures.training_curves(_json_lines(run_dir / TRAINING / "updates.jsonl")) | {
        "pairs": figures.pairs_by_rank_gap(_pair_stages(run_dir)),
        "gains": figures.gains({judge: metrics["judges"][judge] for judge in judges}),
        "differences": figures.difference_histograms(differences_by_prompt(comparison_path, judges)),
    }


def _finding(name: str, role: str, judge: Mapping[str, Any]) -> Finding:
    difference, wins = judge["difference"], judge["win_rate"]
    places = _decimal_places(difference)
    signed = {end: _number(difference[end], places, "+") for end in ("mean", "low", "high")}
    return Finding(
        name=name,
        role=role,
        change=int(difference["low"] > 0) - int(difference["high"] < 0),
        values={
            "base": _number(judge["base"]["mean"], places),
            "tuned": _number(judge["tuned"]["mean"], places),
            "difference": signed["mean"],
            "interval": f"[{signed['low']}, {signed['high']}]",
            "win_rate": f"{100 * wins['mean']:.0f} %",
            "win_rate_interval": f"[{100 * wins['low']:.0f}, {100 * wins['high']:.0f}] %",
        },
        num_missing=judge["num_missing"],
    )


def _decimal_places(difference: Mapping[str, float]) -> int:
    """As many as show two digits of the difference, whatever the judge's unit."""
    largest = max(abs(difference["low"]), abs(difference["high"]))
    return min(6, max(0, 1 - math.floor(math.log10(largest)))) if largest > 0 else 3


def _number(value: float, places: int, sign: str = "-") -> str:
    return f"{value:{sign}.{places}f}".replace("-", "−")


def _score(value: float | None) -> str:
    return "no score" if value is None or not math.isfinite(value) else f"{value:.4g}".replace("-", "−")


def _inlined(png: bytes, where: str) -> dict[str, Any]:
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow speaks of a damaged PNG in all three
        raise StoreError(
            f"{where}: is not a PNG ({error}); delete its folder and run `cdpo run CONFIG` to make it anew"
        ) from None
    if max(image.size) > MAX_PIXELS:
        image.thumbnail((MAX_PIXELS, MAX_PIXELS), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        png = buffer.getvalue()
    uri = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return {"uri": uri, "pixelated": max(image.size) < PIXELATED_BELOW, "width": image.width, "height": image.height}


def _merged(manifests: Any, key: str) -> dict[str, str]:
    """What the steps were made with; several values where they differ."""
    values: dict[str, list[str]] = {}
    for manifest in manifests:
        for name, value in manifest[key].items():
            if value not in values.setdefault(name, []):
                values[name].append(value)
    return {name: ", ".join(found) for name, found in values.items()}


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # prompts, names and warnings are text from elsewhere
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _missing(path) from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise _damaged(path, error) from None


def _json_lines(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in _text(path).splitlines()]
    except ValueError as error:
        raise _damaged(path, error) from None


def _table(path: Path, columns: Sequence[str], filters: Any = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(columns), filters=filters)
    except FileNotFoundError:
        raise _missing(path) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from None


def _missing(path: Path) -> StoreError:
    anew = "" if path.name == CONFIG else f"delete {path.parent} and "  # the configuration is written by every run
    return StoreError(f"{path}: is missing, and the report needs it; {anew}run `cdpo run CONFIG` to make it anew")


def _damaged(path: Path, error: Exception) -> StoreError:
    return StoreError(f"{path}: is damaged ({error}); delete {path.parent} and run `cdpo run CONFIG` to make it anew")
