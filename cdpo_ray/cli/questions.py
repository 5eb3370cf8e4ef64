"""`cdpo questions`: prompts -> file of questions about their images, for the reward `vqa`."""

import argparse
from pathlib import Path

from cdpo_ray.cli.arguments import add_config, config_of
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.errors import ConfigError
from cdpo_ray.prompts.questions import read_questions
from cdpo_ray.run import read_prompts, scan_preferences

HELP = "let a language model write the questions of the reward vqa; prompts that have some are skipped"
EXAMPLE = "cdpo questions my.yaml rewards.vqa.questions=questions.jsonl"
DESCRIPTION = """\
Ask the model behind rewards.vqa.endpoint to write questions about the images of each
prompt, with their right answers, and append them to rewards.vqa.questions. Read the
file before you use it: a run does not check its questions.

exit code:
  0  all prompts have questions
  1  the model wrote no valid questions for some prompts"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    options = config.rewards.vqa
    if not options.questions or not options.endpoint:
        missing = "questions" if not options.questions else "endpoint"
        raise ConfigError(f"`rewards.vqa.{missing}` is missing; give the file to write and the server that writes it")
    path = Path(options.questions)
    known = read_questions(path) if path.exists() else {}
    split = read_prompts(config, scan_preferences(config) if config.preferences else None)
    prompts = [prompt for prompt in [*split.train, *split.validation, *split.heldout] if prompt not in known]

    from cdpo_ray.rewards.question_writer import write_questions

    num_written, cost, faults = write_questions(prompts, path, config.rewards.options("vqa")["endpoint"])
    print_lines(
        f"{path}: wrote the questions of {num_written:,} prompts, {len(known):,} prompts already had some; {cost}",
        *faults,
    )
    return 1 if faults else 0
