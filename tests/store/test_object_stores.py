"""Runs in an object store: a real S3 server on loopback."""

import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from finished_runs import config_of
from lock_holders import holder

from cdpo_ray.errors import ConfigError, StoreError
from cdpo_ray.store import (
    MANIFEST,
    RunFolder,
    copy,
    delete,
    is_local,
    link,
    local_copy,
    make_folder,
    read_shards,
    read_table,
    shard_schema,
    storage_path,
    write_table,
)

STEP = "1-samples"
HALF_A_DOWNLOAD = """
import sys
from cdpo_ray.store import local_copy, node_folder, storage_path

copied, copy = [], node_folder.copy

def copy_one(source, target):
    if copied:
        print("here", flush=True); sys.stdin.read()
    copied.append(source)
    copy(source, target)

node_folder.copy = copy_one
local_copy(storage_path(sys.argv[1]))
"""


def write_step(run: RunFolder, content: bytes = b"0123456789", *, resumable: bool = False) -> None:
    with run.writing(STEP, {"seed": 0}, {}, seed=0, resumable=resumable) as (folder, _):
        make_folder(folder / "inner")
        (folder / "inner" / "shard.bin").write_bytes(content)
        (folder / "table.txt").write_text("table")


def test_a_local_path_is_a_path_and_a_path_in_a_store_can_be_pickled(s3: Path) -> None:
    assert storage_path("runs") == Path("runs") and is_local(storage_path("runs"))
    there = storage_path("s3://bucket/runs") / "a"
    assert not is_local(there) and str(there) == "s3://bucket/runs/a"
    there.write_text("text")
    assert pickle.loads(pickle.dumps(there)).read_text() == "text"  # noqa: S301


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://key:secret@bucket/runs", r"must not contain credentials"),
        ("ftp://host/runs", r"must be a local folder, s3://\.\.\. or gs://"),
    ],
)
def test_credentials_and_other_schemes_are_refused_unseen(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        storage_path(text)
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match=rf"run\.dir.*{message}") as refused:
        config_of(tmp_path, "embedded", run={"dir": text})
    assert "secret" not in str(refused.value)


def test_a_step_has_the_manifest_of_the_same_step_on_disk(s3: Path, tmp_path: Path) -> None:
    runs = RunFolder(s3 / "run"), RunFolder(tmp_path / "run")
    for run in runs:
        write_step(run)
        assert run.is_complete(STEP, {"seed": 0}, {})
    there, here = (run.manifest(STEP) for run in runs)
    assert there["files"] == here["files"] and there["fingerprint"] == here["fingerprint"]
    assert s3.fs.find("bucket") == [f"bucket/run/{STEP}/{name}" for name in ("inner/shard.bin", MANIFEST, "table.txt")]


def test_an_interrupted_step_is_incomplete_and_is_restarted_or_resumed(s3: Path) -> None:
    run = RunFolder(s3 / "run")

    def broken_off(*, resumable: bool) -> None:
        with run.writing(STEP, {"seed": 0}, {}, seed=0, resumable=resumable) as (folder, _):
            (folder / "half.bin").write_bytes(b"half")
            raise RuntimeError("disk on fire")

    for resumable in (True, False):
        with pytest.raises(RuntimeError, match="disk on fire"):
            broken_off(resumable=resumable)
        assert not run.has(STEP)
        write_step(run, resumable=resumable)
        assert ("half.bin" in run.manifest(STEP)["files"]) == resumable
        delete(s3 / "run")
    (s3 / "run" / STEP / "foreign.txt").write_text("not ours")
    with pytest.raises(StoreError, match=r"1-samples: has no manifest\.json; delete the folder"):
        write_step(run)


def test_a_step_grows(s3: Path) -> None:
    run = RunFolder(s3 / "run")
    for settings in ({"clip": 1}, {"clip": 1, "oracle": 2}):
        with run.writing(STEP, settings, {}, seed=0, resumable=False, grows=True) as (folder, output):
            for part in output.parts:
                (folder / part).write_text(part)
    assert run.is_complete(STEP, {"clip": 1, "oracle": 2}, {}, grows=True)
    assert s3.fs.find("bucket") == [f"bucket/run/{STEP}/{name}" for name in ("clip", MANIFEST, "oracle")]


def test_an_altered_object_is_named(s3: Path) -> None:
    run = RunFolder(s3 / "run")
    write_step(run)
    (s3 / "run" / STEP / "table.txt").write_text("Table")
    with pytest.raises(StoreError, match=r"s3://bucket/run/1-samples/table\.txt: was altered"):
        run.is_complete(STEP, {"seed": 0}, {})


