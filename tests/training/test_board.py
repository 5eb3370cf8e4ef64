"""Posts of workers and polls of the driver, in one process."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from cdpo_ray.errors import StoreError
from cdpo_ray.training.board import Board, Cursor, News, NodeHeartbeats, error_of, silence_of

START = Cursor()


def news(board: Board, cursor: Cursor = START, *, silent_seconds: float = 60.0) -> News:
    return board.read(cursor, silent_seconds=silent_seconds)


def records(*updates: int) -> list[dict[str, float]]:
    return [{"update": update, "loss": 0.5} for update in updates]


def test_a_restart_that_posts_its_records_again_reports_nothing_twice() -> None:
    board = Board()
    board.post_checkpoint(2, records(1, 2), [{"stage": 1}], ["stage 1"])
    board.post_update(4)
    first = news(board)
    assert (first.num_updates, first.num_kept, first.cursor) == (4, 2, Cursor(2, 1, 1))
    board.post_checkpoint(2, records(1, 2), [{"stage": 1}], ["resumes after update 2"])
    second = news(board, first.cursor)
    assert (second.num_updates, second.num_kept, second.records, second.summaries) == (2, 2, [], [])
    assert second.lines == ["resumes after update 2"]
    board.post_checkpoint(3, records(1, 2, 3), [{"stage": 1}])
    third = news(board, second.cursor)
    assert [record["update"] for record in third.records] == [3] and third.lines == []
    assert third.cursor == Cursor(3, 2, 1)


def test_a_restarted_board_reports_its_first_lines_to_a_driver_that_has_read_more() -> None:
    board = Board()
    board.post_checkpoint(9, records(9), [], ["stage 3"])
    found = news(board, Cursor(8, num_lines=2))
    assert found.lines == ["stage 3"] and found.cursor == Cursor(9, num_lines=1)


def test_a_stage_that_ended_is_reported_once_also_by_a_restarted_board() -> None:
    board = Board()
    board.post_checkpoint(4, records(4), [{"stage": 1}, {"stage": 2}])
    assert news(board, Cursor(num_stages=1)).summaries == [{"stage": 2}]
    restarted = Board()
    found = news(restarted, Cursor(num_stages=2))
    assert not found.summaries and found.cursor.num_stages == 2
    restarted.post_checkpoint(6, records(6), [{"stage": 1}, {"stage": 2}, {"stage": 3}])
    assert news(restarted, found.cursor).summaries == [{"stage": 3}]


def test_a_worker_without_a_heartbeat_is_reported_until_it_sends_one_or_leaves() -> None:
    board = Board()
    assert board.heartbeats_of({0: ("pid 1 on a", 0.0)}) is False
    board.heartbeats_of({1: ("pid 2 on b", 5.0)})
    (rank, (where, seconds)) = next(iter(news(board, silent_seconds=4.0).silent.items()))
    assert (rank, where) == (1, "pid 2 on b") and seconds >= 5.0
    assert news(board, silent_seconds=4.0).silent.keys() == {1}
    board.leave(1)
    assert not news(board, silent_seconds=4.0).silent


def test_only_new_records_are_posted_and_a_restarted_board_requests_all() -> None:
    board = Board()
    assert board.post_checkpoint(2, records(1, 2), [{"stage": 1}])
    assert board.post_checkpoint(4, records(3, 4), [{"stage": 2}], ["stage 2"], first=(2, 1))
    assert news(board).records == records(1, 2, 3, 4) and news(board).summaries == [{"stage": 1}, {"stage": 2}]
    restarted = Board()
    assert not restarted.post_checkpoint(6, records(5, 6), [], ["stage 3"], first=(4, 2))
    assert (news(restarted).num_updates, news(restarted).records, news(restarted).lines) == (0, [], [])
    assert restarted.post_checkpoint(6, records(1, 2, 3, 4, 5, 6), [{"stage": 1}, {"stage": 2}], ["stage 3"])
    assert len(news(restarted).records) == 6 and news(restarted).lines == ["stage 3"]
    resumed = records(1, 2)  # training resumes from an older checkpoint
    assert board.post_checkpoint(2, resumed, [{"stage": 1}])
    assert board.post_checkpoint(3, records(3), [], first=(2, 1)) and news(board).summaries == [{"stage": 1}]


class Node:
    """Workers of one node, whose heartbeats the test gives one after another."""

    def __init__(self, folder: Path, ranks: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.board, self.calls = Board(), list[list[int]]()
        self.workers = {rank: NodeHeartbeats(folder, rank, self.post) for rank in ranks}
        self.now = 1000.0
        monkeypatch.setattr("cdpo_ray.training.board.time.monotonic", lambda: self.now)

    def post(self, ages: Mapping[int, tuple[str, float]]) -> bool:
        self.calls.append(sorted(ages))
        return self.board.heartbeats_of(ages)

    def beat(self, *ranks: int, seconds: int = 1) -> list[bool]:
        for _ in range(seconds):
            self.now += 1
            stops = [self.workers[rank].beat() for rank in ranks]
        return stops


def test_the_workers_of_a_node_share_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(tmp_path / "beats", range(8, 16), monkeypatch)
    node.beat(*range(8, 16), seconds=5)
    assert len(node.calls) == 5 and node.calls[1:] == [[*range(8, 16)]] * 4
    assert not news(node.board, silent_seconds=2.5).silent
    for worker in node.workers.values():
        worker.leave()
    assert not (tmp_path / "beats").exists()


def test_fault_16_a_stopped_worker_is_silent_also_the_one_that_posts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path / "beats", range(3), monkeypatch)
    node.beat(0, 1, 2, seconds=2)
    node.beat(0, 2, seconds=10)
    assert news(node.board, silent_seconds=5).silent == {1: (f"pid {os.getpid()} on {platform.node()}", 10.0)}
    node.beat(2, seconds=10)
    assert {rank: age for rank, (_, age) in news(node.board, silent_seconds=5).silent.items()} == {0: 10.0, 1: 20.0}
    node.beat(0, 1, 2, seconds=2)
    assert not news(node.board, silent_seconds=5).silent
    node.now += 10
    assert news(node.board, silent_seconds=5).silent.keys() == {0, 1, 2}, "a node that is lost"


def test_the_stop_flag_reaches_every_worker_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(tmp_path / "beats", range(3), monkeypatch)
    assert node.beat(0, 1, 2) == [False] * 3
    node.board.ask_to_stop()
    assert node.beat(0, 1, 2) == [True] * 3


def test_many_silent_workers_are_one_line_with_their_number_nodes_and_the_first_of_them() -> None:
    silent = {rank: (f"pid {rank} on host-{rank // 8}", 30.0 + rank) for rank in range(256)}
    assert silence_of({5: silent[5]}) == ["worker 5 (pid 5 on host-0): no heartbeat for 35 s"]
    assert silence_of(silent) == [
        "256 workers on 32 nodes (host-0, host-1, host-2, ...): no heartbeat for 285 s;"
        " worker 0 (pid 0 on host-0), worker 1 (pid 1 on host-0), worker 2 (pid 2 on host-0), ..."
    ]


def test_the_first_fault_is_kept_and_raised_with_its_class_and_message() -> None:
    board = Board()
    assert not board.has_fault()
    board.post_fault("StoreError", "disk full")
    board.post_fault("TrainingError", "because of that")
    assert board.has_fault()
    with pytest.raises(StoreError, match=r"^disk full$"):
        raise error_of(news(board).fault or ("", ""))
