"""Parser of the command line -> `docs/reference/cli.md`."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator

from cdpo_ray.cli import VERBS, parser

ENVIRONMENT = {"COLUMNS": "66", "NO_COLOR": "1", "PYTHON_COLORS": "0", "FORCE_COLOR": None}
"""Variables that decide the width and the colours of help texts -> their values for the page; `None`: unset."""
PAGE_HEAD = """\
# Command line

<!-- Written by `python -m cdpo_ray.cli.reference > docs/reference/cli.md`; edit the help texts in `cdpo_ray/cli/`. -->

This page shows the output of `cdpo --help` and of each `cdpo VERB --help`. `CONFIG` is the path of a YAML file, the
name of a config that comes with the package, or the folder of a finished run; `key=value` overrides any of its
[keys](../config.md). Exit codes, unless a verb lists its own: 0 on success, 2 on an error, 130 after Ctrl-C, 143 after
SIGTERM.
"""


def reference_page() -> str:
    """Markdown of all help texts."""
    whole = parser()
    with _environment():
        texts = {"cdpo": _help(whole), **{f"cdpo {verb}": _help(whole, verb) for verb in VERBS}}
    return "\n".join([PAGE_HEAD, *(f"## {name}\n\n```text\n{text.rstrip()}\n```\n" for name, text in texts.items())])


def _help(whole: argparse.ArgumentParser, *verb: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        whole.parse_args([*verb, "--help"])
    return printed.getvalue()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Context manager that sets the variables of `ENVIRONMENT`, and restores them."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    try:
        _set_variables(ENVIRONMENT)
        yield
    finally:
        _set_variables(before)


def _set_variables(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


if __name__ == "__main__":
    sys.stdout.write(reference_page())
