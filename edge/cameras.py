"""What each camera of a line is judged by: its row of the calibration, its zones, its smallest region.

Owns what a certificate covers: the region of interest and the flat field it was made with, and no others. Stages come
from `stages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from edge.bundle import CameraThresholds, MapGeometry, ScoreCalibration
from edge.config import EdgeConfig
from edge.stages.segment import Segment
from edge.stages.zones import Zones

FlatFields = Mapping[str, str | None]
"""`CameraCalibration.flat_field_id` by camera; one that is missing has none."""


def calibration_of_line(
    config: EdgeConfig, calibration: ScoreCalibration, flat_fields: FlatFields = MappingProxyType({})
) -> ScoreCalibration:
    """`calibration` as far as it holds here: a camera with another region or flat field loses its certificate.

    Both change what a part looks like to the model; nobody vouches for scores of another one.
    """
    if not (lost := uncertified(config, calibration, flat_fields)):
        return calibration
    table = {camera.name: _row(calibration.of(camera.name), camera.name not in lost) for camera in config.cameras}
    certified = calibration.certified and len(lost) < len(config.cameras)
    return msgspec.structs.replace(calibration, certified=certified, cameras=table)


def uncertified(
    config: EdgeConfig, calibration: ScoreCalibration, flat_fields: FlatFields = MappingProxyType({})
) -> dict[str, str]:
    """{camera: why} for those that a certified calibration does not cover; empty for a provisional one."""
    if not calibration.certified:
        return {}
    lost = {}
    for camera in config.cameras:
        one = calibration.of(camera.name)
        if not one.certified:
            lost[camera.name] = "the certificate does not name this camera; calibrate with its pictures"
        elif one.roi_xywh != camera.roi_xywh:
            lost[camera.name] = (
                f"the certificate is about roi_xywh {_region(one.roi_xywh)}, the line inspects "
                f"{_region(camera.roi_xywh)}; calibrate with `--line` and this file"
            )
        elif one.flat_field != flat_fields.get(camera.name):
            lost[camera.name] = (
                f"the certificate is about pictures {_corrected(one.flat_field)}, the line's frames are "
                f"{_corrected(flat_fields.get(camera.name))}; calibrate with `--line`, this file and pictures that "
                "`kizu correct` made"
            )
    return lost


def zones_of_line(config: EdgeConfig, calibration: ScoreCalibration, geometry: MapGeometry) -> dict[str, Zones]:
    """Of the cameras that have some.

    Raises:
        BundleError: the map cannot have zones.
    """
    rows = {camera.name: calibration.of(camera.name).zones for camera in config.cameras}
    return {name: Zones(zones, geometry) for name, zones in rows.items() if zones}


def segments_of_line(config: EdgeConfig, calibration: ScoreCalibration) -> dict[str, Segment]:
    """Of the cameras in the calibration's table; the configuration's smallest region comes before theirs."""
    least = config.segment.min_area_px
    return {
        camera: Segment(row.pixel_threshold, max(1, least or row.min_area_px))
        for camera, row in calibration.cameras.items()
    }


def _row(calibration: ScoreCalibration, certified: bool) -> CameraThresholds:
    return CameraThresholds(
        threshold=calibration.threshold,
        pixel_threshold=calibration.pixel_threshold,
        min_area_px=calibration.min_area_px,
        scores=calibration.scores,
        roi_xywh=calibration.roi_xywh,
        zones=calibration.zones,
        certified=certified,
        flat_field=calibration.flat_field,
    )


def _region(roi: tuple[int, int, int, int] | None) -> str:
    return "the whole frame" if roi is None else str(list(roi))


def _corrected(flat_field: str | None) -> str:
    return "as the camera sends them" if flat_field is None else f"corrected by the flat field {flat_field[:12]}"
