"""The page of `cdpo watch`: what a run has written so far, to this machine's browsers only."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from test_report import PROMPTS, add_previews, build_run

from cdpo_ray.cli import main
from cdpo_ray.evaluation import live
from cdpo_ray.evaluation.live import LiveRun
from cdpo_ray.pages.server import PageServer
from cdpo_ray.progress.status import STATUS
from cdpo_ray.records import EVALUATION, TRAINING
from cdpo_ray.store import write_json


def running(folder: Path, *, num_updates: int = 6) -> Path:
    """A run in training, with one checkpoint and a prompt that is quarantined."""
    run = build_run(folder)
    add_previews(run)
    for path in (run / EVALUATION).iterdir():
        path.unlink()
    (run / EVALUATION).rmdir()
    (run / "config.yaml").unlink()
    partial = (run / TRAINING).rename(run / f"{TRAINING}.partial")
    (partial / "manifest.json").unlink()
    records = [json.loads(line) for line in (partial / "updates.jsonl").read_text().splitlines()][:num_updates]
    (partial / "updates.jsonl").unlink()
    write_checkpoint(partial, records)
    (partial / "set_aside").mkdir()
    (partial / "set_aside" / "000000000003-0a.jsonl").write_text("{}\n")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    status = {"state": "running", "time": now, "pid": os.getpid(), "host": platform.node(), "num_rounds": 1}
    of_step = {"folder": TRAINING, "round": 1, "done": 5, "total": 8, "unit": "update", "line": "<b>stage</b> 1"}
    write_json(run / STATUS, status | of_step)
    return run


def write_checkpoint(partial: Path, records: list[dict[str, Any]]) -> None:
    folder = partial / "commits" / f"update-{len(records):06d}"
    folder.mkdir(parents=True)
    write_json(folder / "state.json", {"state": {"records": records}})
    write_json(folder / "manifest.json", {})


def content(run: LiveRun) -> str:
    return run.content().decode()


def points(page: str) -> int:
    """Number of updates on the axis of the loss, of which every one is named if they are few."""
    (loss,) = re.findall(r'aria-label="loss \(nats\) over updates".*?</svg>', page, re.DOTALL)
    return max(int(number) for number in re.findall(r">(\d+)</text>", loss))


def test_a_run_in_training_shows_its_steps_previews_curves_and_faults(tmp_path: Path) -> None:
    page = content(LiveRun(running(tmp_path / "run")))
    assert '<progress value="5" max="8"></progress>' in page
    assert "a restart resumes after update-000006" in page
    assert "warning: 3 prompts &lt;b&gt;cut&lt;/b&gt;" in page
    assert "1 prompt quarantined so far in unfinished steps" in page
    assert "last log line: &lt;b&gt;stage&lt;/b&gt; 1" in page
    assert page.count("<img ") == 5 and f"after stage 2: {PROMPTS[0]}" in page
    assert points(page) == 6
    assert "report" not in re.sub(r"[\w-]+\.html", "", page), "there is none yet"


def test_new_updates_and_a_report_appear_and_unchanged_curves_are_not_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = running(tmp_path / "run", num_updates=4)
    monkeypatch.setattr(live, "REFRESH_SECONDS", 0.0)
    run = LiveRun(folder)
    drawn = live.figures.training_curves
    calls: list[int] = []
    monkeypatch.setattr(live.figures, "training_curves", lambda updates: calls.append(len(updates)) or drawn(updates))
    assert points(content(run)) == points(content(run)) == 4
    state = folder / f"{TRAINING}.partial" / "commits" / "update-000004" / "state.json"
    records = json.loads(state.read_text())["state"]["records"]
    write_checkpoint(state.parents[2], [*records, {**records[-1], "update": 5}])
    assert points(content(run)) == 5
    assert calls == [4, 5]
    (folder / "report.html").write_text("<p>the report")
    assert 'href="/report-1"' in content(run)


def test_a_finished_run_and_a_damaged_file_are_shown(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    (run / TRAINING / "updates.jsonl").write_text("{}\n")
    page = content(LiveRun(run))
    assert re.search(r"damaged: .*updates\.jsonl: was altered", page)
    assert re.search(r"updates\.jsonl:1: is damaged \(`stage`: Field required", page)
    assert "<svg" not in page


def test_previews_that_are_no_images_are_named_and_not_served(tmp_path: Path) -> None:
    run = running(tmp_path / "run")
    image = next((run / f"{TRAINING}.partial").rglob("*.png"))
    image.write_bytes(b"<svg onload=alert(1)>")
    page = content(LiveRun(run))
    assert "is not a readable PNG" in page and "onload" not in page


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    run = running(tmp_path_factory.mktemp("live") / "run")
    (run / "report.html").write_text("<script>alert(1)</script>")
    with PageServer(LiveRun(run).answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: PageServer, path: str, host: str | None = None) -> tuple[int, str, str]:
    """Status, content security policy and content of an answer."""
    request = urllib.request.Request(server.url.rstrip("/") + path, headers={"Host": host} if host else {})
    try:
        answer: Any = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.headers["Content-Security-Policy"], answer.read().decode()


def test_the_server_listens_on_the_loopback_interface_alone(server: PageServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("127.0.0.1", 200), ("attacker.example:80", 421), ("localhost.attacker.example", 421)],
)
def test_fault_64_a_request_for_another_host_name_is_refused(server: PageServer, host: str, status: int) -> None:
    assert get(server, "/live.js", host)[0] == status


@pytest.mark.parametrize("path", ["/status.json", "/../status.json", "/report-2", "/report-1/../status.json", "/x"])
def test_fault_64_no_path_leads_to_a_file(server: PageServer, path: str) -> None:
    assert get(server, path)[0] == 404


def test_fault_64_scripts_of_a_run_do_not_run(server: PageServer) -> None:
    status, policy, page = get(server, "/")
    assert status == 200 and page.count("<script") == 1 and '<script src="/live.js">' in page
    assert "script-src 'self'" in policy and "default-src 'none'" in policy and "unsafe-inline' " not in policy
    status, policy, page = get(server, "/report-1")
    assert (status, page) == (200, "<script>alert(1)</script>")
    assert policy.startswith("sandbox; default-src 'none'") and "script" not in policy


def test_watch_prints_the_address_and_ends_at_ctrl_c(tmp_path: Path) -> None:
    run = running(tmp_path / "run")
    command = [sys.executable, "-m", "cdpo_ray", "watch", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        assert b"update-000006" in urllib.request.urlopen(url, timeout=60).read()
        process.send_signal(signal.SIGINT)
        assert (process.wait(60), process.stderr.read()) == (0, "")


def test_watch_names_a_folder_that_is_no_run_and_a_port_that_is_in_use(
    server: PageServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"StoreError: {tmp_path}: is not a run's folder; give one, such as runs/<name>\n"
    run = running(tmp_path / "run")
    assert main(["watch", str(run), "--port", str(server.server_port)]) == 2
    assert capsys.readouterr().err.startswith(f"ConfigError: `--port` {server.server_port}: cannot be used")
