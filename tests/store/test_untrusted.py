"""A run's folder may be somebody else's: its names, contents and links are checked."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cdpo_ray.errors import StoreError, printable
from cdpo_ray.store import (
    MANIFEST,
    RunFolder,
    copy,
    files_within,
    fingerprint_of,
    local_copy,
    path_within,
    read_table,
    table_schema,
    write_table,
    write_text,
)
from cdpo_ray.store.lock import LOCK
from cdpo_ray.store.untrusted import refuse_links_out

STEP = "1-samples"


def finished(run_dir: Path) -> RunFolder:
    run = RunFolder(run_dir)
    run.path.mkdir()
    with run.writing(STEP, {"run.seed": 0}, {}, seed=7, resumable=False) as (folder, _):
        (folder / "shard.bin").write_bytes(b"0123456789")
    return run


def alter(run: RunFolder, **values: Any) -> None:
    path = run.path / STEP / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/etc/passwd", "../shard.bin", "a/../../b", "a//b", "a/", "./a", "a\\b", "a\x00b", "a\nb",
     "\x1b[31m", "\u202eb", "a" * 5000],
)  # fmt: skip
def test_fault_30_a_name_that_leads_out_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="leads out of the folder, or is not a relative path") as caught:
        path_within(tmp_path, name)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "name", ["shard.bin", "second/clip.parquet", "my module:fn.parquet", "..a", "a..b", "日本.bin"]
)
def test_fault_30_a_name_inside_its_folder_is_accepted(name: str, tmp_path: Path) -> None:
    assert path_within(tmp_path, name) == tmp_path / name


def test_fault_30_a_link_may_lead_to_the_folder_and_inside_it_but_not_out_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "there").symlink_to("inner")
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    (tmp_path / "door").symlink_to(folder)
    assert path_within(tmp_path / "door", "there/a") == tmp_path / "door" / "there" / "a"
    path_within(folder, "loop")
    for name in ("out", "out/a", "there/../out"):
        with pytest.raises(StoreError, match=r"leads out of"):
            path_within(folder, name)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "settings.json", "manifest.json"])
def test_fault_30_a_manifest_that_names_other_files_is_refused(name: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    (tmp_path / "outside").write_text("mine")
    files = {name: {"bytes": 4, "sha256": "0" * 64}}
    alter(run, files=files, fingerprint=fingerprint_of(files))
    with pytest.raises(StoreError, match=r"leads out of the folder|must not name"):
        run.refuse_damage(STEP)
    assert (tmp_path / "outside").read_text() == "mine"


@pytest.mark.parametrize(
    "value",
    [[], 3, None, "text", {}, {"files": []}, {"files": {"a": 3}}, {"files": {"a": {"bytes": "1", "sha256": "0"}}},
     {"fingerprint": "../../x"}, {"fingerprint": "0" * 64}, {"settings": []}, {"inputs": {"a": 1}},
     {"counts": {"a": "1"}},
     {"counts": {"a": 1.5}}, {"warnings": [1]}, {"details": {"predicted": 3}}, {"seconds": float("nan")},
     {"seconds": 1e300}, {"created": "yesterday"}, {"created": "2026-01-01"}, {"versions": {"torch": 2}}],
)  # fmt: skip
def test_fault_52_an_invalid_manifest_is_named(value: Any, tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    if isinstance(value, dict) and value:
        alter(run, **value)
    else:
        (run.path / STEP / MANIFEST).write_text(json.dumps(value))
    with pytest.raises(
        StoreError, match=r"1-samples/manifest\.json: is damaged .*; delete .*1-samples to regenerate it"
    ):
        run.is_complete(STEP, {}, {})


def test_fault_52_a_forged_fingerprint_does_not_select_a_cached_copy(tmp_path: Path, s3: Path) -> None:
    run = finished(tmp_path / "run")
    for name in ("shard.bin", MANIFEST):
        copy(run.path / STEP / name, s3 / "run" / STEP / name)
    assert (local_copy(s3 / "run" / STEP) / "shard.bin").read_bytes() == b"0123456789"
    alter(run, files={})
    copy(run.path / STEP / MANIFEST, s3 / "other" / STEP / MANIFEST)
    with pytest.raises(StoreError, match=r"`fingerprint` is not that of `files`"):
        local_copy(s3 / "other" / STEP)


def test_fault_58_a_link_named_like_a_temporary_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    source = tmp_path / "source"
    source.write_text("new")
    table = pa.table({"a": [1]})
    for name, write in {
        "report.html": lambda path: write_text(path, "new"),
        "a.parquet": lambda path: write_table(table, path),
        "copied": lambda path: copy(source, path),
    }.items():
        for link in (os.symlink, os.link):
            (tmp_path / f"{name}.tmp").unlink(missing_ok=True)
            link(mine, tmp_path / f"{name}.tmp")
            write(tmp_path / name)
            assert mine.read_text() == "mine" and not (tmp_path / name).is_symlink()
    (tmp_path / "status.json").symlink_to(mine)
    write_text(tmp_path / "status.json", "new")
    assert mine.read_text() == "mine" and (tmp_path / "status.json").read_text() == "new"


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_fault_58_a_lock_that_is_a_link_is_refused_and_its_target_unchanged(link: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "run").mkdir()
    link(mine, tmp_path / "run" / LOCK)
    with pytest.raises(StoreError, match=r"\.lock: must be a regular file"), RunFolder(tmp_path / "run").locked():
        pass
    assert mine.read_text() == "mine"


def test_fault_58_unfinished_work_with_a_link_out_is_not_continued(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    (run.path / f"{STEP}.partial").mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "draft.tmp").write_text("mine")
    (run.path / f"{STEP}.partial" / "settings.json").write_text(json.dumps({"settings": {}, "inputs": {}}))
    (run.path / f"{STEP}.partial" / "parts").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(StoreError, match=r"parts: is a symbolic link that leads out of"),
        run.writing(STEP, {}, {}, seed=7, resumable=True),
    ):
        pass
    (run.path / "2-scores.partial").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(StoreError, match=r"2-scores\.partial: is a symbolic link that leads out of"),
        run.writing("2-scores", {}, {}, seed=7, resumable=True),
    ):
        pass
    assert (tmp_path / "precious" / "draft.tmp").read_text() == "mine"


@pytest.mark.parametrize(
    "started", [[], {}, {"settings": [], "inputs": {}}, {"settings": {}, "inputs": {}, "changes": 3}]
)
def test_fault_52_the_settings_of_an_unfinished_step_are_validated(started: Any, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    (run.path / f"{STEP}.partial").mkdir(parents=True)
    (run.path / f"{STEP}.partial" / "settings.json").write_text(json.dumps(started))
    with (
        pytest.raises(StoreError, match=r"settings\.json: is damaged .*; delete .*1-samples\.partial to start over"),
        run.writing(STEP, {}, {}, seed=7, resumable=True),
    ):
        pass


class Kept(pa.ExtensionType):
    """Stands for the extension type in which Ray Data stores pickled objects."""

    def __init__(self) -> None:
        super().__init__(pa.binary(), "cdpo_ray.test.pickled")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> "Kept":
        return cls()


@pytest.mark.parametrize("is_registered", [True, False])
def test_fault_30_a_table_with_objects_in_a_column_is_not_read(is_registered: bool, tmp_path: Path) -> None:
    objects = pa.ExtensionArray.from_storage(Kept(), pa.array([b"pickle"]))
    for column in (objects, pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), objects)):
        write_table(pa.table({"prompt_index": [1], "prompt": column}), tmp_path / "a.parquet")
        if is_registered:
            pa.register_extension_type(Kept())
        try:
            for read in (table_schema, read_table):
                with pytest.raises(StoreError, match=r"a\.parquet: column 'prompt' may hold pickled objects"):
                    read(tmp_path / "a.parquet")
        finally:
            if is_registered:
                pa.unregister_extension_type("cdpo_ray.test.pickled")


def test_external_text_is_shortened_and_put_on_one_line() -> None:
    assert printable("a\x1b[31m\nb\u202e") == r"a\x1b[31m\nb\u202e"
    assert printable("a" * 1000, 5) == "aaaaa... (1,000 characters)"
    assert printable("grün 日本 🙂") == "grün 日本 🙂"


@pytest.mark.parametrize("read", [files_within, lambda folder: refuse_links_out(folder, folder)])
def test_a_folder_that_cannot_be_listed_is_neither_empty_nor_free_of_links(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    scandir = os.scandir

    def fail(path: Any) -> Any:
        if Path(path).name == "inner":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(StoreError, match="cannot be read: Input/output error"):
        read(tmp_path)
