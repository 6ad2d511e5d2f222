"""Frames larger than the model over real sockets, through a real engine: the verdict is the whole frame's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from edge import daemon
from edge.bundle import InputSpec, MapGeometry, ModelBundle
from edge.config import CameraConfig, EdgeConfig, load_config
from edge.daemon import Ready, StopRequest
from edge.demo.line import write_config
from edge.errors import BundleError, ConfigError
from edge.events import DefectEvent
from edge.images import decode_image
from edge.sender import CameraSender
from edge.sinks.event_log import EventLog

TILED = InputSpec(32, 32, 1, max_batch=4, fit="tile", min_side_px=8)
SIDE = 96
"""Three tiles of the tiny bundle's model."""


@pytest.fixture(scope="module")
def bundle(
    make_bundle: Callable[..., ModelBundle], tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory
) -> ModelBundle:
    """The tiny model for frames of any size; the spot below scores 1.7, gray 0.06."""
    calibration = msgspec.structs.replace(tiny_bundle.calibration, threshold=0.5, pixel_threshold=0.5)
    return make_bundle(tmp_path_factory.mktemp("tiled") / "bundle", input=TILED, calibration=calibration)


def config_of(folder: Path, bundle: ModelBundle, **changes: object) -> EdgeConfig:
    return load_config(write_config(folder / "line.toml", bundle.path, ["cam"], **changes))


def judged(config: EdgeConfig, pictures: list[NDArray[np.uint8]]) -> list[tuple[DefectEvent, bytes | None]]:
    """Serve `pictures` to a daemon as camera `cam`, and return what its log says about them."""
    stop = StopRequest()
    helper: list[threading.Thread] = []

    def send(ready: Ready) -> None:
        try:
            with CameraSender(ready.frames_address, "cam") as sender:
                for picture in pictures:
                    sender.send(picture, encoding="raw", timeout_s=20)
                assert sender.drain(20) == 0
        finally:
            stop.set()

    def on_ready(ready: Ready) -> None:
        helper.append(threading.Thread(target=send, args=(ready,)))
        helper[0].start()

    daemon.serve(config, Path("line.toml"), stop, on_ready=on_ready)
    helper[0].join(20)
    log = EventLog(Path(config.log.path), daemon.SystemClock())
    try:
        return log.read_since(0, 100)
    finally:
        log.close()


def good_and_flawed() -> list[NDArray[np.uint8]]:
    """Gray with a little noise, and the same with a bright spot where the second and third row of tiles meet."""
    good = np.random.default_rng(4).integers(120, 137, (SIDE, SIDE), dtype=np.uint8)
    flawed = good.copy()
    flawed[54:60, 30:36] = 255
    return [good, flawed]


def test_a_frame_of_three_tiles_a_side_is_judged_by_the_whole_frames_map(
    tmp_path: Path, bundle: ModelBundle, make_model: Callable[..., bytes]
) -> None:
    """The same network exported for 96 px gives the very scores, and the mask is where the spot is."""
    pictures = good_and_flawed()
    session = onnxruntime.InferenceSession(make_model(SIDE), providers=["CPUExecutionProvider"])
    _, whole = session.run(None, {"frames": np.stack(pictures)[:, :, :, None]})

    found = judged(config_of(tmp_path, bundle), pictures)

    events = [event for event, _ in found]
    assert [(event.decision, event.reason) for event in events] == [("accept", "score"), ("reject", "score")]
    assert [event.score for event in events] == pytest.approx(whole.tolist(), abs=1e-5)
    assert found[0][1] is None and found[1][1] is not None
    rows, columns = np.nonzero(decode_image(found[1][1])[:, :, 0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((54, 59, 30, 35), abs=8)


def test_one_line_takes_frames_of_several_sizes(tmp_path: Path, bundle: ModelBundle) -> None:
    """Each at its own resolution, down to less than a tile; below a receptive field it is of another shape."""
    sizes = [(96, 96), (32, 32), (33, 150), (20, 20), (7, 50), (200, 64)]

    found = judged(config_of(tmp_path, bundle), [np.full(size, 128, np.uint8) for size in sizes])

    answers = {event.frame_sequence: (event.decision, event.reason) for event, _ in found}
    assert answers == dict.fromkeys([0, 1, 2, 3, 5], ("accept", "score")) | {4: ("inconclusive", "shape")}


def test_check_refuses_a_tiling_that_cannot_be(
    tmp_path: Path, bundle: ModelBundle, make_bundle: Callable[..., ModelBundle]
) -> None:
    """A region of interest below the smallest side, and a map that does not fill its tile: before the line starts."""
    config = config_of(tmp_path, bundle)
    small = msgspec.structs.replace(config, cameras=(CameraConfig("cam", (10, 10, 60, 7)),))
    gaps = make_bundle(tmp_path / "gaps", input=TILED, map=MapGeometry(14, 14, 2.0, 4.5, 4.5))

    with pytest.raises(ConfigError, match=r"line.toml: cameras: roi_xywh of cam is 60 x 7 px.*at least 8 px"):
        daemon.check(small, Path("line.toml"))
    with pytest.raises(BundleError, match=r"line.toml: bundle: .*tiles would not join"):
        daemon.check(config_of(tmp_path, gaps), Path("line.toml"))
