"""How far a step is: told once, to all that watch a run."""

import logging
import sys
from collections.abc import Mapping

from tqdm import tqdm

log = logging.getLogger(__name__)


class Progress:
    """One step at a time: how much of it is done, what was measured, and lines for people."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def begin(self, verb: str, *, total: int, unit: str, done: int = 0) -> None:
        """A step begins, or goes on with `done` of its `total` units done before."""
        self.bar = tqdm(total=total, initial=done, desc=verb, unit=unit, disable=not sys.stderr.isatty())

    def advance(self, num: int = 1) -> None:
        """So many units more are done, and kept: a restart would not do them again."""
        if self.bar is not None:
            self.bar.update(num)

    def record(self, values: Mapping[str, float], *, update: int) -> None:
        """What was measured in one update of training."""

    def tell(self, line: str) -> None:
        """A line in the log."""
        log.info(line)

    def end(self) -> None:
        """The step is over, well or not."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None
