"""Posts of workers and polls of the driver, in one process."""

import time

import pytest

from cdpo_ray.errors import StoreError
from cdpo_ray.training.board import Board, Cursor, News, error_of

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
    assert board.heartbeat(0, "pid 1 on a") is False
    board.heartbeat(1, "pid 2 on b")
    time.sleep(0.02)
    board.heartbeat(0, "pid 1 on a")
    (rank, (where, seconds)) = next(iter(news(board, silent_seconds=0.01).silent.items()))
    assert (rank, where) == (1, "pid 2 on b") and seconds >= 0.02
    board.leave(1)
    assert not news(board, silent_seconds=0.01).silent.get(1)


def test_the_first_fault_is_kept_and_raised_with_its_class_and_message() -> None:
    board = Board()
    assert not board.has_fault()
    board.post_fault("StoreError", "disk full")
    board.post_fault("TrainingError", "because of that")
    assert board.has_fault()
    with pytest.raises(StoreError, match=r"^disk full$"):
        raise error_of(news(board).fault or ("", ""))


def test_a_heartbeat_returns_the_stop_flag() -> None:
    board = Board()
    board.ask_to_stop()
    assert board.heartbeat(0, "pid 1 on a") is True
