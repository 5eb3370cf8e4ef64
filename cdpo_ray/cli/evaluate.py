"""`cdpo evaluate`: adapter -> metrics."""

from cdpo_ray.cli.steps import add_arguments, run

__all__ = ["EXAMPLE", "HELP", "add_arguments", "run"]

HELP = "adapter -> metrics: compare the base and the fine-tuned model on held-out prompts"
EXAMPLE = "cdpo evaluate quickstart"
