"""Standstill: notices a camera that repeats one picture.

A sensor's noise makes each picture another one, so the same bytes again and again are a buffer that is sent again, not
a part; judging them would accept whatever passes by. Owns the comparison; who is told is the pipeline's matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge.types import Frame


@dataclass(slots=True)
class _Last:
    pixels: bytes
    shape: tuple[int, ...]
    times: int


class Standstill:
    """Call it with every frame of a camera, in order, from one thread.

    `limits` by camera: from how many pictures in a row that are the same byte for byte its frames count as frozen. It
    keeps one picture of each camera that is listed; the others cost nothing.
    """

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._limits = dict(limits)
        self._last: dict[str, _Last] = {}

    def __call__(self, frame: Frame) -> int:
        """How often in a row this picture has come, if that is too often; else 0."""
        camera = frame.id.camera
        limit = self._limits.get(camera)
        if limit is None:
            return 0
        last = self._last.get(camera)
        # A live camera's pictures differ within a few bytes, where the comparison ends.
        if last is not None and last.shape == frame.image.shape and last.pixels == frame.image.data.cast("B"):
            last.times += 1
        else:
            # A copy: the frame may lie in a ring that is written again.
            self._last[camera] = last = _Last(frame.image.tobytes(), frame.image.shape, 1)
        return last.times if last.times >= limit else 0
