"""Answers of endpoints that were paid for, kept on this machine for all runs."""

import contextlib
import json
import os
import threading
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from cdpo_ray.rewards.answers import Answer

KEPT_DIR = Path(HF_HOME) / "cdpo_ray" / "answers"
"""Folder of the kept answers."""
MAX_BYTES = 2**26
"""Size from which a file is renamed when it is next opened; the file that was renamed before is deleted."""
DIGEST = slice(2, 66)
"""Place of the digest in a line."""


class KeptAnswers:
    """Answers by a digest of the request; all processes that use the folder append to one file.

    A line is one write in append mode, so that concurrent writers on a disk do not mix. On a network disk they may:
    lines that are not whole are ignored, which only costs another request. A folder that cannot be written keeps
    nothing.
    """

    def __init__(self) -> None:
        self._path = KEPT_DIR / "answers.jsonl"
        self._lock = threading.Lock()
        self._lines: dict[bytes, bytes] = {}  # parsed by `get`: a file may have 600,000
        older = self._path.with_name("older.jsonl")
        with contextlib.suppress(OSError):
            KEPT_DIR.mkdir(parents=True, exist_ok=True)
            if self._path.stat().st_size > MAX_BYTES:
                self._path.replace(older)
        for path in (older, self._path):
            with contextlib.suppress(OSError), path.open("rb") as file:
                self._lines |= {line[DIGEST]: line for line in file}

    def get(self, digest: str) -> Answer | None:
        """Answer by its SHA-256 as hex digits; `None`: it is not known."""
        line = self._lines.get(digest.encode())
        if line is None:
            return None
        try:
            _, text, probabilities = json.loads(line)
            return Answer(str(text), "", tuple(map(float, probabilities)))
        except (ValueError, TypeError, RecursionError):
            return None

    def add(self, digest: str, answer: Answer) -> None:
        line = json.dumps([digest, answer.text, answer.probabilities]).encode() + b"\n"
        with self._lock:
            self._lines[line[DIGEST]] = line
            with contextlib.suppress(OSError):
                file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                try:
                    os.write(file, line)
                finally:
                    os.close(file)
