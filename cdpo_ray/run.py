"""The whole pipeline, step after step; a finished step is skipped."""

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from cdpo_ray.config import Config
from cdpo_ray.cost.gpus import DEFAULT_GPU, Gpu, gpu_of_device, visible_gpu
from cdpo_ray.errors import ConfigError, ResourceError, StoreError, printable
from cdpo_ray.models.folder import check_model
from cdpo_ray.preferences.files import Scan, scan
from cdpo_ray.preflight import refuse_problems, refuse_unavailable_weights
from cdpo_ray.progress import Progress
from cdpo_ray.progress.trackers import TrackedRun
from cdpo_ray.prompts.sources import PromptSplit, split_prompts
from cdpo_ray.records import EVALUATION, HELDOUT, PREDICTED, REPORT, SAMPLES, SCORES, STEP_FOLDERS, TRAINING, VOTES
from cdpo_ray.resources import Node, check_resources
from cdpo_ray.session import cluster_address, cluster_nodes, map_on_nodes, ray_session
from cdpo_ray.steps import (
    Context,
    Step,
    demands_of,
    model_arguments,
    preference_source,
    steps_of,
)
from cdpo_ray.store import (
    CONFIG,
    RunFolder,
    differences,
    exists,
    flat,
    make_folder,
    objects_read_by,
    output_path,
    path_within,
    storage_errors_within,
    write_text,
)
from cdpo_ray.training.job import ValidationJob

log = logging.getLogger(__name__)
CONTENT_KEYS = (".sha256", "preferences.files")
"""Suffixes of settings that hold the SHA-256 of files, whose paths are other keys of the same section."""


def read_prompts(config: Config, scanned: Scan | None = None) -> PromptSplit:
    """Read the prompts of a configuration and split them.

    Args:
        scanned: preferences of the configuration; `None`: they are scanned if needed.
    """
    return split_prompts(
        config.prompts.train or (scanned or scan_preferences(config)).prompts,
        config.prompts.heldout,
        config.prompts.validation,
        seed=config.run.seed,
    )


def scan_preferences(config: Config, *, with_images: bool = False) -> Scan:
    """Scan the preferences of a configuration, without decoding images.

    Args:
        with_images: check that each image exists.

    Raises:
        PreferenceError: the files are missing or broken, too many rows cannot be read, or none has a preference.
        ConfigError: there are more stages than rank gaps in any row.
    """
    assert config.preferences is not None, "requires a config with preferences"
    source, num_stages = preference_source(config), config.curriculum.num_stages
    found = scan(source, with_images=with_images)
    found.refuse_unusable(source, config.preferences.max_bad_fraction)
    if config.curriculum.cuts_by_rank_gap and num_stages > found.num_samples - 1:
        raise ConfigError(
            f"`curriculum.num_stages` is {num_stages}, but at most {found.num_samples} images of a prompt were ranked,"
            f" which have only {found.num_samples - 1} rank gaps; lower it"
        )
    return found


def check_model_of(config: Config) -> None:
    """Check that the model's files on this machine are of its family; loads no weights, logs what a file states.

    Raises:
        ModelError: they are of another family.
    """
    if stated := check_model(config.model.family, **model_arguments(config)):
        log.info("model: %s states: %s", config.model.path, ", ".join(f"{key} {each}" for key, each in stated.items()))


