"""Trials as they are kept: what each tries and what it reported, a file a trial."""

from collections.abc import Iterator, Mapping
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
"""What a report holds to be maximised; see `Validation.__call__`."""
DRIVER_CPUS = 0.01
"""Of a trial beside its workers: with a whole one, trials take all CPUs, and no worker ever finds any."""
PAPER = 1
"""Number of the trial that is the paper's."""

Report = dict[str, Any]
Point = dict[str, Any]
"""What a trial tries: keys of the config, as `training.beta`, and their values; only of knobs whose condition holds."""


@dataclass(frozen=True)
class Trial:
    """One schedule, trained stage by stage.

    Attributes:
        number: 1-based, in the order in which they were proposed.
        state: `running` (or broken off), `stopped` after an early stage, `done`, or `failed`.
        reports: of its stages, in order; see `Validation.__call__`, with `stage`, `is_last`, the stage's summary as
            `training`, and `order`, its place among all reports of the search.
        error: why it failed.
        seed: `training.seed`; none: what the search's config has.
        num_invalid: points passed over before this one, for their values do not go together.
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
        """Of its folder."""
        return f"{self.number:03d}" if self.seed is None else f"{self.number:03d}-seed-{self.seed}"

    @property
    def is_done(self) -> bool:
        return self.state == DONE

    @property
    def last_stage(self) -> int:
        """Of its reports; 0 if there is none."""
        return int(self.reports[-1]["stage"]) if self.reports else 0


@dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving on the curriculum's stage.

    Attributes:
        metric: of a report, to be maximised.
        max_stages: of any trial.
        grace_stages: no trial is stopped before.
        reduction_factor: one in so many goes on.

    Source: arXiv:1810.05934.
    """

    metric: str
    max_stages: int
    grace_stages: int
    reduction_factor: float


@other_keys_allowed
class _ReportRecord(TypedDict):
    """What is read of every report, whoever wrote it."""

    stage: Annotated[int, Field(ge=1, le=10_000)]
    is_last: bool
    order: Count
    reward: NotRequired[float | None]
    win_rate: NotRequired[float | None]
    diversity: NotRequired[float | None]
    implicit_accuracy: NotRequired[float | None]


class _TrialRecord(TypedDict):
    """`trial.json`; its point may choose a schedule, and nothing else of the configuration."""

    number: Annotated[int, Field(ge=1, le=10_000_000)]
    point: dict[Annotated[str, Field(pattern=rf"^({'|'.join(SECTIONS)})\.[a-z_.]+$")], Any]
    state: Literal["running", "stopped", "done", "failed"]
    reports: list[_ReportRecord]
    error: str | None
    seed: Count | None
    num_invalid: Count


_TRIAL_RECORD: TypeAdapter[_TrialRecord] = TypeAdapter(_TrialRecord)


class Trials(Mapping[str, Trial]):
    """A folder of trials by name; each is a run, with `trial.json` beside its steps. The driver alone writes it.

    A trial whose last report is of its last stage is done, whatever became of the process that was to say so.
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
        """Keep a trial, new or as it has become."""
        self._by_name[trial.name] = trial
        folder = path_within(self.path, trial.name)
        make_folder(folder)
        write_json(folder / TRIAL, asdict(trial))
        return trial

    def add_report(self, name: str, report: Report) -> Trial:
        """Of a stage; one that is there already, as a restart may tell it again, is passed over."""
        trial = self[name]
        if report["stage"] <= trial.last_stage:
            return trial
        order = 1 + sum(len(each.reports) for each in self.values())
        state = DONE if report["is_last"] else trial.state
        return self.put(replace(trial, state=state, reports=(*trial.reports, report | {"order": order})))


def read_trial(folder: Path) -> Trial:
    """A trial of a folder of trials.

    Raises:
        StoreError: its file is damaged, is of another trial, or lies behind a link that leads out.
    """
    remedy = f"delete {folder} to try that point again"
    record = read_untrusted(path_within(folder.parent, f"{folder.name}/{TRIAL}"), _TRIAL_RECORD, remedy=remedy)
    trial = Trial(**record | {"reports": tuple(record["reports"])})
    if trial.name != folder.name:
        raise StoreError(f"{folder / TRIAL}: is damaged (it is of trial {trial.name}); {remedy}")
    return trial
