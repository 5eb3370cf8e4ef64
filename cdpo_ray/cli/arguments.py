"""Arguments that several verbs share."""

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

import shtab

from cdpo_ray.config import Config, load_config
from cdpo_ray.errors import ConfigError
from cdpo_ray.run import run_dir_of
from cdpo_ray.store import CONFIG, RunFolder, exists, is_local, path_within, storage_path

YAML_SUFFIXES = (".yaml", ".yml")


def add_config(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add ``config`` and ``overrides``."""
    config: Any = parser.add_argument(
        "config",
        metavar="CONFIG",
        help="path of a YAML file, name of a config that comes with the package (see `cdpo configs`), or folder of a"
        " finished run",
        nargs="?" if optional else None,
    )
    config.complete = shtab.FILE
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        default=[],
        help="config values to override, such as training.beta=100",
    )


def config_of(arguments: argparse.Namespace) -> Config:
    """The configuration of ``config`` and ``overrides``; that of a run is read from its folder, wherever it is now.

    Raises:
        ConfigError: there is none, or it is invalid; lists all faults.
        StoreError: the run's `config.yaml` is damaged, or contradicts its steps.
    """
    path = storage_path(arguments.config)
    if not path.is_dir():
        return load_config(arguments.config, arguments.overrides)
    path = Path(os.path.abspath(path)) if is_local(path) else path  # a name, also for `.`
    rounds = [folder for folder in (path, path_within(path, "round-1")) if exists(folder / CONFIG)]
    if not rounds:
        raise ConfigError(
            f"{path}: is a folder without {CONFIG}, which a finished run has; give the path of a YAML file"
        )
    values = RunFolder(rounds[0]).config()
    values["run"] = values.get("run", {}) | {"name": path.name, "dir": str(path.parent)}
    return load_config(values, arguments.overrides, where=str(rounds[0] / CONFIG))


def new_config(path: Path, text: str) -> Path:
    """Write a config that does not exist yet.

    Raises:
        ConfigError: it exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: exists and is not overwritten; choose another name, or delete it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}; choose another folder") from None
    return path


def run_dir_given(text: str) -> Path:
    """Folder of a run, given as that or by the run's config."""
    path = storage_path(text)
    return run_dir_of(load_config(text)) if path.suffix in YAML_SUFFIXES and path.is_file() else path


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add ``run``, see `run_dir_given`."""
    run: Any = parser.add_argument(
        "run", metavar="RUN", help="folder of a run, such as runs/<name>; its URI in an object store; or its config"
    )
    run.complete = shtab.FILE


def add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="address of a Ray cluster's head (default: RAY_ADDRESS, the cluster of the current Ray job, or a local Ray"
        " started for this command)",
    )


def add_allow_config_change(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-config-change",
        action="store_true",
        help="resume a training that was started with different settings; its manifest records the change",
    )


def resume_command(arguments: argparse.Namespace, verb: str = "run") -> str:
    """The command that resumes the run, which `cdpo status` prints."""
    return shlex.join(["cdpo", verb, arguments.config, *arguments.overrides])