def run_steps(
    config: Config,
    steps: Iterable[Step],
    *,
    address: str | None = None,
    verbose: bool = False,
    command: str | None = None,
    allow_config_change: bool = False,
    validation: ValidationJob | None = None,
    on_stage: Callable[[dict[str, Any]], Any] = lambda summary: None,
    on_end: Callable[[Progress], Any] = lambda progress: None,
) -> RunFolder:
    """Perform the steps that are not finished, round after round; Ray starts when the first of them needs it.

    A round starts once the previous round is trained.

    Args:
        address: of the Ray cluster, see `ray_session`.
        verbose: print the output of Ray and its workers.
        command: the command that resumes the run, which `cdpo status` prints.
        allow_config_change: resume a step that was started with other settings; its manifest records them.
        validation, on_stage: of training, see `Context`.
        on_end: called once all steps of all rounds are finished, before the trackers close.

    Returns:
        Folder of the last round that was started.

    Raises:
        CdpoError: of any kind; steps that finished before it are kept.
    """
    steps = list(steps)
    check_model_of(config)
    prompts = read_prompts(config)
    folders = round_folders(config)
    refuse_problems(config, prompts, unfinished(steps, folders))
    with ExitStack() as stack:
        stack.enter_context(storage_errors_within(run_dir_of(config)))
        stack.enter_context(RunFolder(run_dir_of(config)).locked())
        progress = stack.enter_context(
            Progress(
                TrackedRun(config.run.name, run_dir_of(config), config.plain()),
                tracking=config.tracking.options,
                command=command,
                num_rounds=len(folders),
            )
        )

        @functools.cache
        def start_ray() -> Gpu:
            if cluster_address(address) is None:  # nodes of a cluster have caches of their own
                refuse_unavailable_weights(config, unfinished(steps, folders))
            stack.enter_context(ray_session(address=address, verbose=verbose))
            for line in check_cluster(config, unfinished(steps, folders)):
                log.warning(line)
            return cluster_gpu(cluster_nodes()[0])

        def on_nodes(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
            start_ray()
            return map_on_nodes(function, items)

        if cluster_address(address) is not None:
            stack.enter_context(objects_read_by(on_nodes))
        for number, run in enumerate(folders, start=1):
            previous = folders[number - 2] if number > 1 else None
            if previous and not previous.has(TRAINING):
                return previous
            if len(folders) > 1:
                log.info("round %d/%d", number, len(folders))
            make_folder(run.path)
            context = Context(config, prompts, run, number, previous, progress, validation, on_stage)
            for step in steps:
                perform_step(step, context, start_ray=start_ray, allow_config_change=allow_config_change)
            if _made_by(config, run, previous):
                warn_of_edited_config(config, run)
                _write_config(config, run)
        on_end(progress)
    return folders[-1]


def run_dir_of(config: Config) -> Path:
    """Folder of a run.

    Raises:
        StoreError: Ray would delete it at the end of the job that this process runs in.
    """
    return output_path(config.run.dir, "run.dir") / config.run.name


def round_folders(config: Config) -> list[RunFolder]:
    """Folder of each round: the run's own if there is one round, else `round-1`, `round-2`, ... in it."""
    path = run_dir_of(config)
    if config.rounds == 1:
        return [RunFolder(path)]
    return [RunFolder(path_within(path, f"round-{number}")) for number in range(1, config.rounds + 1)]


def unfinished(steps: Iterable[Step], folders: Sequence[RunFolder]) -> Iterator[Step]:
    """Yield steps that are not finished in every round, and those that may grow; reads the run's folder as it goes."""
    return (step for step in steps if step.grows or not all(run.has(step.folder) for run in folders))


def write_reports(
    config: Config, *, force: bool = False, on_written: Callable[[Path], Any] = lambda path: None
) -> list[Path]:
    """Write `report.html` of each round and return their paths.

    Args:
        force: also overwrite reports that are newer than the round's steps and `config.yaml`, and warn if that differs
            from the configuration; `run_steps` has done so otherwise.
        on_written: called with the path of each report that was not up to date.

    Raises:
        StoreError: a step is not finished.
    """
    folders = round_folders(config)
    paths = [_write_report(run, force=force, on_written=on_written) for run in folders]
    for run in folders if force else []:
        warn_of_edited_config(config, run)
    return paths


def refuse_changes(config: Config) -> None:
    """Compare a configuration with what the run's folder was made with, as `run_steps` does step by step.

    Raises:
        StoreError: a step was made, or started, with other settings or inputs.
    """
    previous = None
    for run in round_folders(config):
        for step in steps_of(config):
            if not all(map(run.has, step.inputs)) or (previous and not previous.has(TRAINING)):
                return
            settings, inputs = step.settings(config), step.fingerprints(config, run, previous)
            if run.has(step.folder):
                run.refuse_difference(step.folder, settings, inputs, grows=step.grows)
            elif step.resumable:
                run.refuse_other_attempt(step.folder, settings, inputs)
        previous = run


def warn_of_edited_config(config: Config, run: RunFolder) -> None:
    """Warn of each difference between the configuration and the run's `config.yaml`, if the file exists.

    `run.dir` is not compared: the folder was found by it, and it is another path if the run's folder was given.
    """
    try:
        then, now = (
            {key: value for key, value in flat(each).items() if key != "run.dir"}
            for each in (run.config(), config.plain())
        )
        changed = differences(then, now)
    except FileNotFoundError:
        return
    except (StoreError, ConfigError) as error:
        log.warning("%s", printable(error, 1000))
        return
    if changed:
        log.warning("%s: differs from the configuration: %s", run.path / CONFIG, printable(changed, 1000))


def check_cluster(config: Config, steps: Iterable[Step]) -> list[str]:
    """Check that steps fit the connected cluster, before the first of them loads a model.

    Returns:
        One warning for each demand that is not met in full.

    Raises:
        ResourceError: a step does not fit, and no autoscaler can add nodes.
    """
    nodes, grows = cluster_nodes()
    warnings = []
    for step in steps:
        try:
            warnings += check_resources(step.verb, demands_of(step, config), nodes)
        except ResourceError as error:
            if not grows:
                raise
            what = str(error).rpartition("; ")[0]
            warnings.append(f"{what}; waiting for nodes from the autoscaler (see `ray status`)")
    return warnings


def cluster_gpu(nodes: Iterable[Node]) -> Gpu:
    """GPU to estimate costs for: the first known of the cluster's and this machine's, else the default."""
    found = (gpu_of_device(node.gpu_name) for node in nodes if node.gpu_name)
    return next(filter(None, found), None) or visible_gpu() or DEFAULT_GPU


def perform_step(
    step: Step, context: Context, *, start_ray: Callable[[], Gpu], allow_config_change: bool = False
) -> None:
    """Perform a step unless it is finished; its inputs are verified first.

    Args:
        start_ray: called before the work starts; returns the GPU to estimate costs for.
        allow_config_change: see `run_steps`.

    Raises:
        StoreError: the step was made with other settings, an input is damaged, or a file that the configuration names
            was changed.
    """
    run, settings = context.run, step.settings(context.config)
    inputs = step.fingerprints(context.config, run, context.previous)
    if run.is_complete(step.folder, settings, inputs, grows=step.grows):
        run.delete_leftovers(step.folder, step.scratch)
        log.info("%s: done already", step.verb)
        return
    _refuse_changed_files(step, settings, context, allow_config_change=allow_config_change)
    if step.resumable and not allow_config_change:
        run.refuse_other_attempt(step.folder, settings, inputs)
    step.refuse_damaged_inputs(context.config, run, context.previous)
    context = replace(context, gpu=start_ray())
    log.info("%s ...", step.verb)
    started = time.monotonic()
    predicted = context.predicted(step.verb)
    with (
        context.progress.step(
            step.verb,
            f"{context.place}{step.folder}",
            round=context.round,
            predicted=predicted,
            waiting_for=_workers_of(step, context.config),
        ),
        run.writing(
            step.folder,
            settings,
            inputs,
            seed=context.config.run.seed,
            resumable=step.resumable,
            grows=step.grows,
            allow_change=allow_config_change,
            scratch=step.scratch,
        ) as (output_dir, output),
    ):
        output.details |= {PREDICTED: predicted} if predicted else {}
        step.perform(context, output_dir, output)
        if changed := differences(settings, step.settings(context.config)):
            raise StoreError(
                f"{step.verb}: a file was changed while the step was running ({changed}); restore the file and run"
                f" the same command again, or delete {output_dir} to restart the step"
            )
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in output.counts.items() if count)
    log.info("%s: %s in %.1f s", step.verb, counts or "done", time.monotonic() - started)
    for warning in output.warnings:
        log.warning("%s: %s", step.verb, warning)


