"""`cdpo judge`: comparison of candidate models."""

import argparse

from cdpo_ray.cli.arguments import add_address, add_config, config_of, resume_command
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.judge import judge_candidates

HELP = "compare any models on the held-out prompts: runs, adapters, checkpoints, folders of images"
EXAMPLE = 'cdpo judge judge "judge.candidates.mine={adapter: my_lora.safetensors}"'
DESCRIPTION = """\
Compare candidates with the base model on the held-out prompts, from the same noise, by
all judges of the evaluation. The config's `judge.candidates` names them:
  - run: a trained run of cdpo
  - adapter: a LoRA of the base model in the format of diffusers, kohya or peft
  - model: a folder in diffusers layout, a hub id, or a single-file checkpoint of the
    same family
  - images: a folder of images that were made elsewhere, with metadata.jsonl

judge.html in the run's folder shows
  - one row per candidate, one column per judge: mean score, and its difference to the
    base model or to `judge.reference`
  - signs of reward hacking
  - for each judge, how often one candidate's image is better than another's
  - how the appearance of the images differs
  - the first images of all candidates side by side
judge.json has the numbers. Intervals are at 95 %, over prompts.

The same command resumes. If you add a candidate or a judge later, only what is missing
is computed: candidates/<name>/ stores the images and scores of each candidate."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_address(parser)


def run(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    command = resume_command(arguments, "judge")
    print_lines(*judge_candidates(config, address=arguments.address, verbose=arguments.verbose, command=command))
    return 0
