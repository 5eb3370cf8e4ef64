"""`cdpo config`: descriptions of the config's keys."""

import argparse

from cdpo_ray.cli.terminal import print_lines

HELP = "print the descriptions of all config keys, or of one section or key"
EXAMPLE = "cdpo config training.lora"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        metavar="SECTION|KEY",
        nargs="?",
        help="section or key, such as training or training.beta (default: all keys)",
    )


def run(arguments: argparse.Namespace) -> int:
    from cdpo_ray.config.reference import describe

    print_lines(describe(arguments.name))
    return 0
