"""Runs a bundle's engine over image files and yields scores, maps and verdicts.

Owns the order and what happens to bad files. The way is the daemon's, piece by piece: decode, preprocess, tiles where
the bundle wants them, engine, map, decision. What the files are is `dataset`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calib.dataset import read_stored_image
from calib.progress import Advance
from edge.bundle import ModelBundle
from edge.errors import DataError, EngineError, ImageRefused
from edge.protocols import Engine, Ticket
from edge.stages.decide import Decide
from edge.stages.infer import to_map
from edge.stages.preprocess import Preprocess
from edge.stages.tile import TileInput, tiling_of
from edge.stages.zones import Zones
from edge.types import AnomalyMap, Frame, FrameId, ModelInput, Reason, Unreadable, Verdict

COLLECT_TIMEOUT_S = 120.0

NAMED = 5
"""Bad files listed in a refusal; the others are counted."""


@dataclass(frozen=True, slots=True, eq=False)
class Collected:
    """One file's answer; for a bad file the verdict is INCONCLUSIVE, `anomaly_map` None, and `problem` says why."""

    path: Path
    verdict: Verdict
    anomaly_map: AnomalyMap | None
    problem: str = ""


def collect(
    bundle: ModelBundle,
    engine: Engine,
    paths: Sequence[Path],
    *,
    skip_bad: bool = False,
    advance: Advance = lambda done: None,
    camera: str = "folder",
) -> Iterator[Collected]:
    """Yield the answer for each of `paths`, in order; FrameId.sequence is the place in `paths`.

    Region of interest, zones and thresholds are those of the bundle's calibration for `camera`.

    Each image, or each tile of one, is a batch of its own, `engine.spec.depth` of them in flight: a score then never
    depends on the images beside it, and on a CPU larger batches are no faster. A bad file (no image, damaged, of
    another shape than the model takes) is yielded as INCONCLUSIVE with `skip_bad`; without it, the first one ends the
    scoring, the remaining files are only looked at, and all bad ones are refused together.

    Raises:
        DataError: bad files without `skip_bad`; the first few are named.
        BundleError: the bundle's maps cannot be put together from tiles.
        EngineError: the engine failed, or gave scores that are not finite.
    """
    calibration = bundle.calibration.of(camera)
    preprocess = Preprocess(bundle.manifest.input, calibration.roi_xywh)
    zones = Zones(calibration.zones, bundle.manifest.map)
    tiling = tiling_of(bundle.manifest.input, bundle.manifest.map)
    decide = Decide(bundle.calibration, bundle.model_id)
    waiting: deque[tuple[Ticket, Path, Frame, ModelInput]] = deque()
    bad: list[str] = []

    def answer() -> Iterator[Collected]:
        """Take the oldest batch; nothing follows from a tile that was not its image's last."""
        ticket, path, frame, model_input = waiting.popleft()
        try:
            given, maps, scores = engine.collect(COLLECT_TIMEOUT_S)
            if given != ticket:
                raise EngineError(f"the engine answered ticket {given} where {ticket} was due")
            if isinstance(model_input, TileInput):
                stitch = model_input.stitch
                if not stitch.put(model_input.tile, maps[0]):
                    return
                anomaly_map = to_map(stitch.region, stitch.scores, stitch.score, stitch.plan.geometry)
            else:
                anomaly_map = to_map(model_input, maps[0], float(scores[0]), bundle.manifest.map)
        except EngineError as error:
            raise EngineError(f"{path}: {error}") from error
        anomaly_map = zones(anomaly_map, (frame.image.shape[0], frame.image.shape[1]))
        yield Collected(path, decide.verdict(frame, anomaly_map, ()), anomaly_map)

    for sequence, path in enumerate(paths):
        advance(sequence)
        prepared = _prepare(path, FrameId(camera, epoch=0, sequence=sequence, captured_ns=0), preprocess, zones)
        if isinstance(prepared, tuple):
            frame, model_input = prepared
            if bad:
                continue
            for part in (model_input,) if tiling is None else tiling.begin(model_input).tiles():
                while len(waiting) >= engine.spec.depth:
                    yield from answer()
                ticket = engine.submit(np.ascontiguousarray(part.pixels[None]))
                waiting.append((ticket, path, frame, part))
        elif skip_bad:
            while waiting:  # answers keep the order of the files
                yield from answer()
            reason = Reason.SHAPE if prepared.reason == "shape" else Reason.UNREADABLE
            yield Collected(path, decide.inconclusive(prepared, reason, prepared.detail), None, prepared.detail)
        else:
            bad.append(prepared.detail)
    while waiting:
        yield from answer()
    advance(len(paths))
    if bad:
        raise DataError(_refusal(bad, len(paths)))


def _prepare(path: Path, name: FrameId, preprocess: Preprocess, zones: Zones) -> tuple[Frame, ModelInput] | Unreadable:
    try:
        frame = Frame(name, read_stored_image(path))
    except ImageRefused as error:
        return Unreadable(name, error.reason, str(error))
    try:
        zones.require_size((frame.image.shape[0], frame.image.shape[1]))
        return frame, preprocess(frame)
    except ImageRefused as error:
        return Unreadable(name, "shape", f"{path}: {error}")


def _refusal(bad: list[str], count: int) -> str:
    shown = "\n".join(f"  {problem}" for problem in bad[:NAMED])
    more = f"\n  and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return (
        f"{len(bad)} of {count} files cannot be inspected:\n{shown}{more}\n"
        "take them out, or leave them out of the figures with --skip-bad-images"
    )
