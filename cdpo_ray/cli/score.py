"""`cdpo score`: samples -> scores."""

from cdpo_ray.cli.steps import add_arguments, run

__all__ = ["EXAMPLE", "HELP", "add_arguments", "run"]

HELP = "samples -> scores: score each image with every reward"
EXAMPLE = 'cdpo score quickstart "rewards=[clip,jpeg_size]"'
