"""What workers post and the driver reads, in one process."""

import time

import pytest

from cdpo_ray.errors import StoreError
from cdpo_ray.training.board import Board, News, fault_of


def news(
    board: Board,
    *,
    after_update: int = 0,
    num_lines_seen: int = 0,
    num_stages_seen: int = 0,
    silent_seconds: float = 60.0,
) -> News:
    return board.read(
        after_update=after_update,
        num_lines_seen=num_lines_seen,
        num_stages_seen=num_stages_seen,
        silent_seconds=silent_seconds,
    )


def records(*updates: int) -> list[dict[str, float]]:
    return [{"update": update, "loss": 0.5} for update in updates]


def test_a_restart_that_posts_its_records_again_tells_nothing_twice() -> None:
    board = Board()
    board.post_commit(2, records(1, 2), [{"stage": 1}], ["stage 1"])
    board.post_update(4)
    board.post_commit(2, records(1, 2), [{"stage": 1}], ["goes on after update 2"])
    told = news(board, after_update=2, num_lines_seen=1)
    assert (told.num_updates, told.num_kept, told.records) == (2, 2, [])
    assert told.lines == ["goes on after update 2"]
    board.post_commit(3, records(1, 2, 3), [{"stage": 1}])
    assert [record["update"] for record in news(board, after_update=2).records] == [3]


def test_a_board_that_began_anew_tells_its_first_lines_to_a_driver_that_has_seen_more() -> None:
    board = Board()
    board.post_commit(9, records(9), [], ["stage 3"])
    told = news(board, after_update=8, num_lines_seen=2)
    assert told.lines == ["stage 3"] and told.num_lines == 1


def test_a_stage_that_ended_is_told_once_also_by_a_board_that_began_anew() -> None:
    board = Board()
    board.post_commit(4, records(4), [{"stage": 1}, {"stage": 2}])
    assert news(board, num_stages_seen=1).summaries == [{"stage": 2}]
    began_anew = Board()
    assert news(began_anew, num_stages_seen=2).summaries == ()
    began_anew.post_commit(6, records(6), [{"stage": 1}, {"stage": 2}, {"stage": 3}])
    assert news(began_anew, num_stages_seen=2).summaries == [{"stage": 3}]


def test_a_worker_without_a_sign_is_named_until_it_gives_one_or_leaves() -> None:
    board = Board()
    assert board.beat(0, "pid 1 on a") is False
    board.beat(1, "pid 2 on b")
    time.sleep(0.02)
    board.beat(0, "pid 1 on a")
    (rank, (where, seconds)) = next(iter(news(board, silent_seconds=0.01).silent.items()))
    assert (rank, where) == (1, "pid 2 on b") and seconds >= 0.02
    board.leave(1)
    assert not news(board, silent_seconds=0.01).silent.get(1)


def test_the_first_fault_stays_and_is_raised_as_what_it_was() -> None:
    board = Board()
    assert not board.has_fault()
    board.post_fault("StoreError", "disk full")
    board.post_fault("TrainingError", "because of that")
    assert board.has_fault()
    with pytest.raises(StoreError, match=r"^disk full$"):
        raise fault_of(news(board).fault or ("", ""))


def test_workers_hear_that_they_are_to_stop() -> None:
    board = Board()
    board.ask_to_stop()
    assert board.beat(0, "pid 1 on a") is True
