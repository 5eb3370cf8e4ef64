"""Processes that lock a folder until they are killed."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def holder(code: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """Context manager around a process that runs ``code``, which prints "here" once it holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "here\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
