"""`cdpo init`: a new, commented config."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any, get_args

from cdpo_ray.cli.arguments import YAML_SUFFIXES, new_config
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.config import Config, PreferenceFormat, load_config, parse_yaml, shipped_config, shipped_configs, validate
from cdpo_ray.config.benchmarks import BENCHMARKS
from cdpo_ray.config.commented import commented_yaml
from cdpo_ray.cost.estimate import estimate
from cdpo_ray.cost.gpus import GPUS
from cdpo_ray.cost.sentences import memory_faults
from cdpo_ray.errors import ConfigError
from cdpo_ray.models.folder import fitting_families
from cdpo_ray.preflight import EMBEDDED_WORLD_JUDGES
from cdpo_ray.prompts.sources import BUILT_IN
from cdpo_ray.run import read_prompts
from cdpo_ray.steps.cost import workload_of

HELP = "write a commented config for your model, prompts, and reward or preferences"
EXAMPLE = "cdpo init cats.yaml --like sd15 --prompts cats.txt --reward my_rewards:redness"
DESCRIPTION = """\
Write a new config, based on one that comes with the package, with a comment above each
key. Options replace its values; without any option, you are prompted for them if you
are at a terminal. The config is validated before it is written, and an existing file is
not overwritten."""

DEFAULT_FILE, DEFAULT_LIKE = "my_run.yaml", "quickstart"
LOW_MEMORY = "_24gb"
"""Suffix of the variant of a config for GPUs with little memory."""
OWN_FRACTION = 0.2
"""Share of the user's own prompts that is held out."""
SETS = (*BUILT_IN, *BENCHMARKS)
"""Names of prompts that need no file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", help=f"config to write (default: {DEFAULT_FILE})")
    parser.add_argument(
        "--like",
        metavar="NAME",
        help="config to start from, see `cdpo configs` (default: by the family of --model; pickapic for --preferences;"
        f" else {DEFAULT_LIKE})",
    )
    parser.add_argument("--model", metavar="PATH|ID@COMMIT", help="model folder, single file, or hub id")
    parser.add_argument("--prompts", metavar="FILE|SET", help=f"file of prompts, or one of the sets {', '.join(SETS)}")
    parser.add_argument(
        "--heldout",
        metavar="FILE|SET",
        help="held-out prompts, given like --prompts (default: a fifth of --prompts or --preferences)",
    )
    parser.add_argument("--reward", metavar="NAME[,NAME]", help="built-in rewards, or your own as module:function")
    parser.add_argument("--preferences", metavar="PATH", help="preference pairs to train on, instead of prompts")
    parser.add_argument("--format", choices=get_args(PreferenceFormat), help="format of --preferences (default: pairs)")
    parser.add_argument(
        "--gpu", choices=GPUS, help=f"GPU to run on; selects the {LOW_MEMORY} variant if the config needs it"
    )


def run(arguments: argparse.Namespace) -> int:
    others = ("verb", "verbose", "file")
    if sys.stdin.isatty() and not any(value for name, value in vars(arguments).items() if name not in others):
        _ask(arguments)
    if arguments.format and not arguments.preferences:
        raise ConfigError(f"--format {arguments.format}: is the format of --preferences, which is missing; give both")
    path = Path(arguments.file or DEFAULT_FILE)
    if path.suffix not in YAML_SUFFIXES:
        raise ConfigError(f"{path}: must end in {' or '.join(YAML_SUFFIXES)}")
    like = arguments.like or _like_of(arguments)
    values, config = adapted(like, path, arguments)
    if arguments.gpu and (faults := _memory_faults(config, arguments.gpu)):
        variant = f"{like}{LOW_MEMORY}"
        if variant not in shipped_configs():
            raise ConfigError(f"{like}: does not fit --gpu {arguments.gpu}: {'; '.join(faults)}")
        print_lines(f"{like} needs more memory than {arguments.gpu} has; starting from {variant}")
        like = variant
        values, config = adapted(like, path, arguments)
    head = (
        f"From the package's config `{like}`. `cdpo config KEY` describes a key; keys that are not here have defaults."
    )
    print_lines(new_config(path, commented_yaml(values, head)), f"next: {shlex.join(['cdpo', 'check', str(path)])}")
    return 0


def adapted(like: str, path: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], Config]:
    """Values of a config of the package with those of the command line, and the same as a configuration.

    Args:
        like: name of the config.
        path: config to write, which names the run.

    Raises:
        ConfigError: there is no such config, or the values are invalid; lists all faults.
    """
    values = parse_yaml(shipped_config(like).read_text("utf-8"), where=like)
    values["run"]["name"] = path.stem
    if arguments.model:
        place, _, revision = arguments.model.partition("@")
        values["model"] |= {"path": place}
        values["model"].pop("revision", None)
        values["model"] |= {"revision": revision} if revision else {}
    if arguments.preferences:
        given = {"path": arguments.preferences, "format": arguments.format or "pairs"}
        values = {"run": values.pop("run"), "preferences": given, **values}
        values["prompts"] = {"heldout": {"fraction": OWN_FRACTION}}
        values["curriculum"]["measure"] = "score_gap_quantile"
        for key in ("images_per_prompt", "keep_images"):
            values["generation"].pop(key, None)
    if arguments.prompts:
        values["prompts"] = {"train": {"source": arguments.prompts}, "heldout": {"fraction": OWN_FRACTION}}
    if arguments.heldout:
        values["prompts"]["heldout"] = {"source": arguments.heldout}
    if arguments.reward:
        names = arguments.reward.split(",")
        kept = {*names, *values["evaluation"].get("judges", [])}
        rewards = {key: value for key, value in values["rewards"].items() if key in kept}
        combined = {"rank_by": "weighted_sum"} if len(names) > 1 else {}
        values["rewards"] = {"names": names, **combined, **rewards}
    if arguments.preferences or {arguments.prompts, arguments.heldout} - {None, "scenes"}:
        judges = values["evaluation"].get("judges", [])
        values["evaluation"]["judges"] = [judge for judge in judges if judge not in EMBEDDED_WORLD_JUDGES]
    return values, load_config(parse_yaml(commented_yaml(values, ""), where=str(path)), where=str(path))


def _ask(arguments: argparse.Namespace) -> None:
    """Ask for what was not given; an empty answer is the default."""
    print_lines("A new config; press Enter for the value in brackets.")
    arguments.file = arguments.file or _answer("config to write", DEFAULT_FILE)
    names = ", ".join(name for name in shipped_configs() if not name.startswith("tune"))
    arguments.like = _answer(f"start from ({names})", DEFAULT_LIKE)
    arguments.model = _answer("your own model: folder, or hub id@commit", "as in the config")
    arguments.prompts = _answer(f"prompts: a file, or {', '.join(SETS)}", "as in the config")
    arguments.reward = _answer("reward, such as clip or my_module:my_function", "as in the config")
    for name in ("model", "prompts", "reward"):
        if getattr(arguments, name) == "as in the config":
            setattr(arguments, name, None)


def _answer(question: str, default: str) -> str:
    try:
        return input(f"{question} [{default}]: ").strip() or default
    except EOFError:  # Ctrl-D
        print_lines("")  # ends the line of the question
        raise ConfigError(
            "standard input: ended before the last answer, so nothing was written; answer all questions, or give the"
            " values as options, see `cdpo init --help`"
        ) from None


def _like_of(arguments: argparse.Namespace) -> str:
    """Config to start from if none is given: by the family of the model, or the default."""
    if arguments.model and Path(arguments.model).exists():
        families = fitting_families(Path(arguments.model))
        return next(filter(None, map(_config_of_family, families)), DEFAULT_LIKE)
    if arguments.model:
        raise ConfigError(
            f"--model {arguments.model}: is neither a folder nor a file; for a hub id, --like gives the family, as sd15"
        )
    return "pickapic" if arguments.preferences else DEFAULT_LIKE


def _config_of_family(family: str) -> str | None:
    """The first config of the package that trains a published model of a family on generated images."""
    for name, path in shipped_configs().items():
        values = parse_yaml(path.read_text("utf-8"), where=name)
        is_plain = values["model"]["path"] != "embedded" and not {"preferences", "search"} & values.keys()
        if is_plain and validate(values, where=name).model.family == family:
            return name
    return None


def _memory_faults(config: Config, gpu: str) -> list[str]:
    load, _ = workload_of(config, read_prompts(config), GPUS[gpu])
    return memory_faults(estimate(load))
