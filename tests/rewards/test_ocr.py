"""Recognised text against the requested text; edit distance against recursion."""

import functools
import itertools
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards import ocr
from cdpo_ray.rewards.ocr import OcrReward, reading_order, similarity, words_of
from cdpo_ray.rewards.scorer import Scorer


def rendered(*lines: tuple[str, tuple[int, int]], size: int = 320, letters: int = 40) -> Tensor:
    """Image uint8 ``[1, 3, size, size]`` of texts at (x, y)."""
    image = Image.new("RGB", (size, size), "lightyellow")
    for text, place in lines:
        ImageDraw.Draw(image).text(place, text, fill="navy", font=ImageFont.load_default(letters))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]


@functools.cache
def by_recursion(one: str, other: str) -> int:
    if not one or not other:
        return len(one) + len(other)
    return min(
        by_recursion(one[1:], other) + 1,
        by_recursion(one, other[1:]) + 1,
        by_recursion(one[1:], other[1:]) + (one[0] != other[0]),
    )


@pytest.fixture(scope="module")
def reward() -> OcrReward:
    return OcrReward()


@pytest.mark.parametrize(("one", "other", "distance"), [("kitten", "sitting", 3), ("open", "opne", 2), ("a", "b", 1)])
def test_the_similarity_of_a_word_has_the_known_edit_distance(one: str, other: str, distance: int) -> None:
    assert by_recursion(one, other) == distance
    assert similarity(one, [other]) == pytest.approx(1 - distance / max(len(one), len(other)))


def test_the_similarity_is_that_of_the_best_run_of_words_by_brute_force() -> None:
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("abc", k=draw.randint(1, 6)))
        words = ["".join(draw.choices("abcd", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 5))]
        runs = ["".join(words[start:end]) for start, end in itertools.combinations(range(len(words) + 1), 2)]
        expected = max([0.0, *(1 - by_recursion(text, run) / max(len(text), len(run)) for run in runs)])
        assert similarity(text, words) == pytest.approx(expected), (text, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Happy  BIRTHDAY!", ["happy", "birthday!"]),
        ("“Dog’s ﬁsh,” Straße.", ["dog's", "fish", "strasse"]),
        ("１２：３０ — 50%", ["12:30", "-", "50%"]),
        ("cafe\u0301", ["caf\u00e9"]),
        (" . ... ", []),
    ],
)
def test_words_differ_neither_in_case_nor_in_variants_of_a_mark(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_boxes_are_read_by_line_and_then_from_left_to_right() -> None:
    def box(left: float, top: float, height: float) -> list[list[float]]:
        return [[left, top], [left + 50, top], [left + 50, top + height], [left, top + height]]

    boxes = np.array([box(200, 14, 40), box(10, 90, 30), box(10, 0, 40), box(100, 20, 20), box(90, 80, 40)])
    assert reading_order(boxes) == [2, 3, 0, 1, 4]


def test_right_text_scores_above_a_near_miss_above_wrong_text_above_none(reward: OcrReward) -> None:
    images = [rendered((text, (20, 120))) for text in ("Open House", "Opne Huose", "Fresh Fish", "")]
    scores = reward(torch.cat(images), ['a door with a sign "OPEN HOUSE"'] * 4)
    assert scores[0] == 1 and scores[3] == 0
    assert scores[0] > scores[1] > scores[2] > scores[3], scores


def test_other_text_in_the_image_and_line_breaks_change_nothing(reward: OcrReward) -> None:
    image = rendered(("HAPPY", (20, 20)), ("BIRTHDAY", (20, 90)), ("No. 7", (150, 240)))
    assert reward(image, ["a cake with “Happy birthday”"]).tolist() == [1]
    assert reward(image, ["'Happy birthday' over \"NO 7\""])[0] < 1, "only double quotes count, and a mark is missing"


def test_the_score_of_several_texts_is_their_mean(reward: OcrReward) -> None:
    image = rendered(("HELLO", (20, 60)))
    assert reward(image, ['a sign "hello" and a sign "hello"']).tolist() == [1]
    alone = reward(image, ['a sign "zzzz"'])[0]
    assert reward(image, ['a sign "hello" and a sign "zzzz"']).tolist() == [(1 + alone) / 2]


def test_a_prompt_without_quoted_text_has_no_score_and_others_do_not_change(reward: OcrReward) -> None:
    images = torch.cat([rendered(("dog's", (20, 60)))] * 2)
    scores = Scorer({"ocr": {}})(images, ["the dog's bowl", 'a bowl with "dog\'s"'])["ocr"]
    assert np.isnan(scores[0]) and scores[1] == 1


def test_colours_are_read_in_the_order_of_the_image(reward: OcrReward, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        reward, "read", lambda pixels: seen.append(pixels) or type("Found", (), {"boxes": None, "txts": None})
    )
    image = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(1, 3, 4, 5)
    assert reward(image, ['"a"']).tolist() == [0]
    assert np.array_equal(seen[0], image[0].permute(1, 2, 0).numpy()[..., ::-1])


def test_the_weights_are_those_of_the_package_and_nothing_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened = []

    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    import onnxruntime
    import rapidocr.inference_engine.onnxruntime.main as sessions

    def session(
        path: str, sess_options: onnxruntime.SessionOptions, providers: list[str]
    ) -> onnxruntime.InferenceSession:
        opened.append((path, sess_options.intra_op_num_threads))
        return onnxruntime.InferenceSession(path, sess_options=sess_options, providers=providers)

    monkeypatch.setattr(sessions, "InferenceSession", session)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert OcrReward()(rendered(("OPEN", (20, 60))), ['"open"']).tolist() == [1]
    finally:
        torch.set_num_threads(threads)
    folder = Path(sessions.__file__).parents[2] / "models"
    assert opened == [(str(folder / name), 1) for name, _ in ocr.WEIGHTS.values()]


def test_other_weights_in_the_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ocr.WEIGHTS, "Rec", (ocr.WEIGHTS["Rec"][0], "0" * 64))
    with pytest.raises(
        RewardError, match=r"^reward `ocr`: .*PP-OCRv6_rec_small\.onnx: SHA-256 must be 0{64}, got 6f32"
    ):
        OcrReward()
    monkeypatch.setitem(ocr.WEIGHTS, "Rec", ("other.onnx", "0" * 64))
    with pytest.raises(RewardError, match="got no file; the installed rapidocr is damaged or another version"):
        OcrReward()


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        RewardError, match=r'^reward `ocr` needs rapidocr and onnxruntime: pip install "cdpo_ray\[ocr\]"$'
    ):
        OcrReward()
