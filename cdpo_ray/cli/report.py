"""`cdpo report`: metrics -> report.html."""

import argparse

from cdpo_ray.cli.arguments import add_config, config_of
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.run import write_reports

HELP = "metrics -> report.html: write the report of a finished run"
EXAMPLE = "cdpo report runs/quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    print_lines(*write_reports(config_of(arguments), force=True))
    return 0
