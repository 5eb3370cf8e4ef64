"""The front door: `cdpo run CONFIG`, and one verb per step of the way, in its order."""

import argparse
import contextlib
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from cdpo_ray import __version__
from cdpo_ray.config import Config, load_config
from cdpo_ray.cost.estimate import estimate
from cdpo_ray.cost.gpus import DEFAULT_GPU, GPUS, visible_gpu
from cdpo_ray.cost.sentences import cost_lines
from cdpo_ray.errors import CdpoError, ConfigError, ModelError, PreferenceError, printable
from cdpo_ray.export import FORMATS
from cdpo_ray.plan import make_plan
from cdpo_ray.progress.status import run_status
from cdpo_ray.prompts.sources import PromptSplit
from cdpo_ray.run import (
    check_model_of,
    compare_runs,
    explain_stages,
    export_trained,
    find_preference_faults,
    read_prompts,
    run_dir_of,
    run_steps,
    scan_preferences,
    write_reports,
)
from cdpo_ray.steps import steps_of
from cdpo_ray.steps.cost import workload_of
from cdpo_ray.store import output_path, storage_path

VERBS = {
    "check": "say what a run will make and cost, or what is wrong with the config; needs no GPU and starts no Ray",
    "doctor": "say what of this machine, of a cluster or of the storage will not do, and what to do about it",
    "run": "walk the whole way: all of the below, each skipped if it is done already",
    "generate": "prompts -> samples: many images of each prompt, by the base model",
    "import": "preferences that people have -> samples: images encoded once, labels kept",
    "score": "samples -> scores: judge each image",
    "pairs": "scores -> stages: rank, pair by difficulty, draw what each stage trains on",
    "train": "stages -> adapter: staged DPO of a LoRA",
    "evaluate": "adapter -> metrics: base against fine-tuned on held-out prompts",
    "report": "metrics -> report.html",
    "tune": "search the schedule on Ray Tune: trials on the same samples and scores, the best confirmed",
    "export": "adapter -> files that other tools load, with a model card",
    "compare": "metrics of several runs -> compare.html: what each trained, judged by all their judges",
    "status": "say of a run what is done, what runs, what failed and why; reads its folder alone",
}
COMPARE_HELP = """\
Compare what several runs trained, on the held-out images that their evaluations kept; nothing is generated.

The runs must have been put to the same test: model, seed, sampling, held-out prompts and images per prompt. A judge
that only some of them had scores the others' images now. Runs may come from other people: nothing in their folders can
choose an address, environment variable, file, model or code. A judge that needs one is taken from `--judges`, or is
left out. compare.html shows
  - one row per run (what its pairs were ranked by), one column per judge: mean score, and its difference to the base
    model
  - for each judge, how often one run's image is better than another's from the same noise
  - how the looks of the images changed: diversity, saturation, edges, compressed size
  - how often each run's implicit reward agrees with each judge on held-out images
  - the first images of all runs side by side
and compare.json holds its numbers. Intervals are at 95 %, over prompts."""
STATUS_HELP = """\
Say of a run what is done, what runs and how long it will take, what failed and why, and how to go on. It reads the
run's folder alone: from any machine that sees it, with the run alive or not.

exit code: 0 the run is done, or a process works on it; 1 it stands still before its end; 2 no run is there"""
TUNE_HELP = """\
Search what the config's `search` names (any key of `curriculum` and `training`) on Ray Tune.

Samples and scores are made once. Each trial is a whole staged training, judged at each stage's end on prompts that are
neither trained on nor held out; the first is the paper's schedule, poor ones are stopped after an early stage. The best
is trained again with fresh seeds beside the paper's, and both are judged on the held-out prompts.

Writes into the run's folder: trials/ (each a run), confirmation/, tune.html, tune.json, and best.yaml, which `cdpo run`
takes. The same command goes on where it was stopped, and tries again what failed."""
FORMAT_HELP = (
    "diffusers (default): the LoRA for load_lora_weights; kohya: the LoRA for ComfyUI and AUTOMATIC1111;"
    " merged: a whole pipeline folder, the only one for training.method=full"
)
ALLOW_HELP = "go on with training that was begun with other settings; its manifest will tell them"
GPU_HELP = "GPU to estimate hours and memory for; default: this machine's if it is listed, otherwise h100"
ADDRESS_HELP = (
    "head of a Ray cluster; else RAY_ADDRESS, the cluster that this job is in, or a local Ray for this command"
)
JUDGES_HELP = (
    "your own configuration, whose judges and options score the images of runs that lack their scores;"
    " own rewards are imported from the working folder"
)
NO_RAY = ("check", "report", "export", "compare")
EXIT_UNSOUND = 1  # of `doctor` that found something wrong, and of `status` of a run that stands still
EXIT_FAULT = 2
MAX_LINE_CHARS = 4000  # of an error, which may quote what somebody else wrote
NETWORK_LIBRARIES = ("aiohttp", "botocore", "google", "urllib3")  # not all of their errors are OSErrors
OUT_OF_MEMORY = ("annot allocate memory", "failed to map segment", "can't start new thread")
"""Of a shared library, or of a thread, for which a limit leaves no room."""
MAX_FOREIGN = 500  # characters of an error of other libraries
EXIT_SIGNAL = 128  # and the signal's number, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what a command line asks; returns the exit code."""
    _open_standard_streams()
    try:
        try:
            return _main(arguments)
        except SystemExit:  # argparse has printed
            _tell()
            raise
    except _OutputError as error:
        _discard_output()
        if isinstance(error.__cause__, BrokenPipeError):  # as `head` ends it: nothing is wrong
            return EXIT_SIGNAL + signal.SIGPIPE
        _tell_error(f"standard output: {error.__cause__}; what this command made is kept, but not printed")
        return EXIT_FAULT


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="cdpo",
        description="Align a text-to-image model by Curriculum DPO:"
        " prompts -> samples -> scores -> stages -> adapter -> metrics -> report.",
        epilog="Any value of the config can be given on the command line:"
        " cdpo run configs/quickstart.yaml training.beta=100",
    )
    parser.add_argument("--version", action="version", version=f"cdpo_ray {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what Ray and its workers print")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, what in VERBS.items():
        command = verbs.add_parser(
            verb,
            help=what,
            description={"compare": COMPARE_HELP, "status": STATUS_HELP, "tune": TUNE_HELP}.get(verb, what),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if verb == "compare":
            command.add_argument("runs", nargs="+", metavar="RUN", help="two or more finished runs, as runs/<name>")
            command.add_argument("--out", metavar="DIR", help="default: the folder that the first run is in")
            command.add_argument("--judges", metavar="CONFIG", help=JUDGES_HELP)
            continue
        if verb == "status":
            command.add_argument("run", metavar="RUN", help="runs/<name>, or its place in an object store")
            continue
        command.add_argument(
            "config", metavar="CONFIG", help="a YAML file, see configs/", nargs="?" if verb == "doctor" else None
        )
        command.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.beta=100")
        if verb not in NO_RAY:
            command.add_argument("--address", metavar="HOST:PORT", help=ADDRESS_HELP)
        if verb in ("run", "train"):
            command.add_argument("--allow-config-change", action="store_true", help=ALLOW_HELP)
        if verb == "pairs":
            command.add_argument("--explain", action="store_true", help="print and draw what each stage holds")
        if verb == "import":
            command.add_argument("--check", action="store_true", help="only say which rows and images cannot be used")
        if verb == "check":
            command.add_argument("--gpu", choices=GPUS, help=GPU_HELP)
        if verb == "export":
            command.add_argument("--format", choices=FORMATS, default="diffusers", help=FORMAT_HELP)
            command.add_argument("--out", metavar="DIR", help="default: export/<format> of the run")
    asked = _parsed(parser, arguments)
    signal.signal(signal.SIGTERM, _terminate)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("cdpo_ray").setLevel(logging.INFO)
    try:
        return _do(asked)
    except CdpoError as error:
        lines = f"{type(error).__name__}: {error}".split("\n")
        _tell_error("\n".join(printable(line, MAX_LINE_CHARS) for line in lines))
        return EXIT_FAULT
    except KeyboardInterrupt as interrupt:
        _tell_error("interrupted; the same command goes on where it stopped")
        return EXIT_SIGNAL + (interrupt.args or (signal.SIGINT,))[0]
    except Exception as error:
        if asked.verbose or not _is_of_the_machine(error):
            raise
        _tell_error(_in_a_line(error, asked.verb))
        return EXIT_FAULT


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    asked, after_options = parser.parse_known_args(arguments)
    comparing = asked.verb == "compare"
    if any(value.startswith("-") or not (comparing or "=" in value) for value in after_options) or (
        after_options and asked.verb == "status"
    ):
        parser.error(f"unrecognized arguments: {' '.join(after_options)}")
    # argparse ends `key=value ...`, or `RUN ...`, at the first option
    if after_options:
        (asked.runs if comparing else asked.overrides).extend(after_options)
    if comparing and len(asked.runs) < 2:
        parser.error(f"compare: needs two runs or more, got {asked.runs}")
    return asked


class _OutputError(Exception):
    """Standard output cannot be written."""


def _tell(*lines: object) -> None:
    """Print lines; a failure of standard output is kept apart from those of storage and cluster."""
    try:
        print(*lines, sep="\n", end="\n" * bool(lines), flush=True)
    except OSError as error:
        raise _OutputError from error


def _tell_error(line: str) -> None:
    with contextlib.suppress(OSError):  # there is nowhere else to report it
        print(line, file=sys.stderr, flush=True)


def _open_standard_streams() -> None:
    """Reopen standard streams that the caller closed (``>&-``), whose numbers the next files would take."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))


def _discard_output() -> None:
    """Discard the buffer of standard output, which would fail again when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_of_the_machine(error: BaseException) -> bool:
    """Whether an error comes from storage, network, memory or the cluster, and not from a fault of this program."""
    if isinstance(error, ImportError | RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY):
        return True
    if isinstance(error, OSError | MemoryError):
        return True
    library = type(error).__module__.partition(".")[0]
    if library != "ray":
        return library in NETWORK_LIBRARIES
    cause = getattr(error, "cause", None)  # what a task raised; Ray's own errors have none
    return cause is None or (cause is not error and _is_of_the_machine(cause))


def _in_a_line(error: BaseException, verb: str) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(__file__).parent in Path(frame.filename).parents] or frames
    said = printable(next(iter(str(error).strip().splitlines()), ""), MAX_FOREIGN)
    return (
        f"{type(error).__name__}: cdpo {verb}: {said or 'no reason was given'} (in `{ours[-1].name}`,"
        f" {Path(ours[-1].filename).name}:{ours[-1].lineno}); check disk, memory, network and cluster, then give the"
        f" same command again, which goes on where it stopped; `cdpo -v {verb} ...` shows the whole traceback"
    )


