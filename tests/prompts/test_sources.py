"""Prompt sources, and the separation of training, validation and held-out prompts."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdpo_ray.config import PromptSource
from cdpo_ray.config.benchmarks import BENCHMARKS
from cdpo_ray.errors import PromptError
from cdpo_ray.prompts.animals import animal_photo_prompts, animal_prompts
from cdpo_ray.prompts.files import read_file
from cdpo_ray.prompts.rows import Columns, Row
from cdpo_ray.prompts.sources import (
    BUILT_IN,
    PromptList,
    PromptSplit,
    content_sha256,
    is_held_out,
    read_prompts,
    split_prompts,
    wording,
)
from cdpo_ray.records import prompt_id
from cdpo_ray.testbed.scenes import is_heldout, parse_caption, scene_prompts

SIDES = ("train", "heldout", "validation")

STRANGE = [
    "a 🦊 in the ❄️, 8k",
    "nul\x00byte",
    "قطة تركب دراجة",
    "‮right to left",
    "../../etc/passwd",
    "<script>alert(1)</script>; rm -rf $HOME",
    "x" * 10_000,
    "a, \"quoted\", 'line'",
    "this \u2028is no line break\u2029nor is this",
    "tab\tinside",
]


def split(
    train: Path | str,
    heldout: Path | str | None = None,
    validation: Path | str | None = None,
    *,
    seed: int = 0,
    **sides: Any,
) -> PromptSplit:
    """Split prompts; keyword arguments such as ``train_count`` and ``heldout_fraction`` are keys of a side."""
    given = {
        "train": {"source": str(train)},
        "heldout": {"source": str(heldout) if heldout else None},
        "validation": {"source": str(validation) if validation else None},
    }
    for key, value in sides.items():
        side, _, name = key.partition("_")
        given[side][name] = value
    sources = {side: PromptSource(**keys) for side, keys in given.items()}
    validated = sources["validation"] if sources["validation"] != PromptSource() else None
    return split_prompts(sources["train"], sources["heldout"], validated, seed=seed)


def read(path: Path | str, side: str = "train", **keys: Any) -> PromptList:
    return read_prompts(PromptSource(source=str(path), **keys), side, 0)


def write(path: Path, lines: list[str]) -> Path:
    """Save prompts in the format of the file's extension."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerows([["id", "prompt"], *enumerate(lines)])
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"prompt": lines, "id": range(len(lines))}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, "prompt": line}) + "\n" for line in lines))
    else:
        path.write_bytes("\n".join(lines).encode())
    return path


FORMATS = pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "p.parquet"])


@FORMATS
def test_fault_20_unusual_prompts_are_kept_unchanged(tmp_path: Path, name: str) -> None:
    lines = [*STRANGE, "", "   ", STRANGE[0]]
    found = PromptList(STRANGE, num_read=len(lines), num_doubled=1, num_empty=2)
    assert read(write(tmp_path / name, lines)) == found
    assert [path.name for path in tmp_path.iterdir()] == [name]


@FORMATS
def test_the_split_depends_neither_on_the_format_nor_on_added_lines(tmp_path: Path, name: str) -> None:
    lines = [*STRANGE, *(f"prompt {number}" for number in range(190))]
    whole = split(write(tmp_path / name, lines), heldout_fraction=0.3)
    assert whole.heldout == [line for line in lines if is_held_out(line, 0.3)]
    assert whole.train == [line for line in lines if not is_held_out(line, 0.3)]
    small = split(write(tmp_path / name, lines[:100]), heldout_fraction=0.3)
    assert small.train == [line for line in whole.train if line in lines[:100]]
    assert small.heldout == [line for line in whole.heldout if line in lines[:100]]


@pytest.mark.parametrize(
    "other", ["A Cat, sleeping", "a cat  sleeping.", "“a cat” sleeping", "\uff41 cat sleeping", "(a cat:sleeping)"]
)
def test_prompts_of_the_same_words_fall_on_the_same_side(other: str) -> None:
    assert wording(other) == wording("a cat sleeping") == "a cat sleeping"
    assert {is_held_out(other, share / 64) == is_held_out("a cat sleeping", share / 64) for share in range(65)} == {
        True
    }


