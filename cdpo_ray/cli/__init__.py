"""The command line: `cdpo VERB ...`, one file per verb."""

import argparse
import functools
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from cdpo_ray import __version__
from cdpo_ray.cli.terminal import exit_code, with_standard_streams

VERBS = {
    "check": "cdpo_ray.cli.check",
    "config": "cdpo_ray.cli.config",
    "doctor": "cdpo_ray.cli.doctor",
    "run": "cdpo_ray.cli.run",
    "generate": "cdpo_ray.cli.generate",
    "import": "cdpo_ray.cli.import_",
    "score": "cdpo_ray.cli.score",
    "pairs": "cdpo_ray.cli.pairs",
    "train": "cdpo_ray.cli.train",
    "evaluate": "cdpo_ray.cli.evaluate",
    "report": "cdpo_ray.cli.report",
    "tune": "cdpo_ray.cli.tune",
    "export": "cdpo_ray.cli.export",
    "compare": "cdpo_ray.cli.compare",
    "status": "cdpo_ray.cli.status",
    "watch": "cdpo_ray.cli.watch",
}
"""Verb -> its module, in the order of `cdpo --help`. A new verb is one file and one line here.

All of these modules are imported at each start: whatever brings torch, Ray or matplotlib is imported in `run`.
"""


class Verb(Protocol):
    """Contents of a verb's module; it may also have a ``DESCRIPTION``, which `cdpo VERB --help` prints.

    Attributes:
        HELP: one line for `cdpo --help`.
    """

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the verb and return its exit code.

        Args:
            arguments: those of `add_arguments`, ``verb`` and ``verbose``.
        """
        ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: without the program's name; default: those of this process.

    Returns:
        Exit code.
    """
    return with_standard_streams(functools.partial(_main, arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parsed = _parse(arguments)
    run = functools.partial(_module(parsed.verb).run, parsed)
    return exit_code(run, verb=parsed.verb, verbose=parsed.verbose)


def _module(verb: str) -> Verb:
    return cast(Verb, import_module(VERBS[verb]))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if not rest:
        return parsed
    # argparse ends a list of positionals at the first option: `RUN --out DIR RUN`, `CONFIG --gpu l4 key=value`.
    overrides, runs = (getattr(parsed, name, None) for name in ("overrides", "runs"))
    positionals = runs if overrides is None else overrides
    if (
        positionals is None
        or any(value.startswith("-") for value in rest)
        or (positionals is overrides and not all("=" in value for value in rest))
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    positionals += rest
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cdpo",
        description="Align a text-to-image model by Curriculum DPO:"
        " prompts -> samples -> scores -> stages -> adapter -> metrics -> report.",
        epilog="Any config value can be set on the command line: cdpo run configs/quickstart.yaml training.beta=100",
    )
    parser.add_argument("--version", action="version", version=f"cdpo_ray {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the output of Ray and its workers")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in VERBS:
        verb = _module(name)
        verb.add_arguments(
            verbs.add_parser(
                name,
                help=verb.HELP,
                description=getattr(verb, "DESCRIPTION", verb.HELP),
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    return parser
