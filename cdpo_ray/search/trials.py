"""Trials as they are kept: what each tries and what it reported, a file a trial."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cdpo_ray.store import make_folder, read_json, write_json

TRIAL = "trial.json"
RUNNING, STOPPED, DONE, FAILED = "running", "stopped", "done", "failed"
PAPER = 1
"""Number of the trial that is the paper's."""

Point = dict[str, Any]
"""What a trial tries: keys of the config, as `training.beta`, and their values; only of knobs whose condition holds."""


@dataclass(frozen=True)
class Trial:
    """One schedule, trained stage by stage.

    Attributes:
        number: 1-based, in the order in which they were proposed.
        state: `running` (or broken off), `stopped` after an early stage, `done`, or `failed`.
        reports: of its stages, in order; see `Validation.__call__`, with `stage`, `is_last`, and `order`, its place
            among all reports of the search.
        error: why it failed.
    """

    number: int
    point: Point
    state: str = RUNNING
    reports: tuple[dict[str, Any], ...] = ()
    error: str | None = None

    @property
    def name(self) -> str:
        return f"{self.number:03d}"

    @property
    def last_stage(self) -> int:
        """Of its reports; 0 if there is none."""
        return int(self.reports[-1]["stage"]) if self.reports else 0


class Trials:
    """``trials/``: a folder a trial, which is a run, with `trial.json` beside its steps; the driver alone writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Trial]:
        """All that were begun, by number."""
        records = [read_json(path) for path in sorted(self.path.glob(f"*/{TRIAL}"))]
        return [Trial(**{**record, "reports": tuple(record["reports"])}) for record in records]

    def write(self, trial: Trial) -> None:
        make_folder(self.path / trial.name)
        write_json(self.path / trial.name / TRIAL, asdict(trial))
