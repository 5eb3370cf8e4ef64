"""The whole way, step after step; a finished step is skipped."""

import functools
import importlib.util
import itertools
import logging
import time
from collections.abc import Callable, Iterable
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
from cdpo_ray.progress import Progress
from cdpo_ray.progress.trackers import TrackedRun
from cdpo_ray.prompts.sources import PromptSplit, split_prompts
from cdpo_ray.records import EVALUATION, PREDICTED, SAMPLES, SCORES, STAGES, STEP_FOLDERS, TRAINING
from cdpo_ray.resources import Node, check_resources
from cdpo_ray.session import cluster_nodes, ray_session
from cdpo_ray.steps import (
    Context,
    Step,
    demands_of,
    export,
    model_arguments,
    preference_frame,
    preference_source,
    prompt_source,
    steps_of,
)
from cdpo_ray.store import (
    CONFIG,
    RunFolder,
    differences,
    flat,
    make_folder,
    output_path,
    path_within,
    read_untrusted,
    storage_errors_within,
    write_text,
)
from cdpo_ray.training.job import ValidationJob

log = logging.getLogger(__name__)
REPORT = "report.html"
CONTENT_KEYS = (".sha256", "preferences.files")
"""Ends of settings that hold the SHA-256 of files that other keys of their section name."""


def read_prompts(config: Config, judged: Scan | None = None) -> PromptSplit:
    """The prompts that a configuration names.

    Args:
        judged: the preferences of the configuration, if they were scanned before.
    """
    return split_prompts(
        prompt_source(config.prompts.train) if config.prompts.train else (judged or scan_preferences(config)).prompts,
        prompt_source(config.prompts.heldout),
        prompt_source(config.prompts.validation) if config.prompts.validation else None,
        seed=config.run.seed,
    )


def scan_preferences(config: Config, *, with_images: bool = False) -> Scan:
    """The preferences of a configuration, without their images.

    Args:
        with_images: see whether each image is there.

    Raises:
        PreferenceError: the files are missing or broken, too many rows cannot be read, or none has a preference.
        ConfigError: no row has as many rank gaps as there are stages.
    """
    assert config.preferences is not None, "asked of a config with preferences"
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
    """Compare the model with its family, as far as it is on this machine; loads no weights.

    Raises:
        ModelError: they differ.
    """
    check_model(config.model.family, **model_arguments(config))


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
) -> RunFolder:
    """Do what of these steps is not done yet, round after round; Ray starts when the first of them needs it.

    A round begins when the one before has been trained. Returns the folder of the last one walked.

    Args:
        address: of the Ray cluster, see `ray_session`.
        verbose: show what Ray and its workers print.
        command: what a user would type to go on with the run; `cdpo status` tells it.
        allow_config_change: go on with a step that was begun with other settings; its manifest tells them.
        validation, on_stage: of training, see `Context`.

    Raises:
        CdpoError: of any kind; what was finished before it stays.
    """
    _refuse_missing_package(config)
    check_model_of(config)
    prompts, steps = read_prompts(config), list(steps)
    folders = round_folders(config)
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
            stack.enter_context(ray_session(address=address, verbose=verbose))
            undone = [step for step in steps if step.grows or not all(run.has(step.folder) for run in folders)]
            for line in check_cluster(config, undone):
                log.warning(line)
            return cluster_gpu(cluster_nodes()[0])

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
                _warn_of_edited_config(config, run)
                plain = yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True)
                write_text(run.path / CONFIG, plain)
    return folders[-1]


def round_folders(config: Config) -> list[RunFolder]:
    """Folder of each round: the run's own, or `round-1`, `round-2`, ... within it."""
    path = run_dir_of(config)
    if config.rounds == 1:
        return [RunFolder(path)]
    return [RunFolder(path_within(path, f"round-{number}")) for number in range(1, config.rounds + 1)]


def write_reports(config: Config, *, anew: bool = False) -> list[Path]:
    """Write `report.html` of each round, unless it is younger than the round's steps; returns their paths.

    Raises:
        StoreError: a step is not done.
    """
    folders = round_folders(config)
    paths = [_write_report(run, anew) for run in folders]
    for run in folders if anew else []:  # else `run_steps` has just written it
        _warn_of_edited_config(config, run)
    return paths


def check_cluster(config: Config, steps: Iterable[Step]) -> list[str]:
    """Compare what steps need with the cluster that we are connected to, before the first of them loads a model.

    Returns what is less than was wanted, a line each.

    Raises:
        ResourceError: a step does not fit, and no autoscaler may add nodes.
    """
    nodes, grows = cluster_nodes()
    told = []
    for step in steps:
        try:
            told += check_resources(step.verb, demands_of(step, config), nodes)
        except ResourceError as error:
            if not grows:
                raise
            what = str(error).rpartition("; ")[0]
            told.append(f"{what}; it waits for nodes that the cluster may add (`ray status` tells)")
    return told


