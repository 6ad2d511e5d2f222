"""The simulated line's parts: photographs, configuration, daemon process, cameras, contact sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge.bundle import ModelBundle
from edge.commands.demo import thumbnail
from edge.config import load_config
from edge.demo.line import PHOTOS, DaemonProcess, SimulatedCamera, load_photos, write_config
from edge.demo.picture import choose, write_sheet
from edge.demo.session import Seen, Summary, run_session
from edge.errors import BundleError, CommandError, DataError, KizuError
from edge.images import read_image
from sample_events import sample_event


def seen(decision: str, index: int, mask: bool = False) -> Seen:
    photo = load_photos()[index]
    size = {"frame_height": photo.height, "frame_width": photo.width}
    event = sample_event(index, "cam", decision=decision, score=1.5, mask="inline" if mask else "none", **size)
    flaw = np.zeros((photo.height, photo.width), np.bool_)
    flaw[100:200, 100:200] = True
    return Seen(event, flaw if mask else None, photo, 0.05)


def test_the_belt_holds_every_test_photograph_and_mostly_good_ones() -> None:
    """Two good ones to each flawed one; all are shipped with the project."""
    belt = load_photos()

    assert {photo.path for photo in belt} == set(PHOTOS.glob("test/*/*.jpg"))
    assert sum(photo.good for photo in belt) == 2 * sum(not photo.good for photo in belt)


def test_the_shipped_photographs_are_few_megabytes() -> None:
    """A clone must stay small."""
    assert sum(path.stat().st_size for path in PHOTOS.rglob("*") if path.is_file()) <= 4_000_000


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    """A broken installation says so."""
    with pytest.raises(DataError, match="install kizu again"):
        load_photos(tmp_path)


def test_a_written_configuration_is_one_that_the_daemon_reads(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """Tables, arrays and strings come out as they went in."""
    path = write_config(tmp_path / "line.toml", tiny_bundle.path, ["a", "b"], window=3, batching={"max_wait_ms": 1.5})

    config = load_config(path)

    assert ([camera.name for camera in config.cameras], config.window) == (["a", "b"], 3)
    assert (config.batching.max_wait_ms, config.bundle) == (1.5, str(tiny_bundle.path))


def test_without_a_bundle_the_demo_says_how_to_make_one(tmp_path: Path) -> None:
    """Before a daemon is started."""
    with pytest.raises(BundleError, match="kizu train"):
        next(run_session(tmp_path / "none", "fake", 1.0, 4.0))


def test_a_daemon_that_ends_early_is_quoted(tmp_path: Path) -> None:
    """Its own last words are the best error message."""
    (tmp_path / "line.toml").write_text("speed = 3\n")

    with DaemonProcess(tmp_path / "line.toml") as daemon, pytest.raises(KizuError, match="ended with 2"):
        daemon.wait_until_ready(30)

    assert not daemon.running


def test_a_camera_without_a_daemon_ends_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It waits for credit, within bounds."""
    from edge.sender import CameraSender

    send = CameraSender.send_encoded
    monkeypatch.setattr(
        CameraSender, "send_encoded", lambda self, *a, timeout_s, **k: send(self, *a, timeout_s=0.1, **k)
    )
    camera = SimulatedCamera(f"ipc://{tmp_path}/nobody", "cam", load_photos(), 10.0)
    camera.start()
    camera.join(20)

    assert not camera.is_alive() and camera.sent == {}
    assert camera.error is not None and "no credit" in str(camera.error)


def test_a_frame_that_gets_no_answer_is_counted_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the account can say something other than 0."""
    from edge.demo import session

    photos = load_photos()
    camera = SimulatedCamera("ipc:///nowhere", "cam", photos, 1.0)
    camera.sent = {("cam", 1, 0): photos[0], ("cam", 1, 1): photos[1]}

    account = session._account([camera], {("cam", 1, 0): seen("accept", 0)}, 2.0)

    assert account == Summary(2, 1, 0, 0, lost=1, fps=0.5, latency_p50_ms=50.0, latency_p99_ms=50.0)


def test_the_thumbnail_shows_where_the_flaw_is() -> None:
    """Top left in the first character, nothing elsewhere; no mask, no dots."""
    mask = np.zeros((400, 400), np.bool_)
    mask[:50, :40] = True

    assert thumbnail(None) == "⠀⠀⠀⠀"
    assert thumbnail(mask) == "⠁⠀⠀⠀"
    assert thumbnail(np.ones((7, 9), np.bool_)) == "⣿⣿⣿⣿"


@pytest.mark.parametrize("name", ["sheet.png", "sheet.jpg"])
def test_the_contact_sheet_shows_photograph_mask_and_verdict(tmp_path: Path, name: str) -> None:
    """Different photographs only; the flaw is tinted red, the verdict's color is below."""
    events = [seen("accept", 0), seen("reject", 2, mask=True), seen("accept", 0), seen("accept", 1)]

    write_sheet(tmp_path / name, choose(events))

    sheet = read_image(tmp_path / name).astype(int)
    assert sheet.shape == (256 + 34 + 16, 3 * 264 + 8, 3)
    caption = sheet[8 + 256 + 30, [100, 364, 628]]
    assert [("reject" if red > green else "accept") for red, green, _ in caption].count("reject") == 1


def test_a_picture_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Before anything is started, in the command; here as well."""
    with pytest.raises(CommandError, match="must end in"):
        write_sheet(tmp_path / "sheet.gif", [seen("accept", 0)])
    with pytest.raises(CommandError, match="nothing to show"):
        write_sheet(tmp_path / "sheet.png", [])
