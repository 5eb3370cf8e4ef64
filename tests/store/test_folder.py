"""A step's folder is complete and described by its manifest, or it does not exist."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdpo_ray import __version__
from cdpo_ray.errors import StoreError
from cdpo_ray.store import MANIFEST, PARTS, RunFolder, files_within, link, make_folder, read_shards, write_json

STEP = "1-samples"
SETTINGS = {"model": {"path": "embedded", "dtype": "float32"}, "run.seed": 0}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    return folder


def write_step(
    run: RunFolder, *, settings: dict = SETTINGS, inputs: dict | None = None, resumable: bool = False
) -> None:
    with run.writing(STEP, settings, inputs or {}, seed=7, resumable=resumable) as (folder, output):
        (folder / "inner").mkdir(exist_ok=True)
        (folder / "inner" / "shard.bin").write_bytes(b"0123456789")
        (folder / "table.txt").write_text("table")
        output.counts["rows"] = 3


def hold(code: str, path: Path) -> subprocess.Popen[str]:
    """Process that runs ``code`` with a `RunFolder` until it prints, and then waits."""
    full = (
        f"import sys, pathlib\nfrom cdpo_ray.store import RunFolder\nrun = RunFolder(pathlib.Path(sys.argv[1]))\n{code}"
    )
    arguments = [sys.executable, "-c", full, str(path)]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process by SIGKILL and wait for its end."""
    process.kill()
    process.communicate()


def test_a_finished_step_is_complete_and_its_manifest_describes_every_file(run: RunFolder) -> None:
    assert not run.is_complete(STEP, SETTINGS, {})
    write_step(run)
    assert run.is_complete(STEP, SETTINGS, {})
    manifest = run.manifest(STEP)
    assert manifest["files"] == {
        "inner/shard.bin": {"bytes": 10, "sha256": hashlib.sha256(b"0123456789").hexdigest()},
        "table.txt": {"bytes": 5, "sha256": hashlib.sha256(b"table").hexdigest()},
    }
    assert (manifest["counts"], manifest["seed"], manifest["settings"]) == ({"rows": 3}, 7, SETTINGS)
    assert manifest["versions"]["torch"]
    assert sorted(path.name for path in run.path.iterdir()) == [STEP]


def test_a_step_without_its_manifest_is_not_complete(run: RunFolder) -> None:
    write_step(run)
    (run.path / STEP / MANIFEST).unlink()
    assert not run.is_complete(STEP, SETTINGS, {})
    with pytest.raises(StoreError, match=r"1-samples: is missing or not finished; run the step that makes it first"):
        run.step(STEP)


def test_a_folder_without_a_manifest_is_refused_before_the_work_is_done(run: RunFolder) -> None:
    write_step(run)
    (run.path / STEP / MANIFEST).unlink()
    with (
        pytest.raises(StoreError, match=r"1-samples: has no manifest\.json; delete the folder"),
        run.writing(STEP, SETTINGS, {}, seed=7, resumable=False),
    ):
        pytest.fail("the work was started")
    assert (run.path / STEP / "table.txt").is_file()


def test_a_damaged_manifest_is_named(run: RunFolder) -> None:
    write_step(run)
    path = run.path / STEP / MANIFEST
    path.write_text(path.read_text()[:50])
    with pytest.raises(StoreError, match=r"1-samples/manifest\.json: is damaged .*; delete .*1-samples"):
        run.is_complete(STEP, SETTINGS, {})


def test_a_package_that_runs_from_its_source_tree_writes_its_version(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = metadata.version

    def without_this_package(name: str) -> str:
        if name == "cdpo_ray":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "version", without_this_package)
    write_step(run)
    assert run.manifest(STEP)["versions"]["cdpo_ray"] == __version__


def test_changed_settings_are_refused_with_each_difference(run: RunFolder) -> None:
    write_step(run)
    changed = {"model": {"path": "embedded", "dtype": "bfloat16"}, "run.seed": 1}
    with pytest.raises(StoreError, match="was made with") as caught:
        run.is_complete(STEP, changed, {})
    assert str(caught.value) == (
        f"{run.path / STEP} was made with `model.dtype` = float32, config says bfloat16; `run.seed` = 0, config says 1;"
        " delete the folder, restore the value, or choose another `run.name`"
    )


def test_an_added_or_removed_setting_is_a_difference(run: RunFolder) -> None:
    write_step(run)
    with pytest.raises(StoreError, match=r"`model\.compile` = None, config says True"):
        run.is_complete(STEP, {**SETTINGS, "model": {**SETTINGS["model"], "compile": True}}, {})
    with pytest.raises(StoreError, match=r"`run\.seed` = 0, config says None"):
        run.is_complete(STEP, {"model": SETTINGS["model"]}, {})


