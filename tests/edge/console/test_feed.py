"""Feed: follows a real log, publisher and replay server through everything that can happen to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from console_line import Line, blob
from edge.clock import SystemClock
from edge.console.board import Board
from edge.console.feed import BACKLOG, Feed, Sources
from edge.console.shown import Health
from edge.errors import ConfigError

PATIENCE_S = 20.0


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with Line(tmp_path) as made:
        yield made


def follow(line: Line, *, replay: bool = True) -> tuple[Feed, Board]:
    board = Board(SystemClock())
    return Feed(Sources(line.events, line.replay if replay else None), board), board


def until(condition: Callable[[], bool]) -> None:
    """Bounded; what is waited for comes, or the test fails."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def ids(board: Board) -> list[str]:
    return [one.id for one in board.delta(-1, -1).rejects]


def health(board: Board) -> Health:
    found = board.delta(-1, -1, health=True).health
    assert found is not None
    return found


def connected(line: Line, board: Board) -> None:
    """Wait for a head, so that what follows is heard."""
    until(lambda: health(board).heard and health(board).away_s is None)


@pytest.mark.parametrize("replay", [True, False])
def test_an_event_comes_with_its_outline(line: Line, replay: bool) -> None:
    """With and without the log."""
    feed, board = follow(line, replay=replay)
    with feed:
        connected(line, board)
        line.judge("cam1", "reject", blob())
        until(lambda: ids(board) == ["cam1/7/0"])

    assert board.delta(-1, -1).rejects[0].outline.startswith("M")


def test_a_page_opens_with_a_past_where_the_log_can_be_asked(line: Line) -> None:
    """What was rejected before the console came is on the strip."""
    earlier = [line.judge("cam1", "reject").id for _ in range(5)]
    feed, board = follow(line)
    with feed:
        until(lambda: ids(board) == earlier)


def test_a_past_is_bounded(line: Line) -> None:
    """A log of a month is not read from its beginning."""
    for _ in range(BACKLOG + 300):
        line.judge("cam1")
    last = line.judge("cam2", "reject").id
    line.flush()
    feed, board = follow(line)
    with feed:
        until(lambda: ids(board) == [last])

    assert board.delta(-1, -1).number <= BACKLOG + 1


def test_the_daemon_goes_and_comes_and_nothing_is_missed(line: Line) -> None:
    """It is away with a beginning; what it judged unheard is fetched when it is back."""
    feed, board = follow(line)
    with feed:
        connected(line, board)
        line.stop()
        until(lambda: health(board).away_s is not None)
        line.start()
        judged = [line.judge("cam1", "reject").id for _ in range(50)]
        until(lambda: ids(board) == judged)
        connected(line, board)

    assert health(board).lost == 0


def test_a_console_that_starts_before_its_daemon_waits_for_it(line: Line) -> None:
    """Away since the start, then live."""
    line.stop()
    feed, board = follow(line)
    with feed:
        until(lambda: health(board).away_s is not None)
        line.start()
        connected(line, board)
        judged = line.judge("cam1", "reject").id
        until(lambda: judged in ids(board))


def test_a_wiped_log_is_another_log(line: Line) -> None:
    """The page says so and goes on with the new one; nothing counts as lost."""
    feed, board = follow(line)
    with feed:
        line.judge("cam1", "reject")
        until(lambda: len(ids(board)) == 1)
        line.stop()
        line.wipe()
        line.start()
        again = line.judge("cam2", "reject").id
        until(lambda: again in ids(board))
        until(lambda: health(board).log_replaced_s is not None)

    assert health(board).logs_replaced == 1 and health(board).lost == 0


def test_a_burst_of_thousands_arrives_whole(line: Line) -> None:
    """Faster than the publisher's queue: what is dropped there, the log gives."""
    feed, board = follow(line)
    with feed:
        connected(line, board)
        for number in range(3000):
            line.judge(f"cam{number % 20}")
        last = line.judge("cam0", "reject").id
        until(lambda: ids(board) == [last])
        until(lambda: health(board).lag == 0)

    assert sum(1 for _ in board.delta(-1, -1).tiles) == 20 and health(board).lost == 0


def test_a_mask_of_a_whole_sensor_is_outlined(line: Line) -> None:
    """Twenty-five megapixels, too large to be published: fetched from the log, reduced, bounded."""
    feed, board = follow(line)
    noise = np.zeros((5000, 5000), np.bool_)
    noise[1000:4000, 1000:4000] = np.random.default_rng(3).random((3000, 3000)) > 0.5
    with feed:
        connected(line, board)
        line.judge("cam1", "reject", noise)
        until(lambda: len(ids(board)) == 1)

    assert 0 < len(board.delta(-1, -1).rejects[0].outline) < 20_000


def test_an_address_off_this_host_has_to_be_stated() -> None:
    """As for every subscriber; refused before anything is opened."""
    with pytest.raises(ConfigError, match="not on this host"):
        Feed(Sources("tcp://10.0.0.7:5551"), Board(SystemClock()))


def test_an_error_that_nobody_foresaw_ends_the_feed_and_is_shown(line: Line) -> None:
    """A page that stands still must not look alive."""
    feed, board = follow(line)

    def broken(*values: object, **options: object) -> None:
        raise RuntimeError("planted")

    board.take = broken  # type: ignore[method-assign]
    with feed:
        connected(line, board)
        line.judge("cam1")
        until(lambda: feed.failure is not None)

    assert "planted" in health(board).failure