def test_prompts_of_other_words_or_no_words_have_different_wordings() -> None:
    prompts = ["a cat", "a cats", "cat a", "🦊", "🦊🦊", "...", "١ قطة"]
    assert len({wording(prompt) for prompt in prompts}) == len(prompts)


def test_training_on_a_held_out_prompt_in_other_letters_is_refused(tmp_path: Path) -> None:
    train, heldout = (
        write(tmp_path / "t.txt", ["A helicopter, made of pizza"]),
        write(tmp_path / "h.txt", ["a helicopter made of pizza", "x"]),
    )
    with pytest.raises(PromptError, match=r"1 of its 2 prompts are also trained on \('a helicopter made of pizza'\)"):
        split(train, heldout)


def test_built_in_sets_are_selected_by_name() -> None:
    assert BUILT_IN == ("animals", "animal_photos", "scenes")
    assert read("animals").prompts == animal_prompts()
    assert read("animal_photos").prompts == animal_photo_prompts()


def test_a_prompt_id_is_sixteen_hex_digits_for_any_prompt() -> None:
    names = [prompt_id(prompt) for prompt in [*STRANGE, "lone surrogate \ud800"]]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) == 16 and set(name) <= set("0123456789abcdef") and os.path.basename(name) == name


def test_doubled_and_empty_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = ["one", "", "two", "  one  ", "   ", "\t", "one", "Two"]
    found = PromptList(["one", "two", "Two"], num_read=8, num_doubled=2, num_empty=3)
    assert read(write(tmp_path / "p.txt", lines)) == found


def test_a_final_line_end_is_not_an_empty_line(tmp_path: Path) -> None:
    for ending in (b"one\ntwo", b"one\ntwo\n", b"one\r\ntwo\r\n", b"one\rtwo\r"):
        (tmp_path / "prompts").write_bytes(ending)
        assert read(tmp_path / "prompts") == PromptList(["one", "two"], 2), ending


def test_a_byte_order_mark_is_not_part_of_the_first_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert read(tmp_path / "p.txt").prompts == ["one", "two"]


def test_bytes_that_are_not_utf8_are_refused_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("one\ntwo\ncafé\nfour\n".encode("latin-1"))
    with pytest.raises(PromptError, match=r"p\.txt:3: is not UTF-8 \(byte 0xe9\); save the file as UTF-8"):
        read(tmp_path / "p.txt")


@pytest.mark.parametrize("content", [b"", b"\n", b"  \n\t\n", b"\xef\xbb\xbf"])
def test_fault_19_a_file_without_prompts_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(
        PromptError, match=r"`prompts\.train\.source` .*p\.txt: has no prompts; write one prompt per line"
    ):
        read(tmp_path / "p.txt")


def test_a_missing_file_or_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    message = (
        r"`prompts\.heldout\.source` .*nowhere\.txt: No such file .*; give a file of prompts, one of animals,"
        r" animal_photos, scenes, drawbench, .*, pickapic_test, or a hub data set with its `file` and `revision`"
    )
    with pytest.raises(PromptError, match=message):
        read(tmp_path / "nowhere.txt", "heldout")
    with pytest.raises(PromptError, match="is a folder; name one of its files: it holds none"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["pipe", "pipe.jsonl", "pipe.parquet"])
