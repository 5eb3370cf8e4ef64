"""Standard streams, signals, exit codes, and errors as one line."""

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from cdpo_ray.errors import CdpoError, printable

EXIT_PROBLEM = 1  # `doctor` found one; the run of `status` is unfinished and no process works on it
EXIT_ERROR = 2
EXIT_SIGNAL = 128  # plus the signal's number, as shells report it
MAX_LINE_CHARS = 4000  # of an error, which may quote somebody else's file
MAX_FOREIGN_CHARS = 500  # of an error of another library
NETWORK_LIBRARIES = ("aiohttp", "botocore", "google", "urllib3")  # not all of their errors are OSErrors
OUT_OF_MEMORY = ("annot allocate memory", "failed to map segment", "can't start new thread")
"""Parts of messages of other errors, raised when a limit leaves no memory for a shared library or a thread."""
PACKAGE_DIR = Path(__file__).parents[1]


class OutputError(Exception):
    """Standard output cannot be written."""


def print_lines(*lines: object) -> None:
    """Print lines and flush standard output.

    Raises:
        OutputError: standard output cannot be written; a class of its own, because storage and cluster raise OSError.
    """
    try:
        print(*lines, sep="\n", end="\n" * bool(lines), flush=True)
    except OSError as error:
        raise OutputError from error


def print_error(line: str) -> None:
    with contextlib.suppress(OSError):  # there is nowhere else to report it
        print(line, file=sys.stderr, flush=True)


def with_standard_streams(command: Callable[[], int]) -> int:
    """Run a command, also if standard streams are closed or full; returns its exit code."""
    _open_standard_streams()
    try:
        try:
            return command()
        except SystemExit:  # argparse has printed
            print_lines()
            raise
    except OutputError as error:
        _discard_output()
        if isinstance(error.__cause__, BrokenPipeError):  # the reader ended, as `head` does: not an error
            return EXIT_SIGNAL + signal.SIGPIPE
        print_error(f"standard output: {error.__cause__}; results are saved, but not printed")
        return EXIT_ERROR


def exit_code(run: Callable[[], int], *, verb: str, verbose: bool) -> int:
    """Run a verb and print its errors; returns the exit code.

    One line, without a traceback, for a `CdpoError`, an interrupt, and failures of storage, network, memory or cluster.
    A bug of this program keeps its traceback; if ``verbose``, so do failures of storage, network, memory or cluster.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("cdpo_ray").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else it asks for a package that speeds up CPUs only
    try:
        return run()
    except CdpoError as error:
        lines = f"{type(error).__name__}: {error}".split("\n")
        print_error("\n".join(printable(line, MAX_LINE_CHARS) for line in lines))
        return EXIT_ERROR
    except KeyboardInterrupt as interrupt:
        print_error("interrupted; run the same command again to resume")
        return EXIT_SIGNAL + (interrupt.args or (signal.SIGINT,))[0]
    except Exception as error:
        if verbose or not _is_environmental(error):
            raise
        print_error(_in_one_line(error, verb))
        return EXIT_ERROR


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _open_standard_streams() -> None:
    """Reopen standard streams that the caller closed (``>&-``); otherwise the next files would take their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))


def _discard_output() -> None:
    """Discard the buffer of standard output, which would fail again when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_environmental(error: BaseException) -> bool:
    """Whether an error comes from storage, network, memory or the cluster, and not from a bug of this program."""
    if isinstance(error, ImportError | RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY):
        return True
    if isinstance(error, OSError | MemoryError):
        return True
    library = type(error).__module__.partition(".")[0]
    if library != "ray":
        return library in NETWORK_LIBRARIES
    cause = getattr(error, "cause", None)  # the error that a task raised; Ray's own errors have none
    return cause is None or (cause is not error and _is_environmental(cause))


def _in_one_line(error: BaseException, verb: str) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if PACKAGE_DIR in Path(frame.filename).parents] or frames
    message = printable(next(iter(str(error).strip().splitlines()), ""), MAX_FOREIGN_CHARS)
    return (
        f"{type(error).__name__}: cdpo {verb}: {message or 'no message'} (in `{ours[-1].name}`,"
        f" {Path(ours[-1].filename).name}:{ours[-1].lineno}); check disk, memory, network and cluster, then run the"
        f" same command again to resume; `cdpo -v {verb} ...` prints the whole traceback"
    )
