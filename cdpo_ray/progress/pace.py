"""Rate and remaining time of a step, computed from given times."""

from collections import deque

WINDOW = 100  # marks
MARK_SECONDS = 1.0  # units that arrive within a second of a mark are merged into it: they come in bursts


class Pace:
    """Progress of a step over time.

    The rate is measured over the latest `WINDOW` marks. The earliest mark is the first finished unit, not the start of
    the step: time spent loading a model is excluded.

    Args:
        now: time in seconds, of any monotonic clock.
        total: number of units of the step.
        done: number of units that are done already.
    """

    def __init__(self, now: float, *, total: int, done: int = 0) -> None:
        self.total, self.done = total, done
        self._began = (now, done)
        self._marks: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # when, and how much was done by then

    def advance(self, num: int, now: float) -> None:
        self.done += num
        if self._marks and now - self._marks[-1][0] < MARK_SECONDS:
            now = self._marks.pop()[0]
        self._marks.append((now, self.done))

    def rate(self, now: float) -> float | None:
        """Units per second; ``None``: no unit has been finished."""
        if not self._marks:
            return None
        (first, before), (last, _) = self._marks[0] if len(self._marks) > 1 else self._began, self._marks[-1]
        usual_gap = (last - first) / max(1, len(self._marks) - 1)
        seconds = max(last, now - usual_gap) - first  # the rate falls while no units arrive
        return (self.done - before) / seconds if seconds > 0 else None

    def seconds_left(self, now: float) -> float | None:
        """Estimated seconds until the step is finished; ``None``: the rate is unknown or 0."""
        rate = self.rate(now)
        return (self.total - self.done) / rate if rate else None


def duration(seconds: float) -> str:
    """Format seconds: ``41 s``, ``3 min 20 s``, ``2 h 05 min``, ``3 d 4 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def rate_in_words(rate: float, unit: str) -> str:
    """Format units per second: ``3.2 updates/s``, or ``4.5 updates/min`` below one per second."""
    return f"{rate:.3g} {unit}s/s" if rate >= 1 else f"{60 * rate:.3g} {unit}s/min"