def test_fault_56_a_pipe_or_a_device_is_refused_without_waiting(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    for path in (tmp_path / name, Path("/dev/zero")):
        with pytest.raises(
            PromptError, match=rf"train\.source` {path}: is a pipe, a device or a socket, not a regular"
        ):
            read(path)


def test_a_count_keeps_prompts_from_the_front(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", ["a", "a", "b", "c"])
    assert read(path, count=2) == PromptList(["a", "b"], num_read=4, num_doubled=1)


def test_fewer_prompts_than_count_are_refused(tmp_path: Path) -> None:
    train, heldout = write(tmp_path / "t.txt", ["a", "b"]), write(tmp_path / "h.txt", ["c"])
    with pytest.raises(PromptError, match=r"`prompts\.train`: needs 3 prompts, got 2; add prompts, or lower `count`"):
        split(train, heldout, train_count=3)
    with pytest.raises(PromptError, match=r"`prompts\.heldout`: needs 4 prompts, got 1"):
        split(train, heldout, heldout_count=4)


def test_a_fraction_too_small_to_hold_out_a_prompt_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "t.txt", ["a", "b"])
    with pytest.raises(PromptError, match=r"`prompts\.heldout`: needs at least 1 prompts, got 0"):
        split(train, heldout_fraction=1e-9)


def test_more_scenes_than_the_world_has_are_refused() -> None:
    with pytest.raises(
        PromptError, match=r"`prompts\.train\.source` scenes: .* has \d+ prompts, got `count` = 10000000"
    ):
        split("scenes", "scenes", train_count=10_000_000)


def test_training_on_held_out_prompts_is_refused_with_the_prompts(tmp_path: Path) -> None:
    train, heldout = write(tmp_path / "t.txt", ["a", "b", "c"]), write(tmp_path / "h.txt", ["x", " c ", "b"])
    with pytest.raises(
        PromptError, match=r"2 of its 3 prompts are also trained on \('b', 'c'\), so a gain on them would prove nothing"
    ):
        split(train, heldout)


def test_the_sides_of_a_fraction_partition_the_source() -> None:
    found = split("animals", heldout_fraction=0.2)
    everything = animal_prompts()
    assert [prompt for prompt in everything if prompt in set(found.train)] == found.train
    assert sorted([*found.train, *found.heldout]) == sorted(everything)
    assert 10 <= len(found.heldout) <= 45  # 27 expected of 135, standard deviation 4.6


def test_a_prompt_stays_on_its_side_when_the_file_grows_or_is_reordered(tmp_path: Path) -> None:
    lines = [f"prompt {number}" for number in range(200)]
    small = split(write(tmp_path / "small.txt", lines[:100]), heldout_fraction=0.3)
    large = split(write(tmp_path / "large.txt", lines[::-1]), heldout_fraction=0.3)
    assert set(small.train) == set(large.train) & set(lines[:100])
    assert set(small.heldout) == set(large.heldout) & set(lines[:100])


def test_the_held_out_fraction_is_accurate_and_nested() -> None:
    prompts = [f"prompt {number}" for number in range(4000)]
    shares = {
        fraction: {prompt for prompt in prompts if is_held_out(prompt, fraction)} for fraction in (0.1, 0.25, 0.5)
    }
    for fraction, held in shares.items():
        assert abs(len(held) / 4000 - fraction) < 4 * (fraction * (1 - fraction) / 4000) ** 0.5
    assert shares[0.1] < shares[0.25] < shares[0.5]


def test_a_count_also_limits_a_held_out_fraction() -> None:
    whole, cut = split("animals", heldout_fraction=0.2), split("animals", heldout_fraction=0.2, heldout_count=5)
    assert cut.heldout == whole.heldout[:5]
    assert cut.train == whole.train
    assert cut.num_beyond_count == len(whole.heldout) - 5


def test_scenes_are_the_testbeds_and_their_sides_are_disjoint() -> None:
    found = split("scenes", "scenes", train_count=50, heldout_count=20, seed=3)
    assert found.train == scene_prompts("train", 50, 3)
    assert found.heldout == scene_prompts("heldout", 20, 3)


def test_doubled_and_empty_lines_of_both_sides_are_counted(tmp_path: Path) -> None:
    train, heldout = write(tmp_path / "t.txt", ["a", "", "a"]), write(tmp_path / "h.txt", ["b", "", "b", "b", "x"])
    found = split(train, heldout)
    assert found == PromptSplit(["a"], ["b", "x"], num_read=8, num_doubled=3, num_empty=2)


def test_every_prompt_is_trained_on_or_held_out_or_counted(tmp_path: Path) -> None:
    train, heldout = write(tmp_path / "t.txt", ["", *"aabcde"]), write(tmp_path / "h.txt", [*"vwxxyz", " "])
    found = split(train, heldout, train_count=2, heldout_count=3)
    assert (found.train, found.heldout) == (["a", "b"], ["v", "w", "x"])
    assert (found.num_read, found.num_doubled, found.num_empty) == (14, 2, 2)
    assert found.num_beyond_count == len("cde") + len("yz")


def test_prompts_that_come_with_preferences_are_split_like_those_of_a_source(tmp_path: Path) -> None:
    prompts = ["one", "two", "one", *(f"prompt {number}" for number in range(50))]
    expected = split(write(tmp_path / "p.txt", prompts), heldout_fraction=0.3)
    assert split_prompts(prompts, PromptSource(fraction=0.3), seed=0) == expected
    assert expected.num_doubled == 1


def test_local_files_are_identified_by_their_hash_and_pinned_sources_by_name(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"abc")
    nist = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert content_sha256(PromptSource(source=str(tmp_path / "p.txt")), "train") == nist
    for pinned in (
        PromptSource(source="animals"),
        PromptSource(source="some/prompts", file="a.csv", revision=COMMIT),
        PromptSource(fraction=0.5),
    ):
        assert content_sha256(pinned, "train") is None


def test_fault_33_the_sha256_is_of_the_content_that_was_read(tmp_path: Path) -> None:
    train, heldout = write(tmp_path / "t.txt", ["a cat"]), write(tmp_path / "h.txt", ["a dog"])
    found = split_prompts(
        PromptSource(source=str(train)), PromptSource(source=str(heldout)), PromptSource(source="animals"), seed=0
    )
    digests = {"train": hashlib.sha256(train.read_bytes()), "heldout": hashlib.sha256(heldout.read_bytes())}
    write(heldout, ["a fox"])
    assert found.sha256 == {side: digest.hexdigest() for side, digest in digests.items()}


def test_fault_33_a_file_that_is_changed_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.txt", ["a cat"])

    def read_and_change(path: Path, columns: Columns) -> list[Row]:
        rows = read_file(path, columns)
        write(path, ["a dog"])
        return rows

    monkeypatch.setattr("cdpo_ray.prompts.sources.read_file", read_and_change)
    with pytest.raises(PromptError, match=r"`prompts.train.source` .*t\.txt: changed while it was being read"):
        read_prompts(PromptSource(source=str(path)), "train", 0)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("staged", [True, False])
def test_a_hub_file_is_read_if_staged_and_otherwise_the_error_says_how_to_download_it(
    tmp_path: Path, staged: bool
) -> None:
    """In a separate process: huggingface_hub reads its folder and whether it is offline on import."""
    if staged:
        folder = tmp_path / "hub" / "datasets--some--prompts" / "snapshots" / COMMIT / "data"
        folder.mkdir(parents=True)
        write(folder / "train.parquet", ["a cat", "a dog"])
    code = (
        "import sys; from cdpo_ray.config import PromptSource; from cdpo_ray.prompts.sources import read_prompts;"
        f"source = PromptSource(source='some/prompts', file='data/train.parquet', revision='{COMMIT}');"
        "print(read_prompts(source, 'train', 0).prompts)"
    )
    offline = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline)
    if staged:
        assert (found.stdout, found.stderr) == ("['a cat', 'a dog']\n", "")
    else:
        message = found.stderr.splitlines()[-1]
        where = f"`prompts.train.source` some/prompts (revision {COMMIT})"
        assert message.startswith(f"cdpo_ray.errors.PromptError: {where}: is not on this machine")
        stage = f"`hf download --repo-type dataset some/prompts data/train.parquet --revision {COMMIT}`"
        assert message.endswith(f"; download it with {stage}, after which HF_HUB_OFFLINE=1 may be set")


