"""Values of rows in the spellings of people and programs."""

import base64
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from preference_sets import encoded, judged_scenes

from cdpo_ray.errors import printable
from cdpo_ray.preferences.values import image_of, is_false, list_of, number_of, winner_of

IMAGE = next(judged_scenes(1)).right
PNG = encoded(IMAGE)
TEXT = base64.b64encode(PNG).decode()


def image(value: Any, folder: Path = Path("/data")) -> bytes | str:
    return image_of({"jpg_0": value}, "jpg_0", folder)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
def test_base64_of_every_image_format_is_recognised(kind: str) -> None:
    data = encoded(IMAGE, kind)
    assert image(base64.b64encode(data).decode()) == data


@pytest.mark.parametrize(
    "value",
    [
        PNG,
        TEXT,
        TEXT.encode(),
        TEXT.rstrip("="),
        "\n".join(TEXT[start : start + 76] for start in range(0, len(TEXT), 76)),
        f"data:image/png;base64,{TEXT}",
        f"data:image/png;charset=utf-8;base64,{quote(TEXT)}",
        f"data:image/png,{quote(PNG)}",
        {"bytes": PNG, "path": None},
        {"bytes": TEXT, "path": "a.png"},
        {"bytes": None, "path": f"data:;base64,{TEXT}"},
    ],
    ids=lambda value: type(value).__name__,
)
def test_image_bytes_are_accepted_in_every_encoding(value: Any) -> None:
    assert image(value) == PNG


@pytest.mark.parametrize(
    "path", ["a.png", "/9j/a.png", "Qk/very/long/" + "x" * 100 + ".png", "/9j/" + "x" * 100 + "_y"]
)
def test_a_path_is_not_taken_for_base64(path: str) -> None:
    assert image(path) == str(Path("/data") / path)
    assert image({"bytes": None, "path": path}) == str(Path("/data") / path)


def test_backslashes_separate_folders_if_no_file_has_such_a_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").touch()
    (tmp_path / ".\\sub\\b.png").touch()
    assert image(".\\sub\\a.png", tmp_path) == str(tmp_path / "sub" / "a.png")
    assert image(".\\sub\\b.png", tmp_path) == str(tmp_path / ".\\sub\\b.png")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("https://host/a.png", "`jpg_0` is a URL, 'https://host/a.png'; download the image, and give its path"),
        ("s3://bucket/a.png", "`jpg_0` is a URL, "),
        ({"bytes": None, "path": "file:///a.png"}, "`jpg_0` is a URL, "),
        (f"https://host/{'x' * 5000}", r"`jpg_0` is a URL, 'https://host/x+\.\.\.x+'; "),
        ("data:image/png;base64,iVBORw0KGgo", "`jpg_0` is a data URI with invalid base64: "),
        ([1, 2], "`jpg_0` must be an image's bytes or its path, got list"),
        ({"bytes": None, "path": None}, "`jpg_0` must be an image's bytes or its path, got NoneType"),
    ],
)
def test_a_value_that_is_not_an_image_is_refused_with_the_reason(value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        image(value)
    assert len(str(caught.value)) < 250


def test_numbers_may_be_strings_and_are_finite() -> None:
    assert [number_of({"n": value}, "n") for value in (1, True, "False", 0.5, "1", " 2.5 ")] == [1, 1, 0, 0.5, 1, 2.5]
    for value in (None, "left", "nan", float("inf"), [1], "1" * 400, 10**400):
        with pytest.raises(ValueError, match="`n` must be a number, got "):
            number_of({"n": value}, "n")


def test_every_spelling_of_false_is_recognised() -> None:
    assert all(map(is_false, (False, 0, 0.0, "0", "False", " false ")))
    assert not any(map(is_false, (True, 1, None, "", "yes", "true")))


def test_control_characters_are_escaped_and_other_scripts_are_not() -> None:
    assert printable("a\x1b[31m\n猫 é") == "a\\x1b[31m\\n猫 é"


@pytest.mark.parametrize(
    ("value", "winner"),
    [
        ("a", "image_a"),
        (" B ", "image_b"),
        ("model_a", "image_a"),
        ("Image B", "image_b"),
        ("image_b", "image_b"),
        ("tie", ""),
        ("Tie (bothbad)", ""),
        ("both", ""),
        (None, None),
        (" ", None),
        (float("nan"), None),
    ],
)
def test_a_winner_names_a_column_the_part_in_which_it_differs_or_a_tie(value: object, winner: str | None) -> None:
    assert winner_of({"w": value}, "w", ["image_a", "image_b"]) == winner


@pytest.mark.parametrize(
    ("images", "values"),
    [
        (["image_0", "image_1"], [0, 1]),
        (["image1", "image2"], ["1", 2.0]),
        (["jpg_1", "jpg_2"], ["1", "image2"]),
        (["left_image", "right_image"], ["left", "Right"]),
        (["chosen", "rejected"], ["chosen", "rejected"]),
    ],
)
def test_a_winner_is_named_as_the_columns_are(images: list[str], values: list[object]) -> None:
    assert [winner_of({"w": value}, "w", images) for value in values] == images


@pytest.mark.parametrize("value", ["c", "a or b", 0, 2, True, "image", "x" * 10_000])
def test_another_winner_is_refused_with_the_choices(value: object) -> None:
    with pytest.raises(ValueError, match=r"`w` must be one of a, b, or tie, got .{1,90}$"):
        winner_of({"w": value}, "w", ["image_a", "image_b"])


def test_a_list_may_be_written_as_text_and_runs_no_code() -> None:
    for text in ("[1, 0]", "(1, 0)", " [1,0]"):
        assert list(list_of({"n": text}, "n")) == [1, 0]
    for value in ("[print(1)]", "1", "{}", None, 3, "[" * 50_000, "[" + "1," * 100_000 + "1]", {"a": 1}):
        with pytest.raises(ValueError, match="`n` must be a list with one value per image, got "):
            list_of({"n": value}, "n")


def test_a_tilde_is_the_home_folder_if_no_file_has_such_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert image("~/a [1] **.png", tmp_path) == str(tmp_path / "home" / "a [1] **.png")
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "b.png").touch()
    assert image("~/b.png", tmp_path) == str(tmp_path / "~" / "b.png")
