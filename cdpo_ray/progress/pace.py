"""How fast a step goes and how long it will take; plain numbers, no clock of its own."""

from collections import deque

WINDOW = 100  # marks
MARK_SECONDS = 1.0  # what comes within a second of another is one mark: units arrive in bursts


class Pace:
    """What a step has done by when.

    The rate is taken over the latest `WINDOW` marks. The first of them is the first unit done, not the beginning:
    loading a model is not the pace of the step.

    Args:
        now: of any clock, in seconds.
        total, done: in units of the step.
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
        """Units a second; none before the first."""
        if not self._marks:
            return None
        (first, before), (last, _) = self._marks[0] if len(self._marks) > 1 else self._began, self._marks[-1]
        usual_gap = (last - first) / max(1, len(self._marks) - 1)
        seconds = max(last, now - usual_gap) - first  # a step that stands still slows down
        return (self.done - before) / seconds if seconds > 0 else None

    def seconds_left(self, now: float) -> float | None:
        rate = self.rate(now)
        return (self.total - self.done) / rate if rate else None


def duration(seconds: float) -> str:
    """Seconds in words: ``41 s``, ``3 min 20 s``, ``2 h 05 min``, ``3 d 4 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def rate_in_words(rate: float, unit: str) -> str:
    """``3.2 updates/s``, or ``4.5 updates/min`` of what takes longer than a second."""
    return f"{rate:.3g} {unit}s/s" if rate >= 1 else f"{60 * rate:.3g} {unit}s/min"