def test_a_validation_fraction_does_not_change_the_held_out_prompts(tmp_path: Path) -> None:
    lines = [*STRANGE, *(f"prompt {number}" for number in range(190))]
    path = write(tmp_path / "p.txt", lines)
    before, after = split(path, heldout_fraction=0.3), split(path, heldout_fraction=0.3, validation_fraction=0.2)
    assert after.heldout == before.heldout
    assert after.validation == [line for line in lines if is_held_out(line, 0.5) and not is_held_out(line, 0.3)]
    assert after.train == [line for line in lines if not is_held_out(line, 0.5)]
    assert 0.1 < len(after.validation) / len(lines) < 0.3
    assert before.validation == []
    assert (after.num_read, after.num_beyond_count) == (len(lines), 0)
    fewer = split(path, heldout_fraction=0.3, validation_fraction=0.2, validation_count=5)
    assert fewer == PromptSplit(after.train, after.heldout, len(lines), validation=after.validation[:5])
    assert fewer.num_beyond_count == len(after.validation) - 5


def test_a_validation_fraction_works_with_a_held_out_source(tmp_path: Path) -> None:
    lines = [f"prompt {number}" for number in range(200)]
    path, other = write(tmp_path / "p.txt", lines), write(tmp_path / "h.txt", ["x", "y", "x"])
    found = split(path, other, validation_fraction=0.2, train_count=150)
    kept = lines[:150]
    assert found.validation == [line for line in kept if is_held_out(line, 0.2)]
    assert found.train == [line for line in kept if not is_held_out(line, 0.2)], "less than `count`: the rest validates"
    assert found.heldout == ["x", "y"]
    assert found == PromptSplit(found.train, ["x", "y"], 203, num_doubled=1, validation=found.validation)


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (
            ["x", "A cat, sleeping"],
            r"`prompts.validation`: 1 of its 2 prompts are also trained on \('A cat, sleeping'\)",
        ),
        (["x", "a  Dog"], r"`prompts.validation`: 1 of its 2 prompts are also held out \('a  Dog'\), so the schedule"),
        (["x"], r"`prompts.validation`: needs 3 prompts, got 1"),
    ],
)
def test_validation_prompts_must_be_disjoint_from_the_other_sides_and_sufficient(
    tmp_path: Path, validation: list[str], message: str
) -> None:
    train, heldout = write(tmp_path / "t.txt", ["a cat sleeping", "b"]), write(tmp_path / "h.txt", ["a dog", "c"])
    with pytest.raises(PromptError, match=message):
        split(
            train, heldout, write(tmp_path / "v.txt", validation), validation_count=3 if len(validation) == 1 else None
        )
    apart = split(train, heldout, write(tmp_path / "v.txt", ["", "x", "y", "x"]))
    assert apart == PromptSplit(["a cat sleeping", "b"], ["a dog", "c"], 8, 1, 1, ["x", "y"])


