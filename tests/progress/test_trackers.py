"""Each tracker stores its metrics, and a failing one does not delay the run."""

import contextlib
import re
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from cdpo_ray.config import Config, load_config
from cdpo_ray.dataflow.images import decode_png, encode_png
from cdpo_ray.errors import ConfigError, StoreError, TrainingError
from cdpo_ray.progress import Progress, trackers
from cdpo_ray.progress.trackers import TRACKERS, Metrics, TrackedRun, Trackers
from cdpo_ray.steps import STEPS

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
OFFLINE = {"project": "pictures", "mode": "offline"}
SETTINGS = {"training": {"beta": 200, "lora": {"rank": 8}}, "run": {"name": "demo"}}


PROMPT, PAGE = "a *red* circle", "<!doctype html><p>the report</p>"


def png_of(shade: int) -> bytes:
    return encode_png(np.full((3, 4, 4), shade, np.uint8))


def track(run_dir: Path, tracking: dict[str, dict[str, Any]], updates: range, *, done: int = 0) -> dict[str, str]:
    """Act as a training process; returns the ids of its trackers' runs."""
    run_dir.mkdir(exist_ok=True)
    run = TrackedRun("demo", run_dir, SETTINGS)
    with Progress(run, tracking=tracking) as progress, progress.step("train", "4-training"):
        progress.begin("train", total=9, unit="update", done=done)
        for update in updates:
            progress.record({"loss": update / 2}, update=update)
        for update in (0, 3, 6):
            if update <= updates[-1]:
                progress.record_images({PROMPT: png_of(update)}, update=update)
        progress.advance(updates[-1] - done)
        (run_dir / "report.html").write_text(PAGE)
        progress.log_page(run_dir / "report.html")
    assert progress._trackers is not None
    return progress._trackers.run_ids


