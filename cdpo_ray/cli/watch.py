"""`cdpo watch`: a page that follows a run."""

import argparse

from cdpo_ray.cli.arguments import add_run, run_dir_given
from cdpo_ray.cli.serving import add_port, serve

HELP = "serve a page that follows a run: steps, training curves, preview images"
EXAMPLE = "cdpo watch runs/quickstart"
DESCRIPTION = """\
Serve a page that follows a run, on this machine only, and print its address. The page
shows steps and progress, training curves up to the newest checkpoint, preview images of
each stage, errors and warnings. It reads only the run's folder, during the run and
afterwards. Ctrl-C stops it.

On a remote machine, forward the port: ssh -L 8000:localhost:8000 HOST cdpo watch RUN --port 8000"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_port(parser)


def run(arguments: argparse.Namespace) -> int:
    from cdpo_ray.evaluation.live import LiveRun

    serve(LiveRun(run_dir_given(arguments.run)).answer, arguments.port)
    return 0
