"""Object stores that answer with errors or support less than AWS: nothing is lost."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import s3fs
from object_store import S3Server, error, serve
from werkzeug.wrappers import Response

from cdpo_ray.errors import StoreError
from cdpo_ray.store import (
    RunFolder,
    copies,
    copy,
    delete,
    describe,
    exists,
    files_within,
    find_damage,
    move,
    read_json,
    read_shards,
    read_table,
    write_bytes,
    write_json,
    write_table,
)
from cdpo_ray.training.commits import names_of, newest_of

STEP = "1-samples"


@pytest.fixture(scope="module")
def server_and_bucket() -> Iterator[tuple[S3Server, Path]]:
    server = S3Server()
    with serve(server) as bucket:
        yield server, bucket
    server.stop()


@pytest.fixture
def bucket(server_and_bucket: tuple[S3Server, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    server, bucket = server_and_bucket
    connect(bucket, monkeypatch)
    yield bucket
    server.fault = lambda operation, key: None
    delete(bucket)


@pytest.fixture
def server(server_and_bucket: tuple[S3Server, Path], bucket: Path) -> S3Server:
    server_and_bucket[0].requests.clear()
    return server_and_bucket[0]


def connect(
    bucket: Path, monkeypatch: pytest.MonkeyPatch, *, max_attempts: int = 1, read_timeout_seconds: float = 60
) -> None:
    """botocore and s3fs retry a request independently of each other; both get the same limit here.

    s3fs gives up a connection after 5 seconds, which a busy machine can need, and a single attempt is not retried.
    """
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", str(max_attempts))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", max_attempts)
    monkeypatch.setattr(s3fs.S3FileSystem, "connect_timeout", 60)
    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", read_timeout_seconds)
    bucket.fs.connect(refresh=True)


def write_step(run: RunFolder, folder: str = STEP) -> None:
    with run.writing(folder, {"seed": 0}, {}, seed=0, resumable=True, scratch=("commits",)) as (output_dir, _):
        write_json(output_dir / "stages.json", [1])
        write_table(pa.table({"x": [1]}), output_dir / "inner" / "a.parquet")
        write_json(output_dir / "commits" / "update-000001" / "state.json", {})


def silence(status: int, code: str) -> Response:
    time.sleep(10)  # longer than the client waits
    return error(500, "InternalError")


ANSWERS: dict[str, tuple[Callable[[int, str], Response], int, str, str]] = {
    "an internal error": (error, 500, "InternalError", "on purpose|Internal Server Error"),
    "too many requests": (error, 503, "SlowDown", "on purpose|Service Unavailable"),
    "no permission": (error, 403, "AccessDenied", "on purpose|Forbidden"),
    "nothing in time": (silence, 0, "", "[Tt]imeout"),
}
USES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "JSON is read": ("get", lambda there: read_json(there / "stages.json")),
    "a table is read": ("get", lambda there: read_table(there / "inner" / "a.parquet")),
    "shards are read": ("get", lambda there: read_shards(there / "inner", ["x"])),
    "a file is looked for": ("head", lambda there: exists(there / "stages.json")),
    "files are listed": ("list", files_within),
    "commits are listed": ("list", names_of),
    "JSON is written": ("put", lambda there: write_json(there / "stages.json", [2])),
    "a table is written": ("put", lambda there: write_table(pa.table({"x": [2]}), there / "inner" / "a.parquet")),
    "a file is copied": ("copy", lambda there: copy(there / "stages.json", there / "b")),
    "a file is moved": ("copy", lambda there: move(there / "stages.json", there / "b")),
    "a moved file is deleted": ("delete", lambda there: move(there / "stages.json", there / "b")),
    "a folder is deleted": ("delete", lambda there: delete(there / "inner")),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("answer", ["an internal error", "no permission"])
def test_fault_35_an_error_of_the_store_names_path_and_reason_and_nothing_is_lost(
    server: S3Server, bucket: Path, use: str, answer: str
) -> None:
    write_step(RunFolder(bucket / "run"))
    respond, status, code, reason = ANSWERS[answer]
    operation, act = USES[use]
    server.fault = lambda requested, key: respond(status, code) if requested == operation else None
    with pytest.raises(
        StoreError, match=rf"^s3://bucket/run/1-samples.*: cannot be (read|written|deleted): .*({reason})"
    ):
        act(bucket / "run" / STEP)
    server.fault = lambda operation, key: None
    assert RunFolder(bucket / "run").is_complete(STEP, {"seed": 0}, {})


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("operation", ["head", "list", "put", "delete"])
def test_fault_35_a_step_whose_store_fails_is_resumed_by_the_same_command(
    server: S3Server,
    bucket: Path,
    operation: str,
    answer: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    respond, status, code, reason = ANSWERS[answer]
    if respond is silence:
        connect(bucket, monkeypatch, read_timeout_seconds=1)
    server.fault = lambda requested, key: respond(status, code) if requested == operation else None
    run = RunFolder(bucket / "run")
    if operation == "delete":  # only leftovers are deleted: the step is complete
        write_step(run)
        assert run.has(STEP) and "the step is complete, only leftovers remain" in caplog.text
    else:
        with pytest.raises(StoreError, match=rf"^s3://bucket/run/1-samples.*: cannot be (read|written): .*({reason})"):
            write_step(run)
    server.fault = lambda operation, key: None
    connect(bucket, monkeypatch)
    if not run.has(STEP):
        write_step(run)
    assert run.is_complete(STEP, {"seed": 0}, {})
    run.delete_leftovers(STEP, ["commits"])
    assert set(files_within(bucket / "run" / STEP)) == {"manifest.json", "stages.json", "inner/a.parquet"}


def test_fault_35_transient_errors_are_retried_a_bounded_number_of_times(
    server: S3Server, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(bucket, monkeypatch, max_attempts=2)
    num_requests: Counter[tuple[str, str]] = Counter()

    def once(operation: str, key: str) -> Response | None:
        num_requests[operation, key] += 1
        return error(503, "SlowDown") if num_requests[operation, key] == 1 else None

    server.fault = once
    write_json(bucket / "file.json", 1)
    assert read_json(bucket / "file.json") == 1
    server.requests.clear()
    server.fault = lambda operation, key: error(503, "SlowDown")
    with pytest.raises(StoreError, match="cannot be read"):
        read_json(bucket / "file.json")
    assert 2 <= len(server.requests) <= 4


def test_a_step_is_verified_with_one_listing_and_one_request_per_object(server: S3Server, bucket: Path) -> None:
    run = RunFolder(bucket / "run")
    write_step(run)
    server.requests.clear()
    run.refuse_damage(STEP, ["stages.json", "inner/a.parquet"])
    assert Counter(operation for operation, _ in server.requests if operation != "head") == {"get": 3, "list": 1}
    named = Counter(key for operation, key in server.requests if operation == "head")
    assert not {key for key in named if not key.endswith("manifest.json")}
    server.requests.clear()
    run.refuse_damage(STEP, read_up_to=0)
    assert not [key for operation, key in server.requests if operation == "get" and not key.endswith("manifest.json")]


@pytest.mark.parametrize("size", [0, 5, copies.BLOCK_BYTES, copies.BLOCK_BYTES + 5])
def test_an_object_of_any_size_is_described_as_the_same_file_on_disk(bucket: Path, tmp_path: Path, size: int) -> None:
    content = bytes(size)
    write_bytes(bucket / "a", content)
    expected = {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}
    assert describe(bucket / "a", size) == describe(bucket / "a") == expected


def test_nodes_verify_objects_but_no_local_files(bucket: Path, tmp_path: Path) -> None:
    sizes = []

    def on_nodes(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        sizes.extend(map(len, items))
        return map(function, deepcopy(items))  # a node gets copies

    for place in (tmp_path, bucket):
        for name in "abc":
            write_bytes(place / name, name.encode())
    sha256 = hashlib.sha256(b"a").hexdigest()
    with copies.objects_read_by(on_nodes):
        for place in (tmp_path, bucket):
            faults = find_damage(dict.fromkeys((place / "a", place / "b", place / "missing"), sha256), folder=place)
            assert faults == {place / "b": "was altered (its SHA-256 differs)", place / "missing": "is missing"}
    assert sizes == [2]
    assert find_damage({bucket / "b": sha256}, folder=bucket) and sizes == [2]


def test_fault_35_a_failing_store_is_not_mistaken_for_one_without_checkpoints(server: S3Server, bucket: Path) -> None:
    write_json(bucket / "commits" / "update-000001" / "manifest.json", {"files": {"state.json": {}}})
    server.fault = lambda operation, key: error(500, "InternalError") if operation in ("list", "head") else None
    with pytest.raises(StoreError, match="cannot be read"):
        newest_of(bucket / "commits")


def test_fault_35_a_server_without_batch_and_folder_deletion_suffices(server: S3Server, bucket: Path) -> None:
    objects: set[str] = set()

    def strict(operation: str, key: str) -> Response | None:
        if operation in ("put", "copy"):
            objects.add(key)
        elif operation == "delete many":
            return error(501, "NotImplemented")
        elif operation == "delete" and key not in objects:
            return error(500, "InternalError")
        return None

    server.fault = strict
    run = RunFolder(bucket / "run")
    with run.locked():
        write_step(run)
        with run.writing("2-scores", {"a": 1}, {}, seed=0, resumable=False, grows=True) as (folder, _):
            write_json(folder / "a.json", 1)
        with run.writing("2-scores", {"a": 1, "b": 2}, {}, seed=0, resumable=False, grows=True) as (folder, _):
            write_json(folder / "b.json", 2)
        delete(bucket / "run" / STEP / "inner")
        delete(bucket / "run" / "nothing")
    assert set(files_within(bucket / "run")) == {
        *(f"{STEP}/{name}" for name in ("manifest.json", "stages.json")),
        *(f"2-scores/{name}" for name in ("a.json", "b.json", "manifest.json")),
    }
