"""`cdpo completion`: completion of the command line in a shell."""

import argparse

import shtab

from cdpo_ray.cli.terminal import print_lines

HELP = "print a script that completes verbs, options and files in a shell"
EXAMPLE = 'eval "$(cdpo completion bash)"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish", "tcsh"), help="name of the shell")


def run(arguments: argparse.Namespace) -> int:
    from cdpo_ray.cli import parser

    print_lines(shtab.complete(parser(), arguments.shell))
    return 0