def test_other_inputs_are_refused_by_their_fingerprint(run: RunFolder) -> None:
    write_step(run, inputs={"0-before": "abc"})
    assert run.is_complete(STEP, SETTINGS, {"0-before": "abc"})
    with pytest.raises(StoreError, match=r"1-samples was made from another 0-before; delete .* to regenerate it"):
        run.is_complete(STEP, SETTINGS, {"0-before": "abd"})


def test_the_fingerprint_depends_on_the_files_only(tmp_path: Path) -> None:
    prints = []
    for name, settings, text in (("a", {"x": 1}, "same"), ("b", {"x": 2}, "same"), ("c", {"x": 1}, "else")):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        with run.writing(STEP, settings, {}, seed=0, resumable=False) as (folder, _):
            (folder / "f").write_text(text)
        prints.append(run.fingerprint(STEP))
    assert prints[0] == prints[1] != prints[2]


def test_a_flipped_byte_is_named(run: RunFolder) -> None:
    write_step(run)
    shard = run.path / STEP / "inner" / "shard.bin"
    shard.write_bytes(b"0123456780")
    with pytest.raises(
        StoreError, match=r"inner/shard\.bin: was altered \(its SHA-256 differs\); delete .*1-samples to"
    ):
        run.is_complete(STEP, SETTINGS, {})


def test_a_missing_file_is_named(run: RunFolder) -> None:
    write_step(run)
    (run.path / STEP / "inner" / "shard.bin").unlink()
    with pytest.raises(StoreError, match=r"inner/shard\.bin: is missing; delete .*1-samples to regenerate it"):
        run.is_complete(STEP, SETTINGS, {})


def test_fault_43_all_damage_is_reported_at_once_including_an_added_table(run: RunFolder) -> None:
    write_step(run)
    (run.path / STEP / "inner" / "shard.bin").unlink()
    (run.path / STEP / "table.txt").write_text("other")
    (run.path / STEP / "samples-9.parquet").write_bytes(b"another table")
    (run.path / STEP / "notes.txt").write_text("no step reads this")
    with pytest.raises(StoreError) as caught:
        run.refuse_damage(STEP)
    path = run.path / STEP
    assert str(caught.value) == (
        f"{path}/inner/shard.bin: is missing; {path}/table.txt: was altered (its SHA-256 differs);"
        f" {path}/samples-9.parquet: is not in the manifest; delete {path} to regenerate it"
    )
    with pytest.raises(StoreError, match=r"1-samples/table\.txt: was altered"):
        run.refuse_damage(STEP, ["table.txt"])


