"""`cdpo report`: metrics -> report.html."""

import argparse

from cdpo_ray.cli.arguments import add_config
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.config import load_config
from cdpo_ray.run import write_reports

HELP = "metrics -> report.html: write the report of a finished run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    print_lines(*write_reports(load_config(arguments.config, arguments.overrides), force=True))
    return 0