def test_tables_are_read_back_unchanged(s3: Path) -> None:
    for number in (1, 0):
        write_table(pa.table({"x": [number], "y": ["text"]}), s3 / "shards" / f"a-{number}.parquet")
    assert read_shards(s3 / "shards", ["x"]).to_pydict() == {"x": [0, 1]}
    assert shard_schema(s3 / "shards").names == ["x", "y"]
    assert read_table(s3 / "shards" / "a-1.parquet", filters=[("x", "<", 1)]).num_rows == 0


def test_files_are_copied_in_every_direction(s3: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    (tmp_path / "a").chmod(0o600)
    copy(tmp_path / "a", s3 / "b")
    link(s3 / "b", s3 / "c")
    copy(s3 / "c", tmp_path / "inner" / "d")
    assert (tmp_path / "inner" / "d").read_text() == "text"
    assert (tmp_path / "inner" / "d").stat().st_mode & 0o777 == 0o644


def test_a_local_copy_is_downloaded_once_and_again_after_a_change(
    s3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = RunFolder(s3 / "run")
    write_step(run)
    here = local_copy(s3 / "run" / STEP)
    assert (here / "inner" / "shard.bin").read_bytes() == b"0123456789"
    assert here.parent.stat().st_mode & 0o777 == 0o700
    made = here.stat().st_ino
    assert local_copy(s3 / "run" / STEP).stat().st_ino == made and local_copy(here) == here
    delete(s3 / "run")
    write_step(run, b"else")
    assert (local_copy(s3 / "run" / STEP) / "inner" / "shard.bin").read_bytes() == b"else"
    delete(s3 / "run")
    write_step(run, b"more")
    (s3 / "run" / STEP / "inner" / "shard.bin").write_bytes(b"flip")
    with pytest.raises(StoreError, match=r"inner/shard\.bin: was altered"):
        local_copy(s3 / "run" / STEP)
    assert len([path for path in here.parent.iterdir() if path.is_dir()]) == 2


def test_processes_of_a_node_that_need_the_same_copy_download_it_once(
    s3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write_step(RunFolder(s3 / "run"))
    copied: list[Path] = []

    def slow_copy(source: Path, target: Path) -> None:
        copied.append(source)
        time.sleep(0.2)
        copy(source, target)

    monkeypatch.setattr("cdpo_ray.store.node_folder.copy", slow_copy)
    with ThreadPoolExecutor(4) as threads:  # a lock belongs to a file that was opened, not to a process
        copies = {*threads.map(local_copy, [s3 / "run" / STEP] * 4)}
    assert len(copies) == 1 and len(copied) == len({*copied}) > 0


def test_fault_02_a_process_that_is_killed_during_a_download_leaves_its_lock_and_no_copy(
    s3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write_step(RunFolder(s3 / "run"))
    with holder(HALF_A_DOWNLOAD, s3 / "run" / STEP) as process, ThreadPoolExecutor(1) as thread:
        found = thread.submit(local_copy, s3 / "run" / STEP)
        time.sleep(0.5)
        assert not found.done(), "it waits for the process that downloads"
        process.kill()
        assert {"inner", "table.txt"} <= {*os.listdir(found.result())}
    (left,) = found.result().parent.glob("partial-*")
    os.utime(left, (0, 0))
    write_step(RunFolder(s3 / "other"), b"other")
    local_copy(s3 / "other" / STEP)
    assert not left.exists()


def test_fault_02_a_kill_during_the_deletion_of_a_copy_leaves_no_part_of_it_as_the_copy(
    s3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("old", "new"):
        write_step(RunFolder(s3 / name), name.encode())
    os.utime(local_copy(s3 / "old" / STEP), (0, 0))

    def killed(folder: Path) -> None:
        (folder / "table.txt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            local_copy(s3 / "new" / STEP)
    assert (local_copy(s3 / "old" / STEP) / "table.txt").read_text() == "table"


def test_a_copy_is_deleted_by_the_next_download_once_it_was_unused_for_days(
    s3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run, made = RunFolder(s3 / "run"), []
    for content in (b"old", b"used", b"new"):
        delete(s3 / "run")
        write_step(run, content)
        made.append(local_copy(s3 / "run" / STEP))
    old, used, _ = made
    for path in (old, used):
        os.utime(path, (0, 0))
    delete(s3 / "run")
    write_step(run, b"used")
    assert local_copy(s3 / "run" / STEP) == used and old.exists(), "nothing is downloaded"
    delete(s3 / "run")
    write_step(run, b"another")
    local_copy(s3 / "run" / STEP)
    assert [path.exists() for path in made] == [False, True, True]


def test_a_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['gcsfs'] = None\nfrom cdpo_ray.store import storage_path\nstorage_path('gs://bucket/runs')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'StoreError: gs://bucket/runs: gs:// needs `pip install "cdpo_ray[gs]"`' in done.stderr