def cluster_gpu(nodes: Iterable[Node]) -> Gpu:
    """The GPU that estimates are made for: the cluster's, this machine's, or the default, the first that is known."""
    found = (gpu_of_device(node.gpu_name) for node in nodes if node.gpu_name)
    return next(filter(None, found), None) or visible_gpu() or DEFAULT_GPU


def find_preference_faults(
    config: Config, *, address: str | None = None, verbose: bool = False
) -> tuple[Scan, list[str]]:
    """All that is wrong with a set of preferences, by file and row; every image is opened, nothing is written.

    Returns:
        What the rows are, and a line for each fault.

    Raises:
        PreferenceError: there is no such set, or it lacks a column.
        ModelError: the model is of another family.
    """
    check_model_of(config)
    source = preference_source(config)
    found = scan(source)
    with ray_session(address=address, verbose=verbose):
        from cdpo_ray.preferences.pool import find_faults

        in_images = find_faults(found.chunks, source=source, frame=preference_frame(config))
    return found, list(dict.fromkeys([*map(str, found.faults), *in_images]))


def compare_runs(run_dirs: list[Path], output_dir: Path | None = None, config: Config | None = None) -> str:
    """Compare what finished runs trained, on the held-out images that they kept; needs no Ray.

    Args:
        output_dir: of `compare.html` and `compare.json`; the folder that the first run lies in by default.
        config: the user's own, whose judges may score the images of runs that lack their scores.

    Returns:
        A table with one row per run, a line for each judge that was left out, and the path of the page.

    Raises:
        CdpoError: a run is not evaluated, two cannot be compared, or a judge that one lacks cannot score.
    """
    from cdpo_ray.evaluation import runs

    output_dir = output_path(output_dir or run_dirs[0].parent, "--out")
    found = runs.compare_runs(run_dirs, output_dir, config.evaluation_judges if config else None)
    return "\n".join([runs.table_of(found), *found["left_out"].values(), str(output_dir / "compare.html")])


def explain_stages(config: Config) -> str:
    """What each stage holds, as a table; draws it to `stages.png` of the run (of each round), the path a line."""
    from cdpo_ray.curriculum.explanation import DESCRIBED_STAGES, draw_stages, stages_table

    told = []
    for run in round_folders(config):
        if run.has(STAGES):
            path = run.step(STAGES) / "stages.json"
            stages = read_untrusted(path, DESCRIBED_STAGES, remedy=f"delete {path.parent} to make it again")
            path = run.path / "stages.png"
            draw_stages(stages, path, title=f"{config.run.name}\n{config.curriculum.sentence}")
            told += [stages_table(stages), str(path)]
    if config.curriculum.measure == "margin":
        told.append("as before the first update; training measures the margins anew at each stage's start")
    return "\n".join(told)


def export_trained(config: Config, format_name: str, output_dir: Path | None = None) -> Path:
    """Write what the last round trained as other tools read it, with a model card; needs no Ray.

    Args:
        format_name: of `cdpo_ray.export.FORMATS`.
        output_dir: `export/<format>` of the run by default.

    Returns:
        The folder.

    Raises:
        StoreError: a step up to training is not done, one was made with another configuration or is damaged, or the
            folder cannot be written.
        ExportError: the format cannot hold what was trained, or the folder is there already.
        ModelError: the base model is needed and cannot be loaded.
    """
    folders = round_folders(config)
    run, previous = folders[-1], folders[-2] if len(folders) > 1 else None
    context = Context(config, read_prompts(config), run, len(folders), previous)
    for step in steps_of(config):
        if step.folder == EVALUATION and not run.has(EVALUATION):
            log.warning("export: not evaluated; the model card will say so")
            continue
        run.refuse_difference(
            step.folder, step.settings(config), step.fingerprints(config, run, previous), grows=step.grows
        )
        if step.folder in (TRAINING, EVALUATION):  # the others are not read; they may be very large
            run.refuse_damage(step.folder)
    _warn_of_edited_config(config, run)
    output_dir = output_dir or path_within(run_dir_of(config), f"export/{format_name}")
    export(context, format_name, output_dir)
    return output_dir


