"""Processes that hold a folder until they are killed."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def holder(code: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """A process that runs ``code``, which prints "here" once it holds the folder; killed at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "here\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
