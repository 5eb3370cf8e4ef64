"""A reward that ends its process: named by the process that replaces it, with its last words."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from cdpo_ray.errors import RewardError
from cdpo_ray.store import is_alive

MAX_CRASHES = 3
"""Processes that may end in one and the same call of a reward: other causes strike in different calls."""
FATAL = "Fatal Python error"
NUM_LINES_BEFORE_FATAL, NUM_LINES_FROM_FATAL = 3, 4
LINE_LENGTH = 200
TAIL_BYTES = 20_000
OF_OTHERS = re.compile(
    r":job_id:|:actor_name:|:task_name:|\*\*\* SIG|PC: @|\s+@ |\[[\d ,:-]+ E "
    r"|Stack \(|Current thread|Thread 0x|Extension modules"
)
"""Beginning of lines in a worker's log that are not the reward's."""


@contextlib.contextmanager
def crashes_named(reward: str, call: Sequence[str]) -> Iterator[None]:
    """Within the block a file says that this process runs a reward; a process that ends there leaves the file.

    Ray starts another process in its place and repeats the call, each time after loading the model. The files lie
    beside the processes' logs, so they are of one node and one Ray session, and a lost node leaves none. Outside a
    process of Ray the block does nothing more: if the process ends, so does the command, and its words were seen.

    Args:
        call: what tells this call of the reward from others, such as its prompts.

    Raises:
        RewardError: `MAX_CRASHES` processes have ended in this call.
    """
    log = _log_of_this_process()
    if log is None:
        yield
        return
    call_id = json.dumps([os.environ["RAY_JOB_ID"], reward, *call])
    stem = f"reward-{hashlib.blake2b(call_id.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}-"
    crashed = [path for path in log.parent.glob(f"{stem}*") if not is_alive(int(path.name.removeprefix(stem)))]
    running = log.parent / f"{stem}{os.getpid()}"
    try:
        if len(crashed) >= MAX_CRASHES:
            raise RewardError(
                f"reward `{reward}`: ended its process {len(crashed)} times (it called os._exit, crashed in native"
                f" code, or was killed, perhaps because memory was full); {_last_words(crashed[-1])}"
            )
        with contextlib.suppress(OSError), running.open("x") as file:  # a full disk is for others to tell
            file.write(str(log))
        yield
    finally:
        for path in (running, *crashed):
            path.unlink(missing_ok=True)


def _log_of_this_process() -> Path | None:
    """The file that standard error goes to in a process of a Ray job."""
    if "RAY_JOB_ID" not in os.environ:
        return None
    try:
        log = Path(os.readlink("/proc/self/fd/2"))
    except OSError:
        return None
    return log if log.is_file() else None


def _last_words(crashed: Path) -> str:
    """The last lines that the process wrote, in one line."""
    try:
        lines = Path(crashed.read_text()).read_bytes()[-TAIL_BYTES:].decode(errors="replace").splitlines()
    except OSError:
        lines = []
    own = [line for line in lines if line.strip() and not OF_OTHERS.match(line)]
    fatal = next((place for place, line in enumerate(own) if line.startswith(FATAL)), len(own))
    shown = own[max(0, fatal - NUM_LINES_BEFORE_FATAL) : fatal + NUM_LINES_FROM_FATAL]
    return f"its last words: {' | '.join(repr(line.strip()[:LINE_LENGTH])[1:-1] for line in shown) or 'none'}"
