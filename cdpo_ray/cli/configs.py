"""`cdpo configs`: list and copy the configs that come with the package."""

import argparse
from pathlib import Path

from cdpo_ray.cli.arguments import new_config
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.config import purpose_of, shipped_config, shipped_configs

HELP = "list the configs that come with the package, or copy some to the working directory"
EXAMPLE = "cdpo configs quickstart"
DESCRIPTION = """\
Without names, list the configs that come with the package. With names, copy these
configs to the working directory, where you can edit them. Wherever a command expects
CONFIG, a name works directly: cdpo run quickstart"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", help="names of configs to copy")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.names:
        known = shipped_configs()
        width = max(map(len, known))
        print_lines(*(f"{name:{width}}  {purpose_of(path)}" for name, path in known.items()))
    for path in [shipped_config(name) for name in arguments.names]:
        print_lines(new_config(Path(path.name), path.read_text("utf-8")))
    return 0
