"""`cdpo tune`: config -> samples and scores -> trials on them -> results of the search."""

import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import yaml
from pydantic import TypeAdapter

from cdpo_ray.config import Config, SearchSection
from cdpo_ray.config.knobs import grid_points
from cdpo_ray.errors import ConfigError, SearchError, StoreError
from cdpo_ray.progress import Progress
from cdpo_ray.progress.trackers import TrackedRun
from cdpo_ray.records import CONFIRMATION, FOUND, HELDOUT, TRAINING, TRIALS, VALIDATION
from cdpo_ray.resources import Demand, check_resources, count_fitting
from cdpo_ray.run import run_dir_of, run_steps
from cdpo_ray.search.findings import best, objective_text, search_summary, table_of, value_text
from cdpo_ray.search.importance import importance
from cdpo_ray.search.proposals import propose
from cdpo_ray.search.report import write_report
from cdpo_ray.search.space import config_of, first_point, space_of
from cdpo_ray.search.trial_run import train_trial
from cdpo_ray.search.trials import (
    DONE,
    DRIVER_CPUS,
    FAILED,
    PAPER,
    RUNNING,
    STOPPED,
    Halving,
    Point,
    Trial,
    Trials,
    confirming_trials,
)
from cdpo_ray.session import cluster_nodes, ray_session
from cdpo_ray.steps import SIDES_COMPARED, STEPS, demands_of, sampling_to_compare
from cdpo_ray.store import (
    SETTINGS_REMEDY,
    RunFolder,
    delete,
    differences,
    exists,
    path_within,
    read_shards,
    read_untrusted,
    write_json,
    write_text,
)
from cdpo_ray.training.job import ValidationJob

log = logging.getLogger(__name__)
GENERATE, SCORE, _, TRAIN, _ = STEPS
SHARED_STEPS = (GENERATE, SCORE, *SIDES_COMPARED)
"""Steps whose output all trials share."""
SETTINGS_FILE = "search.json"
BUDGET_KEYS = {"num_trials", "max_concurrent_trials", "confirm_seeds"}
"""Keys of `SearchSection` that may change when a search is resumed."""


def find_schedule(
    config: Config, *, address: str | None = None, verbose: bool = False, command: str | None = None
) -> str:
    """Try schedules on the same samples and scores, and confirm the best; resumes an interrupted search.

    Writes `tune.json`, `tune.html` and `best.yaml` into the run's folder.

    Args:
        address, verbose, command: see `run_steps`.

    Returns:
        Results as a table for the terminal.

    Raises:
        CdpoError: any error of a step or of the search; finished steps and trials are kept.
    """
    if config.search is None:
        raise ConfigError("`search` is missing, but `cdpo tune` needs it; add it, for example as in configs/tune.yaml")
    section = config.search
    with ExitStack() as stack:

        @functools.cache
        def start_ray() -> int:
            stack.enter_context(ray_session(address=address, verbose=verbose))
            return max_concurrent_trials(config, section)

        run = RunFolder(run_dir_of(config))
        if not all(run.has(step.folder) for step in SHARED_STEPS):
            start_ray()
        run_steps(config, SHARED_STEPS, address=address, verbose=verbose, command=command)
        stack.enter_context(run.locked())
        tracked = TrackedRun(config.run.name, run.path, config.plain())
        progress = stack.enter_context(Progress(tracked, tracking=config.tracking.options, command=command))
        _refuse_changed_search(config, run)
        search = _Search(config, section, run, progress, start_ray)
        search.explore()
        leader = search.leader()
        search.confirm(leader)
        return search.write_results(leader)


def max_concurrent_trials(config: Config, search: SearchSection) -> int:
    """Maximum number of concurrent trials: what the nodes have room for, or `search.max_concurrent_trials` if smaller.

    With an autoscaler it is `search.max_concurrent_trials` if given, else what the present nodes have room for.

    Raises:
        ResourceError: no trial fits, and no autoscaler can add nodes.
    """
    nodes, grows = cluster_nodes()
    demands = [Demand("search", "driver of a trial", 1, 1, DRIVER_CPUS, 0), *demands_of(TRAIN, config)]
    fitting, configured = count_fitting(demands, nodes), search.max_concurrent_trials
    if grows:
        return configured or fitting or 1
    if not fitting:
        check_resources("a trial", demands, nodes)
    return min(fitting, configured or fitting)