def _workers_of(step: Step, config: Config) -> str:
    """Model, rewards and endpoints that a step waits for, in words."""
    judges = {SAMPLES: config.rewards.judges, SCORES: config.rewards.judges, EVALUATION: config.evaluation_judges}
    names = [f"model `{config.model.path}`"] if step.folder in (SAMPLES, EVALUATION) else []
    for name, options in judges.get(step.folder, {}).items():
        endpoint = options.get("endpoint")
        names.append(f"reward `{name}`" + (f" at {endpoint['url']}" if endpoint else ""))
    return ", ".join(names) or "its workers"


def _refuse_changed_files(step: Step, settings: dict[str, Any], context: Context, *, allow_config_change: bool) -> None:
    """Compare prompt files, models and other files of the configuration with their content when they were read.

    Raises:
        StoreError: one was changed after this command, or an earlier step of the run, read it.
    """
    for side, sha256 in context.prompts.sha256.items():
        if settings.get(f"prompts.{side}.sha256", sha256) != sha256:
            raise StoreError(
                f"`prompts.{side}.source` {getattr(context.config.prompts, side).source}: was changed after this"
                " command had read it; run the same command again"
            )
    if allow_config_change:
        return
    for earlier in itertools.takewhile(lambda other: other != step, steps_of(context.config)):
        if context.run.has(earlier.folder):
            made, now = flat(context.run.manifest(earlier.folder)["settings"]), flat(earlier.settings(context.config))
            changed = {key for key in made.keys() & now.keys() if made[key] != now[key]}
            contents = {key for key in changed if key.endswith(CONTENT_KEYS)}
            for key in sorted(contents):
                section = f"{key.rpartition('.')[0]}."
                # Another changed key of the section names another file.
                if not any(other.startswith(section) for other in changed - contents):
                    raise StoreError(
                        f"{context.run.path / earlier.folder} was made with `{key}` = {made[key]}, the file has"
                        f" {now[key]}; restore the file, or delete the folder to make it from the changed file"
                    )


