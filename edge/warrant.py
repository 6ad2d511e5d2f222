"""Warrant: whether a model's certificate still holds on this line, remembered over restarts.

Owns one watch a camera, the note on disk and what verdicts say from then on. The test is `stages.watch`; who is told is
the daemon's business. A warrant that is void stays void for its `model_id`: a new certificate makes another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec

from edge.bundle import ScoreCalibration
from edge.errors import ConfigError
from edge.part_scores import NamedParts, part_scores
from edge.protocols import Clock
from edge.stages.watch import Watch, WatchSettings
from edge.types import Verdict

_MAX_NOTE_BYTES: Final = 64 * 1024


class Void(msgspec.Struct, frozen=True):
    """Why and when: `alarm` on `camera` after `parts` of it, at `at_ns` Unix time."""

    model_id: str
    camera: str
    alarm: str
    parts: int
    at_ns: int


class Warrant:
    """Watches every judged part of one model; one thread, except `void`, which may be read from any.

    `path` is where a void warrant is noted. `on_void` is told once, in the observing thread; `on_unnamed` once a
    camera, with its first frame without a part_id where the certificate counts parts by it: such frames are not
    watched.

    Raises:
        ConfigError: the note on disk cannot be read, or is none.
    """

    def __init__(
        self,
        path: Path,
        calibration: ScoreCalibration,
        model_id: str,
        cameras: Collection[str],
        settings: WatchSettings,
        clock: Clock,
        *,
        on_void: Callable[[Void], None] = lambda void: None,
        on_unnamed: Callable[[str], None] = lambda camera: None,
    ) -> None:
        self._path, self._model_id, self._clock, self._on_void = path, model_id, clock, on_void
        self._on_unnamed = on_unnamed
        rows = {camera: calibration.of(camera) for camera in cameras}
        self._watches = {
            # Of two cameras of one line, each breaks ties by draws of its own.
            camera: Watch(row.scores, row.threshold, settings, seed=seed)
            for seed, (camera, row) in enumerate(rows.items())
            if row.certified
        }
        self._parts = {camera: part_scores(calibration) for camera in self._watches}
        self.void = self._noted()

    def stamp(self, verdict: Verdict) -> Verdict:
        """Let the watch look at a verdict; the same, but not certified, if the warrant is void by now."""
        camera = verdict.frame_id.camera
        if self.void is None and camera in self._watches:
            parts = self._parts[camera]
            for score in parts.add(verdict):
                self._observe(camera, score)
            if isinstance(parts, NamedParts) and parts.unnamed == 1 and verdict.part_id is None:
                self._on_unnamed(camera)
        return verdict if self.void is None else replace(verdict, certified=False)

    def evidence(self, camera: str) -> float:
        """0 to 1: how far the camera's watch is on the way to an alarm; 0 where nothing is certified."""
        if self.void is not None:
            return 1.0
        return self._watches[camera].evidence if camera in self._watches else 0.0

    def _observe(self, camera: str, score: float) -> None:
        if self.void is not None:
            return
        watch = self._watches[camera]
        alarm = watch.observe(score)
        if alarm is not None:
            self.void = Void(self._model_id, camera, alarm.value, watch.parts, self._clock.wall_ns())
            self._note(self.void)
            self._on_void(self.void)

    def _noted(self) -> Void | None:
        try:
            data = self._path.read_bytes()[: _MAX_NOTE_BYTES + 1]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self._path}: {error.strerror}; it says which certificates are void") from None
        try:
            notes = msgspec.json.decode(data, type=list[Void])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{self._path} is no note of void certificates: {error}; look what it is, and delete it only if the "
                "certificate was made anew"
            ) from None
        return next((note for note in notes if note.model_id == self._model_id), None)

    def _note(self, void: Void) -> None:
        """Added to those of other models, in one step, on disk before anybody is told."""
        notes = [void]
        if self._path.exists():
            notes = [*msgspec.json.decode(self._path.read_bytes(), type=list[Void])[-63:], void]
        aside = self._path.with_name(f"{self._path.name}.new")
        with aside.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(notes)))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self._path)