def test_fault_43_files_that_this_process_wrote_or_verified_are_not_read_again_with_once(run: RunFolder) -> None:
    write_step(run)
    later = RunFolder(run.path)
    later.refuse_damage(STEP, once=True)
    (run.path / STEP / "table.txt").write_text("other")
    for reader in (run, later):
        reader.refuse_damage(STEP, once=True)
        with pytest.raises(StoreError, match="was altered"):
            reader.refuse_damage(STEP)
    with pytest.raises(StoreError, match="was altered"):
        RunFolder(run.path).refuse_damage(STEP, once=True)


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_fault_51_hashes_of_shards_are_kept_until_the_step_is_finished(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path if place == "disk" else request.getfixturevalue("s3")
    run = RunFolder(path / "run")
    make_folder(run.path)
    with run.writing(STEP, SETTINGS, {}, seed=0, resumable=True) as (folder, _):
        make_folder(folder / PARTS)
        (folder / PARTS / "samples-0.parquet.sha256").write_text("a hash")
        (folder / "samples-0.parquet").write_bytes(b"a table")
    assert list(run.manifest(STEP)["files"]) == ["samples-0.parquet"]
    assert sorted(files_within(run.step(STEP))) == ["manifest.json", "samples-0.parquet"]


def fail_in_the_middle(run: RunFolder, *, resumable: bool) -> None:
    def attempt() -> None:
        with run.writing(STEP, SETTINGS, {"in": "1"}, seed=0, resumable=resumable) as (folder, _):
            (folder / "half.bin").write_bytes(b"half")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        attempt()


def test_an_interrupted_step_is_incomplete_and_deleted_by_the_next_attempt(run: RunFolder) -> None:
    fail_in_the_middle(run, resumable=False)
    assert not run.is_complete(STEP, SETTINGS, {"in": "1"})
    assert not (run.path / STEP).exists()
    with run.writing(STEP, {"else": 1}, {"in": "2"}, seed=0, resumable=False) as (folder, _):
        assert [path.name for path in folder.iterdir()] == ["settings.json"]
    assert run.manifest(STEP)["files"] == {}


def test_a_resumable_step_keeps_the_files_of_the_interrupted_attempt(run: RunFolder) -> None:
    fail_in_the_middle(run, resumable=True)
    with run.writing(STEP, SETTINGS, {"in": "1"}, seed=0, resumable=True) as (folder, _):
        assert (folder / "half.bin").read_bytes() == b"half"
    assert set(run.manifest(STEP)["files"]) == {"half.bin"}


def test_a_resumable_step_started_with_other_settings_is_refused_and_kept(run: RunFolder) -> None:
    fail_in_the_middle(run, resumable=True)
    with (
        pytest.raises(StoreError, match=r"was started with `run\.seed` = 0, config says 9"),
        run.writing(STEP, {**SETTINGS, "run.seed": 9}, {"in": "1"}, seed=0, resumable=True),
    ):
        pytest.fail("the work was started")
    with (
        pytest.raises(StoreError, match="was started with other inputs; delete it to start over"),
        run.writing(STEP, SETTINGS, {"in": "2"}, seed=0, resumable=True),
    ):
        pytest.fail("the work was started")
    assert (run.path / f"{STEP}.partial" / "half.bin").read_bytes() == b"half"


def test_a_resumable_step_continues_with_other_settings_if_allowed_and_records_the_changes(
    run: RunFolder,
) -> None:
    fail_in_the_middle(run, resumable=True)
    for seed in (9, 10, 10):

        def attempt(seed: int = seed) -> None:
            settings = {**SETTINGS, "run.seed": seed}
            with run.writing(STEP, settings, {"in": "1"}, seed=0, resumable=True, allow_change=True) as (folder, _):
                assert (folder / "half.bin").read_bytes() == b"half"
                raise RuntimeError("disk on fire")

        with pytest.raises(RuntimeError, match="disk on fire"):
            attempt()
    with run.writing(STEP, {**SETTINGS, "run.seed": 10}, {"in": "1"}, seed=0, resumable=True):
        pass
    assert run.manifest(STEP)["details"]["settings_changed"] == [
        "`run.seed` = 0, config says 9",
        "`run.seed` = 9, config says 10",
    ]
    assert run.is_complete(STEP, {**SETTINGS, "run.seed": 10}, {"in": "1"})


@pytest.mark.parametrize("resumable", [False, True])
def test_a_step_stopped_between_manifest_and_rename_is_incomplete(
    run: RunFolder, resumable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_rename(self: Path, target: Path) -> None:
        raise OSError("stopped here")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", no_rename)
        with pytest.raises(StoreError, match="1-samples: cannot be written: stopped here"):
            write_step(run, resumable=resumable)
    assert (run.path / f"{STEP}.partial" / MANIFEST).is_file()
    assert not run.is_complete(STEP, SETTINGS, {})
    write_step(run, resumable=resumable)
    assert run.is_complete(STEP, SETTINGS, {})


def test_a_killed_writer_leaves_an_incomplete_step(run: RunFolder) -> None:
    code = (
        "with run.writing('1-samples', {}, {}, seed=0, resumable=False) as (folder, _):\n"
        "    (folder / 'shard.bin').write_bytes(b'x' * 1000); print('here', flush=True); sys.stdin.read()"
    )
    kill(hold(code, run.path))
    assert (run.path / f"{STEP}.partial" / "shard.bin").is_file()
    assert not run.is_complete(STEP, {}, {})
    write_step(run)
    assert "shard.bin" not in run.manifest(STEP)["files"]


@pytest.fixture
def holder(run: RunFolder) -> Iterator[subprocess.Popen[str]]:
    process = hold("with run.locked():\n    print('here', flush=True); sys.stdin.read()", run.path)
    yield process
    if process.returncode is None:
        kill(process)


def test_a_second_process_is_refused_until_the_first_dies(run: RunFolder, holder: subprocess.Popen[str]) -> None:
    with (
        pytest.raises(StoreError, match=rf"run: another run is writing here \(pid {holder.pid} on .+\); wait for it"),
        run.locked(),
    ):
        pytest.fail("two runs hold one folder")
    kill(holder)
    with run.locked():
        assert (run.path / ".lock").read_text().startswith(f"pid {os.getpid()} on ")


def test_a_lock_is_released_after_its_block(run: RunFolder) -> None:
    for _ in range(2):
        with run.locked():
            pass


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_folder_that_cannot_be_written_is_a_store_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.raises(StoreError, match=rf"{place}: cannot be written: .+; check the disk"),
        RunFolder(tmp_path / place).locked(),
    ):
        pytest.fail("there is no such folder")


GROWN = {"clip": {"size": 8}, "oracle": {}}


def score(run: RunFolder, settings: dict = GROWN) -> list[str]:
    """Write a file for each missing part; returns the names of these parts."""
    with run.writing(STEP, settings, {"in": "1"}, seed=0, resumable=False, grows=True) as (folder, output):
        for part in output.parts:
            (folder / "inner").mkdir(exist_ok=True)
            (folder / "inner" / part).write_text(f"{part} {settings[part]}")
        output.counts["scores"] = len(output.parts)
        output.details |= dict.fromkeys(output.parts, 1)
    return list(output.parts)


def is_done(run: RunFolder, settings: dict = GROWN) -> bool:
    return run.is_complete(STEP, settings, {"in": "1"}, grows=True)


def test_fault_02_a_folder_of_added_files_that_a_kill_left_behind_is_deleted(run: RunFolder) -> None:
    write_step(run)
    left = run.path / f"{STEP}.partial"
    left.mkdir()
    (left / "added.bin").write_bytes(b"added")
    run.delete_leftovers(STEP, ())
    assert not left.exists() and run.is_complete(STEP, SETTINGS, {})


def test_a_step_that_grows_makes_only_missing_parts(run: RunFolder) -> None:
    clip = {"clip": {"size": 8}}
    assert score(run, clip) == ["clip"]
    before = run.fingerprint(STEP, ["inner/clip"])
    written = (run.path / STEP / "inner" / "clip").stat()
    assert is_done(run, clip) and not is_done(run)
    assert score(run) == ["oracle"]
    assert is_done(run) and is_done(run, clip) and is_done(run, {"oracle": {}})
    assert run.fingerprint(STEP, ["inner/clip"]) == before != run.fingerprint(STEP)
    assert (run.path / STEP / "inner" / "clip").stat() == written
    manifest = run.manifest(STEP)
    assert (manifest["counts"], manifest["details"]) == ({"scores": 2}, {"clip": 1, "oracle": 1})
    assert sorted(path.name for path in run.path.iterdir()) == [STEP]


def test_a_part_made_with_other_settings_is_refused_and_a_missing_part_is_a_difference(run: RunFolder) -> None:
    score(run, {"clip": {"size": 8}})
    with pytest.raises(StoreError, match=r"was made with `clip\.size` = 8, config says 9"):
        is_done(run, {"clip": {"size": 9}, "oracle": {}})
    with pytest.raises(StoreError, match=r"was made with `oracle` = None, config says \{\}"):
        run.refuse_difference(STEP, GROWN, {"in": "1"}, grows=True)
    with pytest.raises(StoreError, match=r"1-samples: has no inner/oracle; run the step that makes it first"):
        run.fingerprint(STEP, ["inner/clip", "inner/oracle"])


def test_a_stop_before_the_manifest_leaves_a_growing_step_unchanged(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(run, {"clip": {"size": 8}})
    before = run.manifest(STEP)

    def stop(path: Path, value: object) -> None:
        if path.name == MANIFEST:
            raise OSError("stopped here")
        write_json(path, value)

    with monkeypatch.context() as patched:
        patched.setattr("cdpo_ray.store.folder.write_json", stop)
        with pytest.raises(OSError, match="stopped here"):
            score(run)
    assert (run.path / STEP / "inner" / "oracle").is_file()
    assert run.manifest(STEP) == before
    assert is_done(run, {"clip": {"size": 8}}) and not is_done(run)
    assert score(run) == ["oracle"] and is_done(run)


def test_a_file_is_linked_or_copied_if_links_are_not_supported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").write_text("text")
    link(tmp_path / "one", tmp_path / "linked")
    assert (tmp_path / "linked").samefile(tmp_path / "one")

    def another_disk(source: Path, target: Path) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", another_disk)
    link(tmp_path / "one", tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "text" and not (tmp_path / "copied").samefile(tmp_path / "one")


def test_json_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": [1, 2]})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": [3], "b": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2]}

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"value\.json: cannot be written: No space left"):
        write_json(path, {"a": [4]})
    assert json.loads(path.read_text()) == {"a": [1, 2]}


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, value in (("b-000001", 2), ("b-000000", 1), ("b-000010", 3)):
        pq.write_table(pa.table({"x": [value], "left_out": [0]}), tmp_path / f"{name}.parquet")
    (tmp_path / "manifest.json").write_text("{}")
    assert read_shards(tmp_path, ["x"]).to_pydict() == {"x": [1, 2, 3]}