def _made_by(config: Config, run: RunFolder, previous: RunFolder | None) -> bool:
    """Whether every finished step matches the configuration; scores that were added may rank otherwise."""
    for step in steps_of(config):
        if run.has(step.folder):
            try:
                inputs = step.fingerprints(config, run, previous)
                run.refuse_difference(step.folder, step.settings(config), inputs, grows=step.grows)
            except StoreError as error:
                log.warning("%s is left unchanged: %s", CONFIG, error)
                return False
    return True


def _write_config(config: Config, run: RunFolder) -> None:
    """Write `config.yaml`, unless it is the same: a report that is newer than it stays."""
    path, plain = run.path / CONFIG, yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True)
    if not exists(path) or path.read_bytes() != plain.encode():
        write_text(path, plain)


def _write_report(run: RunFolder, *, force: bool, on_written: Callable[[Path], Any]) -> Path:
    path, votes_dir = run.path / REPORT, path_within(run.path, VOTES)
    sources = [run.path / CONFIG, *(run.step(folder) / "manifest.json" for folder in STEP_FOLDERS)]
    sources += (votes_dir / HELDOUT).glob("*.jsonl") if exists(votes_dir / HELDOUT) else []
    if not force and path.is_file() and path.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        log.info("report: done already")
        return path
    from cdpo_ray.evaluation.people import people_of
    from cdpo_ray.evaluation.report import write_report

    write_report(run.path, path, people=people_of(run, votes_dir))
    log.info("report: %s", path)
    on_written(path)
    return path
