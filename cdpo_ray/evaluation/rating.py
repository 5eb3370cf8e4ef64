"""A voter's session: the page that shows pairs of images blind, and saves each vote."""

import json
import secrets
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from cdpo_ray.dataflow.images import refuse_other_images
from cdpo_ray.errors import StoreError, printable
from cdpo_ray.evaluation.votes import Pair, RatedImages, Vote, digest_of, pair_of, read_votes, write_votes
from cdpo_ray.pages.page import render
from cdpo_ray.pages.server import JSON, Answer

HERE = Path(__file__).parent
POLICY = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'"
NOTHING = "default-src 'none'"


class _Click(TypedDict):
    """Body of a POST request: what a voter chose, and the pair that the page showed."""

    pair: Annotated[str, Field(max_length=100)]
    choice: Literal["left", "right", "tie", "undo"]


_CLICK: TypeAdapter[_Click] = TypeAdapter(_Click)


@dataclass(frozen=True)
class _Shown:
    """The pair on the page.

    Attributes:
        id: random; a click on a pair that is not shown any more is ignored.
        left, right: names of the images.
        pngs: by random id, the left and the right image.
    """

    id: str
    pair: Pair
    left: str
    right: str
    pngs: dict[str, bytes]


class RatingSession:
    """The page of one voter: shows pairs blind and saves each vote before it shows the next pair.

    Args:
        images: pairs to rate.
        path: file of the voter's votes; pairs that it has are not shown again.
        voter: name.
        run_name: name of the run.

    Raises:
        StoreError: the file of votes, or an image that was rated, is damaged.
    """

    def __init__(self, images: RatedImages, path: Path, *, voter: str, run_name: str) -> None:
        self.images, self.path, self.voter, self.run_name = images, path, voter, run_name
        self._votes = read_votes(path)
        self._current = images.current(self._votes)  # others are of images that were made again, and are kept
        self._shown: _Shown | None = None
        self._lock = threading.Lock()

    @property
    def line(self) -> str:
        """Progress of the voter."""
        return f"{len(self._current):,} of {len(self.images.pairs):,} pairs rated"

    def answer(self, path: str) -> Answer | None:
        """Answer to a GET request; `None`: there is no such page."""
        if path == "/":
            page = render(HERE / "rating.html.jinja", name=printable(self.run_name, 200), kind=self.images.kind)
            return Answer(page.encode(), "text/html", POLICY)
        if path == "/rating.js":
            return Answer((HERE / "rating.js").read_bytes(), "text/javascript", POLICY)
        with self._lock:
            if path == "/pair":
                return self._state()
            png = self._shown.pngs.get(path.removeprefix("/image/")) if self._shown else None
            return Answer(png, "image/png", NOTHING) if png else None

    def accept(self, path: str, body: bytes) -> Answer | None:
        """Save a vote, or undo the last one; the answer is the next pair. `None`: there is no such page."""
        if path != "/vote":
            return None
        try:
            click: _Click = _CLICK.validate_json(body, strict=True)
        except ValidationError:
            return Answer(b"400 Bad Request\n", "text/plain", NOTHING, HTTPStatus.BAD_REQUEST)
        fault = ""
        with self._lock:
            if click["pair"] == (self._shown.id if self._shown else ""):  # else: clicked twice, or in another tab
                try:
                    self._apply(click["choice"])
                except StoreError as error:
                    fault = printable(error, 1000)
            return self._state(fault)

    def _apply(self, choice: Literal["left", "right", "tie", "undo"]) -> None:
        if choice == "undo":
            if self._current:
                self._save([vote for vote in self._votes if vote is not self._current[-1]])
                self._current.pop()
        elif self._shown:
            left, right = map(digest_of, self._shown.pngs.values())
            vote: Vote = {
                "prompt_index": self._shown.pair.prompt_index,
                "left": self._shown.left,
                "right": self._shown.right,
                "left_digest": left,
                "right_digest": right,
                "choice": choice,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            self._save([*self._votes, vote])
            self._current.append(vote)
        self._shown = None

    def _save(self, votes: list[Vote]) -> None:
        if read_votes(self.path) != self._votes:
            raise StoreError(
                f"{self.path}: was changed by another session; end the other one, and start this one again"
            )
        write_votes(self.path, votes)
        self._votes = votes

    def _state(self, fault: str = "") -> Answer:
        try:
            self._shown = self._shown or self._next()
        except StoreError as error:
            fault = printable(error, 1000)
        state: dict[str, Any] = {
            "fault": fault,
            "rated": len(self._current),
            "total": len(self.images.pairs),
            "pair": "",
        }
        if self._shown:
            left, right = self._shown.pngs
            prompt = self.images.prompts[self._shown.pair.prompt_index]
            state |= {"pair": self._shown.id, "prompt": prompt, "left": left, "right": right}
        return Answer(json.dumps(state).encode(), JSON, NOTHING)

    def _next(self) -> _Shown | None:
        """The first pair without a vote."""
        rated = set(map(pair_of, self._current))
        pair = next((pair for pair in self.images.pairs if pair not in rated), None)
        if pair is None:
            return None
        pngs = self.images.pngs([pair.prompt_index])
        left, right = reversed(pair.images) if self.images.swapped(pair, self.voter) else pair.images
        shown = {}
        for name in (left, right):
            png = pngs.get((pair.prompt_index, name), b"")
            refuse_other_images(png, f"{self.images.tables[pair.prompt_index]}: {name} of prompt {pair.prompt_index}")
            shown[secrets.token_urlsafe(12)] = png
        return _Shown(secrets.token_urlsafe(12), pair, left, right, shown)
