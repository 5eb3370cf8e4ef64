"""Arguments that several verbs share."""

import argparse
import shlex


def add_config(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add ``config`` and ``overrides``."""
    parser.add_argument(
        "config", metavar="CONFIG", help="path of a YAML file, see configs/", nargs="?" if optional else None
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values, such as training.beta=100")


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
        help="resume a training that was started with other settings; its manifest records the change",
    )


def resume_command(arguments: argparse.Namespace, verb: str = "run") -> str:
    """The command that resumes the run, which `cdpo status` prints."""
    return shlex.join(["cdpo", verb, arguments.config, *arguments.overrides])
