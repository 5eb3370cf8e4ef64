"""Run folder, finished or not -> page that follows the run in a browser."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from markupsafe import Markup
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from cdpo_ray.dataflow.parts import QUARANTINE
from cdpo_ray.errors import CdpoError, StoreError, printable
from cdpo_ray.evaluation import figures
from cdpo_ray.evaluation.report import RUN_AGAIN, UpdateRecord, read_updates
from cdpo_ray.pages.page import render
from cdpo_ray.pages.previews import PreviewRow, preview_rows
from cdpo_ray.pages.server import Answer
from cdpo_ray.progress.status import newest_checkpoint, read_status, run_rounds, run_status
from cdpo_ray.records import COMMITS_DIR, REPORT, STEP_FOLDERS, TRAINING
from cdpo_ray.store import RunFolder, exists, path_within, read_untrusted
from cdpo_ray.store.untrusted import other_keys_allowed, read_untrusted_bytes

HERE = Path(__file__).parent
REFRESH_SECONDS = 3.0
"""Age from which the content is rendered again; `live.js` asks for it at the same interval."""
CURVES = {
    "error_change": ("Policy minus reference error", "Below 0 the policy predicts better than the reference."),
    "loss": ("Loss", "Falls below log 2 ≈ 0.693 when the policy separates chosen from rejected."),
    "implicit_accuracy": ("Implicit accuracy", "Share of pairs whose margin is above 0; one half is chance."),
    "margin": ("Margin", "How much more the policy favours the chosen image than the reference does."),
    "learning_rate": ("Learning rate", "After the warm-up and decay of training.schedule."),
    "grad_norm": ("Gradient norm", "Before clipping to training.max_grad_norm."),
}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'"
REPORT_POLICY = "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The report in the folder may be somebody else's: it may neither run scripts nor load anything."""


@other_keys_allowed
class _State(TypedDict):
    records: Annotated[list[UpdateRecord], Field(max_length=10_000_000)]


@other_keys_allowed
class _Checkpoint(TypedDict):
    """Keys of a checkpoint's `state.json` that the page shows."""

    state: _State


_CHECKPOINT: TypeAdapter[_Checkpoint] = TypeAdapter(_Checkpoint)


class LiveRun:
    """The page of a run; charts are drawn again only when a checkpoint has brought new updates.

    Args:
        run_dir: folder of the run.

    Raises:
        StoreError: the folder is not a run's.
    """

    def __init__(self, run_dir: Path) -> None:
        run_status(run_dir)
        self.run_dir = run_dir
        self._lock = threading.Lock()  # matplotlib's styles are not thread-safe
        self._content, self._rendered_at = b"", -REFRESH_SECONDS
        self._charts: tuple[str, dict[str, str]] = ("", {})

    def answer(self, path: str) -> Answer | None:
        """Answer to a request for a path; `None`: there is no such page."""
        if path == "/":
            return Answer(self._page(), "text/html", POLICY)
        if path == "/content":
            return Answer(self.content(), "text/html", POLICY)
        if path == "/live.js":
            return Answer((HERE / "live.js").read_bytes(), "text/javascript", POLICY)
        for number, run in enumerate(self._rounds(), start=1):
            if path == f"/report-{number}" and exists(run.path / REPORT):
                page = read_untrusted_bytes(path_within(run.path, REPORT), remedy=RUN_AGAIN)
                return Answer(page, "text/html", REPORT_POLICY)
        return None

    def content(self) -> bytes:
        """The part of the page that changes."""
        with self._lock:
            if time.monotonic() - self._rendered_at >= REFRESH_SECONDS:
                self._content = self._render().encode()
                self._rendered_at = time.monotonic()
            return self._content

    def _page(self) -> bytes:
        name = printable(self.run_dir.resolve().name, 200)
        return render(HERE / "live.html.jinja", name=name, content=Markup(self.content().decode())).encode()

    def _rounds(self) -> list[RunFolder]:
        return run_rounds(self.run_dir, read_status(self.run_dir))

    def _render(self) -> str:
        try:
            status, rounds = run_status(self.run_dir), self._rounds()
            trained = [run for run in rounds if _training_dir(run)] or rounds[:1]
            previews, charts, faults = self._training(trained[-1])
            numbers = [number for number, run in enumerate(rounds, start=1) if exists(run.path / REPORT)]
            quarantined = {run.path.name: _num_quarantined(run) for run in rounds}
        except CdpoError as error:  # a file may be replaced while it is read
            return render(HERE / "live_fault.html.jinja", fault=printable(error, 1000))
        return render(
            HERE / "live_content.html.jinja",
            status=status,
            reports=numbers,
            num_quarantined=sum(quarantined.values()),
            round=rounds.index(trained[-1]) + 1,
            previews=previews,
            charts=[(Markup(charts[name]), *words) for name, words in CURVES.items() if name in charts],
            faults=faults,
        )

    def _training(self, run: RunFolder) -> tuple[Sequence[PreviewRow], dict[str, str], list[str]]:
        """Previews and charts of a round so far, and the faults of files that cannot be shown."""
        folder, faults = _training_dir(run), list[str]()
        if folder is None:
            return [], {}, []
        previews: Sequence[PreviewRow] = []
        try:
            previews = preview_rows(folder)
        except StoreError as error:
            faults.append(printable(error, 1000))
        try:
            self._draw(folder)
        except (StoreError, FileNotFoundError) as error:  # a checkpoint may be deleted while it is read
            faults.append(printable(error, 1000))
        return previews, self._charts[1], faults

    def _draw(self, folder: Path) -> None:
        """Draw the charts, if there are other updates than those of the last time."""
        checkpoint = newest_checkpoint(folder)
        path = path_within(folder, f"{COMMITS_DIR}/{checkpoint}/state.json" if checkpoint else "updates.jsonl")
        if str(path) == self._charts[0] or not exists(path):
            return
        updates: Sequence[Any] = (
            read_untrusted(path, _CHECKPOINT, remedy="training resumes from an earlier checkpoint")["state"]["records"]
            if checkpoint
            else read_updates(path)
        )
        self._charts = (str(path), figures.training_curves(updates) if updates else {})


def _training_dir(run: RunFolder) -> Path | None:
    """Folder of the training, finished or not; `None`: it has not started."""
    folders = (path_within(run.path, name) for name in (TRAINING, f"{TRAINING}.partial"))
    return next(filter(exists, folders), None)


def _num_quarantined(run: RunFolder) -> int:
    """Number of prompts quarantined so far in the steps that are not finished; manifests count those of the others."""
    unfinished = [run.path / f"{folder}.partial" / QUARANTINE for folder in STEP_FOLDERS if not run.has(folder)]
    return sum(len({path.name[:12] for path in folder.glob("*.jsonl")}) for folder in unfinished)
