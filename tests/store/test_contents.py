"""Files are identified by their content; a large set is read again only when one of its files has changed."""

import os
from pathlib import Path
from typing import Any

import pytest

from cdpo_ray.errors import StoreError
from cdpo_ray.store import contents, files_sha256


@pytest.fixture(autouse=True)
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache sets of any size, in this process and the next."""
    monkeypatch.setattr(contents, "KNOWN", tmp_path / "home" / "sha256.json")
    monkeypatch.setattr(contents, "KNOWN_BYTES", 0)
    monkeypatch.setattr(contents, "_known_here", {})
    return contents.KNOWN


def model(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    files = {name: folder / name for name in ("config.json", "weights.safetensors")}
    for path in files.values():
        path.write_bytes(b"0123456789")
    return files


def sha256(files: dict[str, Path]) -> str:
    return files_sha256(files, where="`model.path`")


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    read: list[Path] = []
    describe = contents.describe

    def counted(path: Path) -> dict[str, Any]:
        read.append(path)
        return describe(path)

    monkeypatch.setattr(contents, "describe", counted)
    return read


def test_names_and_contents_decide(tmp_path: Path) -> None:
    one, other = model(tmp_path / "a"), model(tmp_path / "b")
    assert sha256(one) == sha256(other)
    other["config.json"].write_bytes(b"0123456780")
    renamed = {"other.json": one["config.json"], "weights.safetensors": one["weights.safetensors"]}
    assert len({sha256(one), sha256(other), sha256(renamed)}) == 3


def test_a_set_is_read_once_also_by_the_next_process_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "SETTLED_SECONDS", -60.0)  # as if the files were a minute old
    files, read = model(tmp_path / "a"), count_reads(monkeypatch)
    first = sha256(files)
    assert sha256(files) == first and len(read) == 2
    monkeypatch.setattr(contents, "_known_here", {})
    assert sha256(files) == first and len(read) == 2
    times = files["config.json"].stat()
    files["config.json"].write_bytes(b"0123456780")
    os.utime(files["config.json"], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert sha256(files) != first, "the same size and modification time do not hide a change"


def test_a_set_that_changed_just_now_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, read = model(tmp_path / "a"), count_reads(monkeypatch)
    assert sha256(files) == sha256(files) and len(read) == 4


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"a"', "\x00"])
def test_a_damaged_cache_of_hashes_only_costs_time(content: str, tmp_path: Path, known: Path) -> None:
    known.parent.mkdir()
    known.write_text(content)
    files = model(tmp_path / "a")
    assert sha256(files) == sha256(files)


def test_a_home_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "KNOWN", Path("/proc/nowhere/sha256.json"))
    monkeypatch.setattr(contents, "SETTLED_SECONDS", -60.0)
    files, read = model(tmp_path / "a"), count_reads(monkeypatch)
    assert sha256(files) == sha256(files) and len(read) == 2


def test_fault_33_a_file_that_is_changed_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = model(tmp_path / "a")
    describe = contents.describe

    def change(path: Path) -> dict[str, Any]:
        found = describe(path)
        path.write_bytes(b"longer than before")
        return found

    monkeypatch.setattr(contents, "describe", change)
    with pytest.raises(StoreError, match=r"`model.path`: changed while it was being read; run the same command again"):
        sha256(files)


def test_unreadable_files_change_the_hash(tmp_path: Path) -> None:
    files = model(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    odd = {"pipe": tmp_path / "pipe", "zero": Path("/dev/zero"), "nul": Path("a\0b"), "long": Path("x" * 300)}
    whole = sha256(files | odd)
    files["config.json"].unlink()
    assert sha256(files | odd) != whole
