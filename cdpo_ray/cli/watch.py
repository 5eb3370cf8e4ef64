"""`cdpo watch`: a page that follows a run."""

import argparse

from cdpo_ray.cli.arguments import add_run, run_dir_given
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.errors import ConfigError

HELP = "serve a page that follows a run: steps, training curves, preview images"
EXAMPLE = "cdpo watch runs/quickstart"
DESCRIPTION = """\
Serve a page that follows a run, on this machine only, and print its address: steps and
progress, training curves up to the newest checkpoint, preview images of each stage, errors
and warnings. Reads the run's folder alone, while the run is alive or not. Ctrl-C ends it.

On a remote machine, forward the port: ssh -L 8000:localhost:8000 HOST cdpo watch RUN --port 8000"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")


def run(arguments: argparse.Namespace) -> int:
    from cdpo_ray.evaluation.live import LiveRun
    from cdpo_ray.pages.server import PageServer

    live = LiveRun(run_dir_given(arguments.run))
    try:
        server = PageServer(live.answer, port=arguments.port)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"`--port` {arguments.port}: cannot be used ({error}); leave it out for a free port"
        ) from None
    with server:
        print_lines(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
