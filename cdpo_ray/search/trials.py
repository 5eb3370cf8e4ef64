"""Stored trials, one file per trial: its point, state and reports."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from cdpo_ray.config.knobs import SECTIONS
from cdpo_ray.errors import StoreError
from cdpo_ray.records import TRIAL
from cdpo_ray.store import make_folder, path_within, read_untrusted, write_json
from cdpo_ray.store.untrusted import Count, other_keys_allowed

RUNNING, STOPPED, DONE, FAILED = "running", "stopped", "done", "failed"
OBJECTIVES = ("reward", "win_rate", "diversity", "implicit_accuracy")
"""Keys of a report that may be maximised; see `trial_run.stage_report`."""
DRIVER_CPUS = 0.01
"""CPUs of a trial's driver: with 1, the drivers could take all CPUs and leave none for their workers."""
PAPER = 1
"""Number of the trial with the paper's schedule."""

Report = dict[str, Any]
Point = dict[str, Any]
"""Values that a trial tries, by key of the config, such as `training.beta`; only of knobs whose condition holds."""


@dataclass(frozen=True)
class Trial:
    """One schedule, trained stage by stage.

    Attributes:
        number: 1-based, in the order of proposal.
        state: `running` (or interrupted), `stopped` after an early stage, `done`, or `failed`.
        reports: reports of its stages, in order: see `trial_run.stage_report`, and `order`, the 1-based position among
            all reports of the search.
        error: error message of a failed trial.
        seed: `training.seed`; `None`: the search's config.
        num_invalid: number of points skipped before this one because their values are not valid together.
    """

    number: int
    point: Point
    state: str = RUNNING
    reports: tuple[Report, ...] = ()
    error: str | None = None
    seed: int | None = None
    num_invalid: int = 0

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.number:03d}" if self.seed is None else f"{self.number:03d}-seed-{self.seed}"

    @property
    def last_stage(self) -> int:
        """Stage of its last report; 0 without reports."""
        return int(self.reports[-1]["stage"]) if self.reports else 0


def confirming_trials(trials: Sequence[Trial], count: int, *, searched_with: int) -> list[Trial]:
    """The same schedules with ``count`` new seeds, which no trial of the search was trained with.

    Args:
        searched_with: seed of the trainings of the search.
    """
    seeds = range(searched_with + 1, searched_with + 1 + count)
    return [Trial(trial.number, trial.point, seed=seed) for seed in seeds for trial in trials]


@dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving, with the curriculum's stage as the resource.

    Attributes:
        metric: key of a report, maximised.
        max_stages: maximum number of stages of a trial.
        grace_stages: minimum number of stages before a trial is stopped.
        reduction_factor: one in this many trials continues.

    Source: arXiv:1810.05934.
    """

    metric: str
    max_stages: int
    grace_stages: int
    reduction_factor: float


@other_keys_allowed
class _ReportRecord(TypedDict):
    """Keys that every stored report needs."""

    stage: Annotated[int, Field(ge=1, le=10_000)]
    is_last: bool
    order: Count
    reward: NotRequired[float | None]
    win_rate: NotRequired[float | None]
    diversity: NotRequired[float | None]
    implicit_accuracy: NotRequired[float | None]


class _TrialRecord(TypedDict):
    """`trial.json`; its point may set keys of the schedule only."""

    number: Annotated[int, Field(ge=1, le=10_000_000)]
    point: dict[Annotated[str, Field(pattern=rf"^({'|'.join(SECTIONS)})\.[a-z_.]+$")], Any]
    state: Literal["running", "stopped", "done", "failed"]
    reports: list[_ReportRecord]
    error: str | None
    seed: Count | None
    num_invalid: Count


_TRIAL_RECORD: TypeAdapter[_TrialRecord] = TypeAdapter(_TrialRecord)


class Trials(Mapping[str, Trial]):
    """A folder of trials by name; each is a run with `trial.json` beside its steps, written by the driver only.

    A trial is done once the report of its last stage is stored, even if its process is killed after that.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = [read_trial(file.parent) for file in path.glob(f"*/{TRIAL}")]
        self._by_name = {
            trial.name: trial for trial in sorted(found, key=lambda trial: (trial.number, trial.seed or 0))
        }

    def __getitem__(self, name: str) -> Trial:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def put(self, trial: Trial) -> Trial:
        """Store a trial, new or changed."""
        self._by_name[trial.name] = trial
        folder = path_within(self.path, trial.name)
        make_folder(folder)
        write_json(folder / TRIAL, asdict(trial))
        return trial

    def add_report(self, name: str, report: Report) -> Trial:
        """Add the report of a stage, unless it is stored already; a restarted trial may report a stage again."""
        trial = self[name]
        if report["stage"] <= trial.last_stage:
            return trial
        order = 1 + sum(len(each.reports) for each in self.values())
        state = DONE if report["is_last"] else trial.state
        return self.put(replace(trial, state=state, reports=(*trial.reports, report | {"order": order})))


def read_trial(folder: Path) -> Trial:
    """Read a trial from its folder.

    Raises:
        StoreError: its file is damaged, belongs to another trial, or lies behind a link that leads out.
    """
    remedy = f"delete {folder} to try that point again"
    record = read_untrusted(path_within(folder.parent, f"{folder.name}/{TRIAL}"), _TRIAL_RECORD, remedy=remedy)
    trial = Trial(**record | {"reports": tuple(record["reports"])})
    if trial.name != folder.name:
        raise StoreError(f"{folder / TRIAL}: is damaged (it belongs to trial {trial.name}); {remedy}")
    return trial
