"""Serving a page until Ctrl-C, for the verbs that have one."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.errors import ConfigError

if TYPE_CHECKING:
    from cdpo_ray.pages.server import Answer


def add_port(parser: argparse.ArgumentParser) -> None:
    """Add ``port``."""
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free port)")


def serve(answer: "Callable[[str], Answer | None]", port: int, **options: Any) -> None:
    """Print the address of a page and serve it until Ctrl-C.

    Args:
        answer, port, options: arguments of `PageServer`.

    Raises:
        ConfigError: the port cannot be used.
    """
    from cdpo_ray.pages.server import PageServer

    try:
        server = PageServer(answer, port=port, **options)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"`--port` {port}: cannot be used ({error}); leave it out for a free port") from None
    with server:
        print_lines(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