def test_wandb_stores_values_and_settings_offline_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "5ec2e7" * 7)
    monkeypatch.setenv("HF_TOKEN", "hf_5ec2e7")
    first = track(tmp_path, {"wandb": OFFLINE}, range(1, 4))
    time.sleep(1)  # the name of a process's folder has a resolution of one second
    assert track(tmp_path, {"wandb": OFFLINE}, range(1, 7), done=3) == first
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{first['wandb']}/*.wandb"))) == 2
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for text in (b"train/loss", b"pictures", b'"beta"', b"train/preview", PROMPT.encode(), PAGE.encode()):
        assert text in kept
    shades = [np.unique(Image.open(path)) for path in tmp_path.rglob("media/images/train/preview*.png")]
    assert sorted(int(shade) for [shade] in shades) == [0, 3, 6]
    assert b"5ec2e7" not in kept


def test_mlflow_stores_each_update_once_and_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the only store that mlflow-skinny includes
    from mlflow import MlflowClient

    where = {"tracking_uri": (tmp_path / "store").as_uri(), "experiment": "pictures"}
    ids = track(tmp_path / "run", {"mlflow": where}, range(1, 4))
    assert track(tmp_path / "run", {"mlflow": where}, range(1, 7), done=2) == ids
    client = MlflowClient(tracking_uri=where["tracking_uri"])
    history = client.get_metric_history(ids["mlflow"], "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(at, at / 2) for at in range(1, 7)]
    kept = client.get_run(ids["mlflow"])
    assert (kept.info.run_name, kept.info.status) == ("demo", "FINISHED")
    assert kept.data.params == {"training.beta": "200", "training.lora.rank": "8", "run.name": "demo"}
    artifacts = Path(urlsplit(kept.info.artifact_uri).path)
    assert (artifacts / "report.html").read_text() == PAGE
    assert (artifacts / "train" / "previews" / "prompts.txt").read_text() == PROMPT
    steps = {path: int(re.search(r"step\W(\d+)\W", path.name)[1]) for path in artifacts.glob("images/*.png")}  # type: ignore[index]
    assert sorted(steps.values()) == [0, 3, 6]
    assert all((decode_png(path.read_bytes()) == step).all() for path, step in steps.items())


def test_tensorboard_stores_the_images_of_each_stage_once_and_the_configuration_as_text_and_hyperparameters(
    tmp_path: Path,
) -> None:
    track(tmp_path, {}, range(1, 4))
    track(tmp_path, {}, range(1, 7), done=3)
    of_step = EventAccumulator(str(tmp_path / "tensorboard" / "train"), size_guidance={"images": 0}).Reload()
    shown = of_step.Images("preview/1")
    assert [event.step for event in shown] == [0, 3, 6]
    assert [decode_png(event.encoded_image_string).max() for event in shown] == [0, 3, 6]
    assert of_step.SummaryMetadata("preview/1").summary_description == f"    {PROMPT}"
    whole = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert b"    training:\n      beta: 200" in whole.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    content = whole.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    assert start.hparams["training.beta"].number_value == 200
    shown_metrics = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment.metric_infos
    assert [(info.name.group, info.name.tag) for info in shown_metrics][:1] == [("train", "loss")]
    assert "loss" in of_step.Tags()["scalars"]


def test_a_failing_tracker_is_reported_once_and_the_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    unreachable = {"tracking_uri": "http://127.0.0.1:9", "experiment": "pictures"}
    track(tmp_path, {"mlflow": unreachable}, range(1, 4))
    warnings = [record.message for record in caplog.records if record.name.startswith("cdpo_ray")]
    assert len(warnings) == 1
    assert warnings[0].startswith("tracking: `mlflow` is disabled, the run continues: MlflowException: ")
    assert list((tmp_path / "tensorboard" / "train").iterdir())


def test_a_slow_tracker_does_not_delay_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    class Slow:
        run_id = None

        def __init__(self, *_: object) -> None:
            self.begin = self.log = lambda *_: released.wait(20)

        def close(self, state: str) -> None: ...

    monkeypatch.setattr(trackers, "Slow", Slow, raising=False)
    monkeypatch.setitem(TRACKERS, "tensorboard", "cdpo_ray.progress.trackers:Slow")
    all_trackers, calls = Trackers(TrackedRun("demo", tmp_path), {}), list[str]()
    all_trackers.log([Metrics("train", 1, {"loss": 1.0})], lambda: calls.append("sent"))
    assert calls == []
    released.set()
    all_trackers.close("ended")
    assert calls == ["sent"]


def test_missing_requirements_of_a_tracker_are_reported_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = TrackedRun("demo", tmp_path)
    with pytest.raises(ConfigError, match=r"^`tracking\.wandb`: WANDB_API_KEY is not set in the environment; set it"):
        Progress(run, tracking={"wandb": OFFLINE | {"mode": "online"}})
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'^`tracking\.mlflow`: is not installed; pip install "cdpo_ray\[mlflow\]"$'):
        Progress(run, tracking={"mlflow": {}})
    assert list(tmp_path.iterdir()) == []


def test_tracking_does_not_change_the_settings_of_a_run() -> None:
    def made_of(config: Config) -> list[Any]:
        return [step.settings(config) for step in STEPS]

    tracked = load_config(
        QUICKSTART, ["tracking.wandb={project: p}", "tracking.mlflow={tracking_uri: ./m, experiment: e}"]
    )
    assert tracked.tracking.options == {
        "wandb": {"project": "p", "mode": "online"},
        "mlflow": {"tracking_uri": "./m", "experiment": "e"},
    }
    assert set(tracked.tracking.options) < set(TRACKERS)
    assert made_of(tracked) == made_of(load_config(QUICKSTART))


def test_fault_27_a_tracking_uri_with_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(
        ConfigError, match=r"`tracking_uri` must contain neither user nor password; set MLFLOW_TR"
    ) as caught:
        load_config(QUICKSTART, ["tracking.mlflow={tracking_uri: 'https://me:5ec2e7@host', experiment: e}"])
    assert "5ec2e7" not in str(caught.value)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_ray_exports_each_value_as_a_gauge(tmp_path: Path) -> None:
    import ray

    trackers = Trackers(TrackedRun("demo", tmp_path), {})
    trackers.log([Metrics("generate", 8, {"images_per_second": 3.5})], lambda: None)
    (node, *_) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    lines: list[str] = []
    deadline = time.monotonic() + 60
    while not lines and time.monotonic() < deadline:
        time.sleep(1)
        page = urllib.request.urlopen(url, timeout=10).read().decode()
        lines = [line for line in page.splitlines() if line.startswith("ray_cdpo_generate_images_per_second{")]
    trackers.close("ended")
    (line,) = lines
    assert 'run="demo"' in line and line.endswith(" 3.5")


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (TrainingError("no"), "FAILED"), (KeyboardInterrupt(15), "KILLED")]
)
def test_mlflow_shows_how_a_run_ended_and_prints_nothing(
    error: BaseException | None,
    status: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    where = {"tracking_uri": (tmp_path / "store").as_uri(), "experiment": "pictures"}
    capfd.readouterr()
    ids = track_until(error, tmp_path / "run", {"mlflow": where})
    assert capfd.readouterr() == ("", "")
    assert MlflowClient(tracking_uri=where["tracking_uri"]).get_run(ids["mlflow"]).info.status == status


@pytest.mark.parametrize(("error", "code"), [(TrainingError("no"), 1), (KeyboardInterrupt(15), 255)])
def test_wandb_is_given_an_exit_code_that_says_how_a_run_ended(
    error: BaseException, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    track_until(error, tmp_path, {"wandb": OFFLINE})
    assert capfd.readouterr() == ("", "")
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content, position, codes = (
        kept.read_bytes(),
        7,
        list[int](),
    )  # a header, then records: checksum, length, type, bytes
    while position < len(content):
        end = position + 7 + int.from_bytes(content[position + 4 : position + 6], "little")
        record = Record.FromString(content[position + 7 : end])
        codes += [record.exit.exit_code] if record.HasField("exit") else []
        position = end
    assert codes == [code]


def track_until(error: BaseException | None, run_dir: Path, tracking: dict[str, dict[str, Any]]) -> dict[str, str]:
    run_dir.mkdir(exist_ok=True)
    with (
        contextlib.suppress(type(error) if error else ()),
        Progress(TrackedRun("demo", run_dir, SETTINGS), tracking=tracking) as progress,
    ):
        progress.begin("train", total=9, unit="update")
        progress.record({"loss": 0.5}, update=1)
        if error:
            raise error
    assert progress._trackers is not None
    return progress._trackers.run_ids


def test_fault_46_a_local_store_in_a_jobs_copy_of_the_working_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    for uri in ("./mlruns", "mlruns", "sqlite:///mlflow.db", copy.as_uri()):
        with pytest.raises(StoreError, match=r"^`tracking\.mlflow\.tracking_uri` .*, in this Ray job's copy of"):
            Progress(TrackedRun("demo", tmp_path), tracking={"mlflow": {"tracking_uri": uri, "experiment": "e"}})
    for uri in ("https://host", f"sqlite:////{tmp_path}/mlflow.db"):
        Progress(TrackedRun("demo", tmp_path), tracking={"mlflow": {"tracking_uri": uri, "experiment": "e"}})