def test_validation_scenes_are_disjoint_from_those_of_the_other_sides() -> None:
    sides = {"train_count": 128, "heldout_count": 96}
    found = split("scenes", "scenes", "scenes", validation_count=48, seed=3, **sides)
    before = split("scenes", "scenes", seed=3, **sides)
    assert (found.train, found.heldout) == (before.train, before.heldout)
    shown = {side: {frozenset(parse_caption(text).objects) for text in getattr(found, side)} for side in SIDES}
    assert not shown["validation"] & shown["heldout"] and not shown["validation"] & shown["train"]
    assert len(set(found.validation)) == 48 and all(is_heldout(parse_caption(text)) for text in found.validation)
    assert split("scenes", "scenes", "scenes", validation_count=20, seed=3, **sides).validation == found.validation[:20]
    assert split("scenes", "scenes", "scenes", validation_count=48, seed=4, **sides).validation != found.validation
    assert (found.num_read, found.num_beyond_count) == (128 + 96 + 48, 0)


def test_held_out_scenes_that_leave_no_validation_scene_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"`prompts.validation.source` scenes: there are 0 prompts .* hold out fewer"):
        split("scenes", "scenes", "scenes", heldout_count=1000, validation_count=8)
    foreign = write(tmp_path / "h.txt", ["a pink circle in the middle", "a horse"])
    assert len(split("scenes", foreign, "scenes", validation_count=8).validation) == 8


BENCHMARK_FILES = {
    "drawbench": ("p.csv", "Prompts,Category\nA red colored car.,Colors\n"),
    "parti": ("p.tsv", "Prompt\tCategory\tChallenge\tNote\nA red colored car.\tVehicles\tBasic\t\n"),
    "geneval2": ("p.jsonl", '{"prompt": "A red colored car.", "atom_count": 3, "skills": ["object"]}\n'),
    "pickapic_test": ("p.jsonl", '{"caption": "A red colored car.", "image_0_url": "u"}\n'),
}
"""Of each benchmark of one file, the columns of the published file."""
CATEGORY_OF_A_CAR = {"drawbench": "Colors", "parti": "Vehicles", "geneval2": "atom_count 3"}