def _terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _do(asked: argparse.Namespace) -> int:
    if asked.verb == "compare":
        config = load_config(asked.judges) if asked.judges else None
        output_dir = asked.out and output_path(asked.out, "--out")
        _tell(compare_runs([storage_path(run) for run in asked.runs], output_dir, config))
        return 0
    if asked.verb == "status":
        found = run_status(storage_path(asked.run))
        _tell(found.text)
        return EXIT_UNSOUND if found.is_interrupted else 0
    if asked.verb == "doctor":
        return _examine(asked)
    config, verb = load_config(asked.config, asked.overrides), asked.verb
    goes_on = shlex.join(["cdpo", "tune" if verb == "tune" else "run", asked.config, *asked.overrides])
    if verb == "check":
        run_dir_of(config)
        check_model_of(config)
        judged = scan_preferences(config, with_images=True) if config.preferences else None
        prompts = read_prompts(config, judged)
        _tell(make_plan(config, prompts, _cost(config, prompts, asked.gpu), judged))
    elif verb == "report":
        _tell(*write_reports(config, anew=True))
    elif verb == "run":
        run_steps(
            config,
            steps_of(config),
            address=asked.address,
            verbose=asked.verbose,
            command=goes_on,
            allow_config_change=asked.allow_config_change,
        )
        _tell(*write_reports(config))
    elif verb == "tune":
        from cdpo_ray.search.search import find_schedule  # brings optuna and matplotlib

        _tell(find_schedule(config, address=asked.address, verbose=asked.verbose, command=goes_on))
    elif verb == "export":
        _tell(export_trained(config, asked.format, asked.out and output_path(asked.out, "--out")))
    elif verb in ("generate", "import") and verb != steps_of(config)[0].verb:
        raise ConfigError(f"{asked.config}: its images are not made by `cdpo {verb}`: `{steps_of(config)[0].verb}` is")
    elif verb == "import" and asked.check:
        judged, faults = find_preference_faults(config, address=asked.address, verbose=asked.verbose)
        _tell(*faults, *judged.lines(with_faults=False))
        if faults:
            raise PreferenceError("1 fault" if len(faults) == 1 else f"{len(faults):,} faults")
        _tell("no faults")
    else:
        run_steps(
            config,
            [step for step in steps_of(config) if step.verb == verb],
            address=asked.address,
            verbose=asked.verbose,
            command=goes_on,
            allow_config_change=verb == "train" and asked.allow_config_change,
        )
        if verb == "pairs" and asked.explain:
            _tell(explain_stages(config))
    return 0


def _cost(config: Config, prompts: PromptSplit, gpu: str | None) -> list[str]:
    try:
        load, known = workload_of(config, prompts, GPUS[gpu] if gpu else visible_gpu() or DEFAULT_GPU)
    except ModelError as error:
        return [f"  cost         not estimated: {error}"]
    return cost_lines(estimate(load), known.source)


def _examine(asked: argparse.Namespace) -> int:
    from cdpo_ray.doctor import WRONG, examine  # brings torch, which the other verbs do without until they need it

    wrong = False
    for finding in examine(load_config(asked.config, asked.overrides) if asked.config else None, address=asked.address):
        _tell(finding)
        wrong |= finding.grade == WRONG
    return EXIT_UNSOUND if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
