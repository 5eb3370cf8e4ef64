"""The command line: `cdpo VERB ...`, one file per verb."""

import argparse
import functools
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from cdpo_ray import __version__
from cdpo_ray.cli.terminal import exit_code, with_standard_streams
from cdpo_ray.config import nearest

GROUPS = {
    "before a run": {
        "init": "cdpo_ray.cli.init",
        "configs": "cdpo_ray.cli.configs",
        "config": "cdpo_ray.cli.config",
        "questions": "cdpo_ray.cli.questions",
        "check": "cdpo_ray.cli.check",
        "doctor": "cdpo_ray.cli.doctor",
        "completion": "cdpo_ray.cli.completion",
    },
    "the pipeline": {
        "run": "cdpo_ray.cli.run",
        "generate": "cdpo_ray.cli.generate",
        "import": "cdpo_ray.cli.import_",
        "score": "cdpo_ray.cli.score",
        "pairs": "cdpo_ray.cli.pairs",
        "train": "cdpo_ray.cli.train",
        "evaluate": "cdpo_ray.cli.evaluate",
        "report": "cdpo_ray.cli.report",
        "tune": "cdpo_ray.cli.tune",
    },
    "runs": {
        "status": "cdpo_ray.cli.status",
        "watch": "cdpo_ray.cli.watch",
        "compare": "cdpo_ray.cli.compare",
        "judge": "cdpo_ray.cli.judge",
        "rate": "cdpo_ray.cli.rate",
        "export": "cdpo_ray.cli.export",
    },
}
"""Title -> verbs and their modules, in the order of `cdpo --help`. A new verb is one file and one line here.

All of these modules are imported at each start: whatever brings torch, Ray or matplotlib is imported in `run`.
"""
VERBS = {verb: module for group in GROUPS.values() for verb, module in group.items()}
DASHED_KEY = re.compile(r"--(\w+\.[\w.]+=.*)")


class Verb(Protocol):
    """Contents of a verb's module; it may also have a ``DESCRIPTION``, which `cdpo VERB --help` prints.

    Attributes:
        HELP: one line for `cdpo --help`.
        EXAMPLE: a command line, for `cdpo VERB --help`.
    """

    HELP: str
    EXAMPLE: str

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
    whole = parser()
    given = sys.argv[1:] if arguments is None else arguments
    _refuse_unknown_verb(whole, next((word for word in given if not word.startswith("-")), None))
    parsed, rest = whole.parse_known_args(given)
    if not rest:
        return parsed
    if dashed := next(filter(None, map(DASHED_KEY.fullmatch, rest)), None):
        whole.error(f"unrecognized arguments: {dashed[0]}; a config value has no dashes: {dashed[1]}")
    # argparse ends a list of positionals at the first option: `RUN --out DIR RUN`, `CONFIG --gpu l4 key=value`.
    overrides, runs = (getattr(parsed, name, None) for name in ("overrides", "runs"))
    positionals = runs if overrides is None else overrides
    if (
        positionals is None
        or any(value.startswith("-") for value in rest)
        or (positionals is overrides and not all("=" in value for value in rest))
    ):
        whole.error(f"unrecognized arguments: {' '.join(rest)}")
    positionals += rest
    return parsed


def _refuse_unknown_verb(parser: argparse.ArgumentParser, verb: str | None) -> None:
    if verb is not None and verb not in VERBS:
        near = nearest(verb, VERBS)
        hint = f"did you mean `{near}`?" if near else f"verbs are {', '.join(VERBS)}"
        parser.error(f"unknown verb `{verb}`; {hint}")


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    whole = argparse.ArgumentParser(
        prog="cdpo",
        description="Align a text-to-image model with Curriculum DPO:\n"
        "prompts -> samples -> scores -> stages -> adapter -> metrics -> report",
        epilog=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"cdpo_ray {__version__}")
    whole.add_argument(
        "-v", "--verbose", action="store_true", help="print the output of Ray and its workers, and tracebacks"
    )
    verbs = whole.add_subparsers(dest="verb", required=True, metavar="VERB", help="see below")
    for name in VERBS:
        verb = _module(name)
        verb.add_arguments(
            verbs.add_parser(
                name,
                description=getattr(verb, "DESCRIPTION", verb.HELP),
                epilog=f"example:\n  {verb.EXAMPLE}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    return whole


def _overview() -> str:
    """All verbs by group, with one line and an example each."""
    lines = []
    for title, group in GROUPS.items():
        lines.append(f"{title}:")
        for name in group:
            verb = _module(name)
            lines += [f"  {name:12}{verb.HELP}", f"{'':14}$ {verb.EXAMPLE}"]
        lines.append("")
    return "\n".join([*lines, "Any config value can be set on the command line, as in the example of `run`."])
