"""Reports a reward that ends its process, with its last output, from the process that replaces it."""

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
"""Number of processes that end in the same call before the reward is blamed: other causes hit different calls."""
FATAL = "Fatal Python error"
NUM_LINES_BEFORE_FATAL, NUM_LINES_FROM_FATAL = 3, 4
LINE_LENGTH = 200
TAIL_BYTES = 20_000
FOREIGN_LINE = re.compile(
    r":job_id:|:actor_name:|:task_name:|\*\*\* SIG|PC: @|\s+@ |\[[\d ,:-]+ E "
    r"|Stack \(|Current thread|Thread 0x|Extension modules"
)
"""Start of lines in a worker's log that Ray or faulthandler wrote, not the reward."""


@contextlib.contextmanager
def report_crashes(reward: str, call: Sequence[str]) -> Iterator[None]:
    """Context manager that marks with a file that this process runs a reward; a process that ends leaves the file.

    Ray replaces the process and repeats the call, each time after loading the model. The files are beside the
    processes' logs: they belong to one node and one Ray session, and a lost node leaves none. Outside a Ray worker this
    does nothing: the command ends with its process, and the output was on the terminal.

    Args:
        reward: name of the reward.
        call: identifies this call of the reward, for example by its prompts.

    Raises:
        RewardError: if `MAX_CRASHES` processes have ended in this call.
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
                f" code, or was killed, perhaps out of memory); {_last_output(crashed[-1])}"
            )
        with contextlib.suppress(OSError), running.open("x") as file:  # a full disk is reported elsewhere
            file.write(str(log))
        yield
    finally:
        for path in (running, *crashed):
            path.unlink(missing_ok=True)


def _log_of_this_process() -> Path | None:
    """Log file of a Ray worker's standard error; `None`: not in a Ray worker, or not logged to a file."""
    if "RAY_JOB_ID" not in os.environ:
        return None
    try:
        log = Path(os.readlink("/proc/self/fd/2"))
    except OSError:
        return None
    return log if log.is_file() else None


def _last_output(crashed: Path) -> str:
    """Last lines that the process wrote, joined to one line."""
    try:
        lines = Path(crashed.read_text()).read_bytes()[-TAIL_BYTES:].decode(errors="replace").splitlines()
    except OSError:
        lines = []
    output = [line for line in lines if line.strip() and not FOREIGN_LINE.match(line)]
    fatal = next((index for index, line in enumerate(output) if line.startswith(FATAL)), len(output))
    shown = output[max(0, fatal - NUM_LINES_BEFORE_FATAL) : fatal + NUM_LINES_FROM_FATAL]
    return f"last output: {' | '.join(repr(line.strip()[:LINE_LENGTH])[1:-1] for line in shown) or 'none'}"
