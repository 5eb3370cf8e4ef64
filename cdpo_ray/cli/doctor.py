"""`cdpo doctor`: problems of this machine, a cluster and the storage."""

import argparse

from cdpo_ray.cli.arguments import add_address, add_config, config_of
from cdpo_ray.cli.terminal import EXIT_PROBLEM, print_lines

HELP = "find problems of this machine, a Ray cluster and the storage, with a fix for each"
EXAMPLE = "cdpo doctor quickstart.yaml"
DESCRIPTION = """\
Find problems of this machine, a Ray cluster and the storage, with a fix for each. If
CONFIG is given, also check `run.dir`, GPU memory and `resources`.

exit code:
  0  no problem that would stop a run
  1  a problem that would stop a run"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, optional=True)
    add_address(parser)


def run(arguments: argparse.Namespace) -> int:
    from cdpo_ray.doctor import WRONG, examine  # imports torch

    config = config_of(arguments) if arguments.config else None
    wrong = False
    for finding in examine(config, address=arguments.address):
        print_lines(finding)
        wrong |= finding.grade == WRONG
    return EXIT_PROBLEM if wrong else 0