def perform_step(
    step: Step, context: Context, *, start_ray: Callable[[], Gpu], allow_config_change: bool = False
) -> None:
    """Do a step unless it is finished; what it reads is verified before.

    Args:
        start_ray: called before the step's work begins; returns the GPU to estimate costs for.
        allow_config_change: as of `run_steps`.

    Raises:
        StoreError: the step was made otherwise, an input is damaged, or a file that the configuration names was
            changed.
    """
    run, settings = context.run, step.settings(context.config)
    inputs = step.fingerprints(context.config, run, context.previous)
    if run.is_complete(step.folder, settings, inputs, grows=step.grows):
        run.delete_leftovers(step.folder, step.scratch)
        log.info("%s: done already", step.verb)
        return
    _refuse_changed_files(step, settings, context, allow_config_change=allow_config_change)
    step.refuse_damaged_inputs(context.config, run, context.previous)
    context = replace(context, gpu=start_ray())
    log.info("%s ...", step.verb)
    started = time.monotonic()
    predicted = context.predicted(step.verb)
    with (
        context.progress.step(
            step.verb,
            step.folder,
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
                f"{step.verb}: a file was changed after the step had begun to read it ({changed}); restore it and give"
                f" the same command again, or delete {output_dir} to begin again"
            )
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in output.counts.items() if count)
    log.info("%s: %s in %.1f s", step.verb, counts, time.monotonic() - started)
    for warning in output.warnings:
        log.warning("%s: %s", step.verb, warning)


def _workers_of(step: Step, config: Config) -> str:
    """What does the work of a step, in words: its model, its rewards, their endpoints."""
    judges = {SAMPLES: config.rewards.judges, SCORES: config.rewards.judges, EVALUATION: config.evaluation_judges}
    names = [f"model `{config.model.path}`"] if step.folder in (SAMPLES, EVALUATION) else []
    for name, options in judges.get(step.folder, {}).items():
        endpoint = options.get("endpoint")
        names.append(f"reward `{name}`" + (f" at {endpoint['url']}" if endpoint else ""))
    return ", ".join(names) or "its workers"


def _refuse_changed_files(step: Step, settings: dict[str, Any], context: Context, *, allow_config_change: bool) -> None:
    """Compare prompt files, models and other files that the configuration names with what was read of them before.

    Raises:
        StoreError: one was changed since this command, or an earlier step of the run, read it.
    """
    for side, sha256 in context.prompts.sha256.items():
        if settings.get(f"prompts.{side}.sha256", sha256) != sha256:
            raise StoreError(
                f"`prompts.{side}.source` {getattr(context.config.prompts, side).source}: was changed after this"
                " command had read it; give the same command again"
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
                if not any(other.startswith(section) for other in changed - contents):  # else another file was named
                    raise StoreError(
                        f"{context.run.path / earlier.folder} was made with `{key}` = {made[key]}, the file has"
                        f" {now[key]}; restore it, or delete the folder to make it with the file as it is"
                    )


def _made_by(config: Config, run: RunFolder, previous: RunFolder | None) -> bool:
    """Whether every finished step is as this configuration makes it: more scores may rank anew what is there."""
    for step in steps_of(config):
        if run.has(step.folder):
            try:
                inputs = step.fingerprints(config, run, previous)
                run.refuse_difference(step.folder, step.settings(config), inputs, grows=step.grows)
            except StoreError as error:
                log.warning("%s stays as it was: %s", CONFIG, error)
                return False
    return True


def _warn_of_edited_config(config: Config, run: RunFolder) -> None:
    """Name what the run's `config.yaml` says otherwise than the configuration that was given, if it is there."""
    try:
        changed = differences(run.config(), config.plain())
    except FileNotFoundError:
        return
    except (StoreError, ConfigError) as error:
        log.warning("%s", printable(error, 1000))
        return
    if changed:
        log.warning("%s: differs from the configuration: %s", run.path / CONFIG, printable(changed, 1000))


def _write_report(run: RunFolder, anew: bool) -> Path:
    path = run.path / REPORT
    finished = [run.step(folder) / "manifest.json" for folder in STEP_FOLDERS]
    if not anew and path.is_file() and path.stat().st_mtime > max(manifest.stat().st_mtime for manifest in finished):
        log.info("report: done already")
        return path
    from cdpo_ray.evaluation.report import write_report

    write_report(run.path, path)
    log.info("report: %s", path)
    return path


def _refuse_missing_package(config: Config) -> None:
    """Before anything is paid for: training would find out only after all images have been generated."""
    keys = config.keys_that_need_bitsandbytes
    if keys and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f'{", ".join(keys)}: bitsandbytes is not installed; pip install "cdpo_ray[lowmem]"')


def run_dir_of(config: Config) -> Path:
    """Folder of a run.

    Raises:
        StoreError: it would be lost with the Ray job that this process is.
    """
    return output_path(config.run.dir, "run.dir") / config.run.name
