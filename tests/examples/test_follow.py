"""The C and JavaScript followers against a real log: each event once and in order, across a restart of the daemon."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge.clock import SystemClock
from edge.sinks.event_log import EventLog
from edge.sinks.publisher import Publisher
from edge.sinks.replay import ReplayServer
from sample_events import sample_event

EXAMPLES = Path(__file__).parents[2] / "examples"
Command = Callable[[], list[str]]


@pytest.fixture(scope="session")
def c_follower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (apt-get install gcc)")
    binary = tmp_path_factory.mktemp("c") / "follow"
    source = str(EXAMPLES / "follow.c")
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    done = subprocess.run(["cc", *flags, "-o", str(binary), source, "-lzmq"], capture_output=True, text=True)
    if "zmq.h" in done.stderr or "-lzmq" in done.stderr:
        pytest.skip("libzmq's headers are not installed (apt-get install libzmq3-dev)")
    assert done.returncode == 0, done.stderr
    return binary


@pytest.fixture(scope="session")
def js_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with npm's `zeromq` in it; KIZU_NODE_MODULES_OF names one that is there already."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node or npm (apt-get install nodejs npm)")
    if given := os.environ.get("KIZU_NODE_MODULES_OF"):
        return Path(given)
    folder = tmp_path_factory.mktemp("js")
    install = ["npm", "install", "--no-fund", "--no-audit", "--prefer-offline", "zeromq@6"]
    try:
        done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip("npm found no registry within 60 s")
    loads = subprocess.run(["node", "-e", 'require("zeromq")'], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0 or loads.returncode != 0:
        pytest.skip(f"npm's zeromq cannot be installed here: {(done.stderr or loads.stderr)[-300:]}")
    return folder


class Line:
    """Log, publisher and replay at addresses that stay."""

    def __init__(self, folder: Path) -> None:
        self.log = EventLog(folder / "log.db", SystemClock())
        self.addresses = [f"ipc://{folder}/{name}" for name in ("events", "replay")]
        self.publisher = Publisher(self.addresses[0], "line-a", SystemClock(), head=(self.log.epoch, self.log.head))
        self.replay = ReplayServer(self.addresses[1], self.log)

    def judge(self, frames: range) -> None:
        for frame in frames:
            self.log.append(sample_event(frame), b"mask", self.publisher.publish)
        self.log.flush(10)
        self.publisher.tick()

    def close(self) -> None:
        self.replay.close()
        self.publisher.close()
        self.log.close()


@pytest.fixture(params=["c", "javascript"])
def command(request: pytest.FixtureRequest) -> Iterator[tuple[list[str], Path]]:
    if request.param == "c":
        binary = request.getfixturevalue("c_follower")
        yield [str(binary)], binary.parent
    else:
        yield ["node", str(EXAMPLES / "follow.mjs")], request.getfixturevalue("js_folder")


def test_a_follower_in_another_language_prints_every_event_once_and_in_order(
    command: tuple[list[str], Path], tmp_path: Path
) -> None:
    """300 logged before it comes, 50 while it listens, 50 after the daemon was started again."""
    line = Line(tmp_path)
    line.judge(range(300))
    follower = subprocess.Popen(
        [*command[0], *line.addresses, "400"], cwd=command[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert follower.stdout is not None
        first = [follower.stdout.readline() for _ in range(300)]
        line.judge(range(300, 350))
        second = [follower.stdout.readline() for _ in range(50)]
        line.close()
        line = Line(tmp_path)
        line.judge(range(350, 400))
        rest, errors = follower.communicate(timeout=60)
    finally:
        follower.kill()
        line.close()

    printed = [*first, *second, *rest.splitlines()]
    assert [int(text.split()[0]) for text in printed] == list(range(1, 401)), errors
    assert all(f'"log_sequence":{at}' in text for at, text in enumerate(printed, 1))
    assert follower.returncode == 0 and errors == ""
