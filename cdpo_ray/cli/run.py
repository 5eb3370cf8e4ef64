"""`cdpo run`: the whole pipeline."""

import argparse
import logging
from pathlib import Path

from cdpo_ray.cli.arguments import add_address, add_allow_config_change, add_config, config_of, resume_command
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.run import run_dir_of, run_steps, write_reports
from cdpo_ray.steps import steps_of

log = logging.getLogger(__name__)
HELP = "run the whole pipeline, from prompts to report; finished steps are skipped"
EXAMPLE = "cdpo run quickstart training.beta=100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_address(parser)
    add_allow_config_change(parser)


def run(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    reports: list[Path] = []
    run_steps(
        config,
        steps_of(config),
        address=arguments.address,
        verbose=arguments.verbose,
        command=resume_command(arguments),
        allow_config_change=arguments.allow_config_change,
        on_end=lambda progress: reports.extend(write_reports(config, on_written=progress.log_page)),
    )
    log.info("next: cdpo export %s", run_dir_of(config))
    print_lines(*reports)
    return 0