@pytest.mark.parametrize("name", BENCHMARK_FILES)
def test_a_copy_of_a_benchmarks_file_is_read_with_its_categories(tmp_path: Path, name: str) -> None:
    file, content = BENCHMARK_FILES[name]
    (tmp_path / file).write_text(content)
    source = PromptSource(source=name, path=str(tmp_path / file))
    found = read_prompts(source, "heldout", 0)
    assert found.prompts == ["A red colored car."]
    assert found.categories.get("A red colored car.") == CATEGORY_OF_A_CAR.get(name)
    assert found.sha256 == content_sha256(source, "heldout") == hashlib.sha256(content.encode()).hexdigest()


def test_another_column_of_a_benchmark_may_be_its_categories(tmp_path: Path) -> None:
    file, content = BENCHMARK_FILES["parti"]
    (tmp_path / file).write_text(content)
    source = PromptSource(source="parti", path=str(tmp_path / file), category_column="Challenge")
    found = read_prompts(source, "train", 0)
    assert found.categories == {"A red colored car.": "Basic"}


def test_the_styles_of_hpdv2_are_its_categories_and_the_first_of_two_counts(tmp_path: Path) -> None:
    for style, prompts in {"anime": ["a", "b"], "concept-art": ["c", "a"], "paintings": ["d"], "photo": ["e"]}.items():
        (tmp_path / f"{style}.json").write_text(json.dumps(prompts))
    source = PromptSource(source="hpdv2", path=str(tmp_path))
    found = read_prompts(source, "train", 0)
    styles = {"a": "anime", "b": "anime", "c": "concept-art", "d": "paintings", "e": "photo"}
    assert found == PromptList([*"abcde"], 6, num_doubled=1, categories=styles, num_recategorized=1)
    before = found.sha256
    (tmp_path / "photo.json").write_text('["f"]')
    assert content_sha256(source, "train") not in (before, None)
    (tmp_path / "photo.json").unlink()
    with pytest.raises(PromptError, match=rf"`prompts\.train\.path` {tmp_path}/photo\.json: No such file"):
        read_prompts(source, "train", 0)


@pytest.mark.parametrize("name", [name for name, benchmark in BENCHMARKS.items() if benchmark.revision])
def test_a_benchmark_is_downloaded_at_its_pinned_commit(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refused(hub_id: str, file: str, *, repo_type: str, revision: str) -> str:
        asked.append((hub_id, file, repo_type, revision))
        raise OSError

    monkeypatch.setattr("cdpo_ray.prompts.sources.hf_hub_download", refused)
    benchmark, source = BENCHMARKS[name], PromptSource(source=name)
    assert content_sha256(source, "train") is None and source.revision == benchmark.revision
    with pytest.raises(
        PromptError, match=rf"hf download --repo-type dataset {benchmark.hub_id} .* --revision [0-9a-f]+`"
    ):
        read_prompts(source, "train", 0)
    assert asked == [(benchmark.hub_id, benchmark.files[0], "dataset", benchmark.revision)]


def test_a_name_with_spaces_is_quoted_in_the_download_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("cdpo_ray.prompts.sources.hf_hub_download", lambda *_, **__: Path("/nowhere").read_text())
    with pytest.raises(PromptError, match=r"sayakpaul/drawbench 'DrawBench Prompts - Sheet1\.csv' --revision"):
        read("drawbench")


def test_categories_of_held_out_prompts_are_known_by_prompt(tmp_path: Path) -> None:
    lines = ["prompt,category", *(f"prompt {n},{'even' if n % 2 == 0 else ''}" for n in range(60)), "prompt 0,odd"]
    (tmp_path / "p.csv").write_text("\n".join(lines))
    found = split(tmp_path / "p.csv", heldout_fraction=0.4)
    assert found.categories == {prompt: "even" for prompt in found.heldout if int(prompt.split()[1]) % 2 == 0}
    assert found.categories and found.num_recategorized == 1
    apart = split(write(tmp_path / "t.txt", ["x"]), tmp_path / "p.csv", heldout_count=3)
    assert apart.categories == {"prompt 0": "even", "prompt 2": "even"}
    assert not split(tmp_path / "p.csv", write(tmp_path / "h.txt", ["x"])).categories
