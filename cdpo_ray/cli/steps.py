"""The verbs of single steps: generate, import, score, pairs, train, evaluate."""

import argparse

from cdpo_ray.cli.arguments import add_address, add_config, config_of, resume_command
from cdpo_ray.config import Config
from cdpo_ray.errors import ConfigError
from cdpo_ray.run import run_steps
from cdpo_ray.steps import Step, steps_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_address(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the step of ``arguments.verb``."""
    config, step = load_step(arguments)
    run_step(config, step, arguments)
    return 0


def load_step(arguments: argparse.Namespace) -> tuple[Config, Step]:
    """The configuration, and its step of ``arguments.verb``.

    Raises:
        ConfigError: the configuration is invalid, or has no such step: samples are either generated or imported.
    """
    config = config_of(arguments)
    steps = {step.verb: step for step in steps_of(config)}
    if arguments.verb not in steps:
        raise ConfigError(
            f"{arguments.config}: its samples do not come from `cdpo {arguments.verb}`; use `cdpo {next(iter(steps))}`"
        )
    return config, steps[arguments.verb]


def run_step(config: Config, step: Step, arguments: argparse.Namespace, *, allow_config_change: bool = False) -> None:
    run_steps(
        config,
        [step],
        address=arguments.address,
        verbose=arguments.verbose,
        command=resume_command(arguments),
        allow_config_change=allow_config_change,
    )
