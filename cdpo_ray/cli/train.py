"""`cdpo train`: stages -> adapter."""

import argparse

from cdpo_ray.cli import steps
from cdpo_ray.cli.arguments import add_allow_config_change

HELP = "stages -> adapter: train a LoRA, or all weights, by DPO, stage by stage"
EXAMPLE = "cdpo train quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps.add_arguments(parser)
    add_allow_config_change(parser)


def run(arguments: argparse.Namespace) -> int:
    config, step = steps.load_step(arguments)
    steps.run_step(config, step, arguments, allow_config_change=arguments.allow_config_change)
    return 0
