"""`cdpo generate`: prompts -> samples."""

from cdpo_ray.cli.steps import add_arguments, run

__all__ = ["EXAMPLE", "HELP", "add_arguments", "run"]

HELP = "prompts -> samples: generate images of each training prompt with the base model"
EXAMPLE = "cdpo generate quickstart"
