"""`cdpo tune`: a search over schedules."""

import argparse

from cdpo_ray.cli.arguments import add_address, add_config, config_of, resume_command
from cdpo_ray.cli.terminal import print_lines

HELP = "search for a schedule on Ray Tune: trials share samples and scores, and the best is confirmed"
EXAMPLE = "cdpo tune tune"
DESCRIPTION = """\
Search over the keys that the config's `search.space` names (any of `curriculum` and
`training`) on Ray Tune.

Samples and scores are made once and shared by all trials. Each trial is a full staged
training, judged at the end of each stage on validation prompts, which are neither
trained on nor held out. The first trial is the paper's schedule; poor trials are
stopped after an early stage. The best schedule and the paper's are then trained again
with new seeds and measured on the held-out prompts: one half of them chooses the
schedule to keep, and the other half judges it. A verdict needs at least 3 seeds and 20
held-out prompts.

Writes trials/ (one run per trial), confirmation/, tune.html, tune.json, and best.yaml,
a config for `cdpo run`, into the run's folder. The same command resumes the search and
retries failed trials."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_address(parser)


def run(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    from cdpo_ray.search.search import find_schedule  # imports optuna and matplotlib, after a wrong config has failed

    command = resume_command(arguments, "tune")
    print_lines(find_schedule(config, address=arguments.address, verbose=arguments.verbose, command=command))
    return 0