class _Search:
    """A search within its run's folder.

    Args:
        start_ray: called before the first trial is trained; returns the maximum number of concurrent trials.
    """

    def __init__(
        self,
        config: Config,
        search: SearchSection,
        run: RunFolder,
        progress: Progress,
        start_ray: Callable[[], int],
    ) -> None:
        self.config, self.search, self.run, self.progress, self.start_ray = config, search, run, progress, start_ray
        self.space = space_of(config)
        self.trials = Trials(path_within(run.path, TRIALS))
        self.confirmation = Trials(path_within(run.path, CONFIRMATION))

    @property
    def judge(self) -> str:
        judge = self.config.search_judge
        assert judge is not None, "checked by the config"
        return judge

    def explore(self) -> None:
        """Run interrupted and failed trials again, then new ones, until `num_trials` or the end of the space."""

        def to_try() -> Iterator[Trial]:
            yield from [trial for trial in self.trials.values() if trial.state in (RUNNING, FAILED)]
            while (proposed := self._proposed()) is not None:
                yield proposed

        total = self.search.num_trials or sum(1 for _ in grid_points(self.space))
        self._train("explore", self.trials, to_try(), VALIDATION, total=total, halving=self._halving())
        for trial in self.trials.values():
            if trial.state == STOPPED:
                delete(self.trials.path / trial.name / f"{TRAINING}.partial")  # its checkpoints are not needed any more

    def leader(self) -> Trial:
        """The best of the finished trials.

        Raises:
            SearchError: the first trial, the paper's, failed, or no finished trial has a value of the first objective.
        """
        failed = [trial for trial in self.trials.values() if trial.state == FAILED]
        if failed:
            log.warning("%d of %d trials failed; run the same command to retry them", len(failed), len(self.trials))
        leader = best([*self.trials.values()], self.search.objectives)
        if leader is None or any(trial.number == PAPER for trial in failed):
            failures = [f"trial {trial.name} failed: {trial.error}" for trial in failed[:3]]
            reasons = "; ".join(failures or [f"no trial has a {self.search.objectives[0]}: the judge scored no image"])
            raise SearchError(
                f"{self.trials.path}: the paper's schedule cannot be compared with others: {reasons}; fix the cause and"
                " run the same command again"
            )
        return leader

    def confirm(self, leader: Trial) -> None:
        """Train the best and the paper's schedule with new seeds, and measure both on the held-out prompts."""
        if leader.number == PAPER:
            return
        paper = next(trial for trial in self.trials.values() if trial.number == PAPER)
        given = self.config.training.seed
        searched_with = self.config.run.seed if given is None else given
        wanted = confirming_trials([paper, leader], self.search.confirm_seeds, searched_with=searched_with)
        known = [self.confirmation.get(trial.name, trial) for trial in wanted]
        to_train = (trial for trial in known if trial.state != DONE)
        self._train("confirm", self.confirmation, to_train, HELDOUT, total=len(wanted))

    def write_results(self, leader: Trial) -> str:
        """Write `best.yaml`, `tune.json` and `tune.html`; returns a table for the terminal and the files' paths."""
        config, path, trials = self.config, self.run.path, [*self.trials.values()]
        confirmed = [trial for trial in self.confirmation.values() if trial.state == DONE]
        found = search_summary(
            trials,
            name=config.run.name,
            algorithm=self.search.algorithm,
            objectives=self.search.objectives,
            judge=self.judge,
            knobs=[asdict(knob) for knob in self.space],
            num_invalid=sum(trial.num_invalid for trial in trials),
            importance=importance(self.space, trials, self.search.objectives[0]),
            paper_runs={trial.seed or 0: trial for trial in confirmed if trial.number == PAPER},
            found_runs={trial.seed or 0: trial for trial in confirmed if trial.number == leader.number},
            heldout_ids=read_shards(self.run.step(HELDOUT), ["prompt_id"])["prompt_id"].to_pylist(),
            best_config=str(path / "best.yaml"),
        )
        kept = next(trial for trial in trials if trial.number == found["kept"])
        schedule = config_of(config, kept.point, name=f"{config.run.name}-best", run_dir=config.run.dir)
        plain = schedule.model_dump(mode="json", exclude_unset=True)
        origin = f"# This is trial {kept.number} of {len(trials)}, on the images and scores of {path}."
        text = f"# {found['sentence']}\n{origin}\n" + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        write_text(path / "best.yaml", text)
        write_json(path / FOUND, found)
        write_report(found, path / "tune.html")
        return f"{table_of(found)}\n{path / 'best.yaml'}\n{path / 'tune.html'}"

    def _proposed(self) -> Trial | None:
        """The next new trial; `None` after `num_trials`, or if the space has no more points."""
        known = [*self.trials.values()]
        number = next(number for number in itertools.count(1) if Trial(number, {}).name not in self.trials)
        if number == PAPER:
            return Trial(PAPER, first_point(self.config))
        if self.search.num_trials is not None and number > self.search.num_trials:
            return None
        proposal = propose(
            self.space,
            self.search.algorithm,
            self.search.objectives,
            number,
            known,
            self.config.run.seed,
            self._is_valid,
        )
        if proposal.point is None:
            if self.search.num_trials:
                log.warning(
                    "the space has no more points: %d trials instead of %d (points drawn again: %d; points with invalid"
                    " values: %d)",
                    len(known), self.search.num_trials, proposal.num_known, proposal.num_invalid,
                )  # fmt: skip
            return None
        return Trial(number, proposal.point, num_invalid=proposal.num_invalid)

    def _is_valid(self, point: Point) -> bool:
        try:
            config_of(self.config, point, name="any", run_dir=self.config.run.dir)
        except ConfigError as error:
            log.info("skipped %s: %s", _point_text(point), str(error).splitlines()[-1].strip())
            return False
        return True

    def _train(
        self,
        verb: str,
        trials: Trials,
        to_run: Iterator[Trial],
        side: str,
        *,
        total: int,
        halving: Halving | None = None,
    ) -> None:
        """Train trials and judge them on the prompts of a side; Ray is not started if there are none.

        Args:
            verb: name of the phase in the progress output.
            trials: folder of the trials.
            to_run: trials to run, in order.
            side: folder of the base model's images and scores, of the validation or the held-out prompts.
            total: expected number of trials, including those that have ended.
            halving: early stopping, if given.
        """
        first = next(to_run, None)
        if first is None:
            return
        max_concurrent = self.start_ray()
        from cdpo_ray.search.tuner import run_trials

        queue = itertools.chain([first], to_run)

        def next_trial() -> Trial | None:
            for trial in queue:
                if trials.get(trial.name, trial).state != STOPPED:  # the scheduler may have stopped an interrupted one
                    log.info("%s: trial %s: %s", verb, trial.name, _point_text(trial.point))
                    return trials.put(replace(trial, state=RUNNING, error=None))
            return None

        def on_change(trial: Trial) -> None:
            self.progress.log_line(self._sentence(trial))
            self.progress.advance(trial.state != RUNNING)

        with self.progress.step(verb, trials.path.name):
            num_ended = sum(trial.state in (DONE, STOPPED) for trial in trials.values())
            self.progress.begin(verb, total=total, unit="trial", done=num_ended)
            run_trials(
                trials,
                next_trial,
                functools.partial(
                    train_trial,
                    trials_dir=str(trials.path.absolute()),
                    config=self._for_all_nodes(),
                    validation=self._validation(side),
                    judge=self.judge,
                ),
                max_concurrent_trials=max_concurrent,
                halving=halving,
                max_restarts=self.config.training.max_restarts,
                on_change=on_change,
            )

    def _halving(self) -> Halving | None:
        early, search = self.search.stop_early, self.search
        most = search.largest("curriculum.num_stages", self.config.curriculum.num_stages)
        return Halving(search.objectives[0], most, early.grace_stages, early.reduction_factor) if early else None

    def _for_all_nodes(self) -> Config:
        """The configuration with an absolute run folder, which is valid on every node."""
        own = self.config.run.model_copy(update={"dir": str(self.run.path.absolute().parent)})
        return self.config.model_copy(update={"run": own})

    def _validation(self, side: str) -> ValidationJob:
        return ValidationJob(
            samples_dir=str(self.run.step(side).absolute()),
            sampling=asdict(sampling_to_compare(self.config, side)),
            judges=self.config.evaluation_judges,
            early_prompts=self.search.early_prompts,
            only_last=side == HELDOUT,
            num_margin_draws=self.config.evaluation.num_margin_draws,
        )

    def _sentence(self, trial: Trial) -> str:
        """State of a trial, for the log."""
        if trial.state == FAILED:
            return f"trial {trial.name}: failed: {trial.error}"
        report = trial.reports[-1]
        objectives = [f"{name} {objective_text(name, report[name])}" for name in self.search.objectives]
        state = {STOPPED: ", stopped", DONE: ", done"}.get(trial.state, "")
        return f"trial {trial.name}: stage {report['stage']}{state}: {', '.join(objectives)}"


def _refuse_changed_search(config: Config, run: RunFolder) -> None:
    """Record the settings of a new search, or compare them with the recorded ones.

    Raises:
        StoreError: the search was started with other settings.
    """
    plain = config.plain()
    settings = {key: plain[key] for key in ("model", "prompts", "curriculum")}
    settings |= {"training": config.training.outcome, "evaluation": config.evaluation.outcome}
    settings |= {"run.seed": config.run.seed}
    settings["search"] = {key: value for key, value in plain["search"].items() if key not in BUDGET_KEYS}
    path = path_within(run.path, SETTINGS_FILE)
    if not exists(path):
        write_json(path, settings)
    elif changed := differences(
        read_untrusted(path, TypeAdapter(dict[str, Any]), remedy=SETTINGS_REMEDY), json.loads(json.dumps(settings))
    ):
        raise StoreError(f"{run.path}: its search was started with {changed}; {SETTINGS_REMEDY}")


def _point_text(point: Point) -> str:
    return ", ".join(f"{key} {value_text(value)}" for key, value in point.items()) or "nothing is searched"
