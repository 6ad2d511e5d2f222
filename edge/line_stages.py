"""A line's stages, as its configuration and its bundle say: what is done to each camera's frames.

Owns which file and key a refusal is about. What the stages do is `stages`'; what a certificate covers is `cameras`'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from edge.bundle import InputSpec, ModelBundle
from edge.camera import open_camera
from edge.cameras import calibration_of_line, segments_of_line, zones_of_line
from edge.challenge import Sample, find_samples, probe_name
from edge.config import CameraConfig, EdgeConfig
from edge.errors import BundleError, ConfigError
from edge.inference import Stages
from edge.opening import why_not_certified
from edge.rules import load_rules
from edge.stages.decide import Decide
from edge.stages.flatfield import flat_field_of
from edge.stages.measure import Measure
from edge.stages.preprocess import Preprocess, is_unscaled
from edge.stages.segment import Segment
from edge.stages.tile import Tiling, tiling_of

_T = TypeVar("_T")


@contextmanager
def named(where: Path, key: str) -> Iterator[None]:
    """Say which file and key a refusal is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {key}: {error}") from None


def make_stages(config: EdgeConfig, bundle: ModelBundle, where: Path) -> Stages:
    """The stages of a line as its configuration and its bundle say.

    Raises:
        ConfigError: the configuration asks for what the bundle cannot do.
        BundleError: the bundle's maps cannot be put together from tiles.
    """
    from edge.engines.registry import require_device

    with named(where, "engine.device"):
        require_device(config.engine.backend, config.engine.device, ConfigError)
    manifest, calibration = bundle.manifest, bundle.calibration
    if config.batching.max_batch > manifest.input.max_batch:
        raise ConfigError(
            f"{where}: batching.max_batch is {config.batching.max_batch}, bundle {config.bundle} was exported for at "
            f"most {manifest.input.max_batch}; write {manifest.input.max_batch} or less"
        )
    if why_not_certified(calibration, config.engine) is not None:
        calibration = msgspec.structs.replace(calibration, certified=False)
    measures = {camera.name: _measure(camera, where) for camera in config.cameras}
    calibration = calibration_of_line(config, calibration, flat_fields_of(measures))
    preprocess = {
        camera.name: _preprocess(config, camera, manifest.input, measures[camera.name], where)
        for camera in config.cameras
    }
    zones, segments = zones_of_line(config, calibration, manifest.map), segments_of_line(config, calibration)
    if config.challenge.dir is not None:
        # Samples take the way of their camera's frames, and are judged by its row, under another name.
        calibration = msgspec.structs.replace(calibration, cameras=_with_probes(calibration.cameras))
        measures, preprocess = _with_probes(measures), _with_probes(preprocess)
        zones, segments = _with_probes(zones), _with_probes(segments)
    return Stages(
        line=config.line,
        input=manifest.input,
        geometry=manifest.map,
        preprocess=preprocess,
        segment=Segment(calibration.pixel_threshold, max(1, config.segment.min_area_px or calibration.min_area_px)),
        decide=Decide(calibration, bundle.model_id),
        tiling=_tiling(config, bundle, where),
        zones=zones,
        segments=segments,
        measures=measures,
    )


def flat_fields_of(measures: Mapping[str, Measure]) -> dict[str, str | None]:
    """Which flat field corrects each camera's frames."""
    return {name: None if one.camera is None else one.camera.flat_field_id for name, one in measures.items()}


def _with_probes(by_camera: dict[str, _T]) -> dict[str, _T]:
    return by_camera | {probe_name(name): value for name, value in by_camera.items()}


def _preprocess(config: EdgeConfig, camera: CameraConfig, spec: InputSpec, measure: Measure, where: Path) -> Preprocess:
    known = measure.camera
    size, flat = None if known is None else known.size, flat_field_of(known)
    if flat is None or config.engine.flat_field == "host":
        return Preprocess(spec, camera.roi_xywh, size, flat)
    later = flat.over(camera.roi_xywh)
    height, width = later.gain.shape[:2]
    if not is_unscaled(spec, width, height):
        raise ConfigError(
            f'{where}: engine.flat_field = "device": the region of camera {camera.name} has {width} x {height} px, and '
            f"bundle {config.bundle} scales it to {spec.width} x {spec.height}, which must come after the flat field; "
            f'write "host", or a cameras.roi_xywh of the model\'s own size'
        )
    return Preprocess(spec, camera.roi_xywh, size, flat, later)


def _measure(camera: CameraConfig, where: Path) -> Measure:
    """The camera's calibration and rules, read and checked."""
    with named(where, f"cameras: {camera.name}: calibration"):
        known = None if camera.calibration is None else open_camera(Path(camera.calibration))
    with named(where, f"cameras: {camera.name}: rules"):
        rules = None if camera.rules is None else load_rules(Path(camera.rules))
        if rules is not None and rules.in_mm and not (known is not None and known.has_scale):
            raise ConfigError(
                f"{camera.rules}: {rules.in_mm} is in millimeters, but the camera has no scale; name a calibration "
                "that has one (`kizu camera --plane` or `--mm-per-px`), or give pixels"
            )
    return Measure(known, rules)


def _tiling(config: EdgeConfig, bundle: ModelBundle, where: Path) -> Tiling | None:
    spec = bundle.manifest.input
    try:
        tiling = tiling_of(spec, bundle.manifest.map)
    except BundleError as error:
        raise BundleError(f"{where}: bundle: {error}") from error
    for camera in config.cameras:
        if tiling is not None and camera.roi_xywh is not None and min(camera.roi_xywh[2:]) < spec.min_side_px:
            raise ConfigError(
                f"{where}: cameras: roi_xywh of {camera.name} is {camera.roi_xywh[2]} x {camera.roi_xywh[3]} px, but "
                f"bundle {config.bundle} takes regions at their own size, of at least {spec.min_side_px} px a side; "
                "make it larger"
            )
    return tiling


def find_challenge(config: EdgeConfig, where: Path) -> tuple[Sample, ...]:
    """The challenge's samples as they lie there now; none where there is no challenge.

    Raises:
        ConfigError: the folder is not as it should be.
    """
    if config.challenge.dir is None:
        return ()
    with named(where, "challenge.dir"):
        return find_samples(Path(config.challenge.dir), [camera.name for camera in config.cameras])
