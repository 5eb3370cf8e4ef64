"""`cdpo status`: the state of a run, from its folder."""

import argparse

from cdpo_ray.cli.arguments import run_dir_given
from cdpo_ray.cli.terminal import EXIT_PROBLEM, print_lines
from cdpo_ray.progress.status import run_status

HELP = "print the state of a run: finished steps, progress, time left, errors"
EXAMPLE = "cdpo status runs/quickstart"
DESCRIPTION = """\
Print the state of a run: finished steps, progress and time left of the current one,
errors, and the command that resumes it. Reads the run's folder alone, so it works on
any machine that sees the folder, while the run is alive or not.

exit code:
  0  finished, or a process works on it
  1  unfinished, and no process works on it
  2  no run in this folder"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="folder of a run, as runs/<name>, its URI in an object store, or its config"
    )


def run(arguments: argparse.Namespace) -> int:
    status = run_status(run_dir_given(arguments.run))
    print_lines(status.text)
    return EXIT_PROBLEM if status.is_interrupted else 0
