"""Encoded images <-> arrays: the only door through which picture bytes reach OpenCV.

Owns decoding with its guards (size, completeness, kind), reading image files, and writing PNG masks and float32 TIFF
maps. What a header claims is found out by `image_headers` before OpenCV sees a byte. Pictures come out as the sensor
frame is stored: EXIF orientation is ignored, so that a mask and its picture always share their axes. Modules that use
OpenCV import `cv2` from here, so that its own limits are set before it loads.
"""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.errors import ImageRefused
from edge.image_headers import ImageHeader, read_header

MAX_IMAGE_PIXELS = 64 * 1024 * 1024
MAX_IMAGE_SIDE = 65_535
MAX_ENCODED_BYTES = 64 * 1024 * 1024

# OpenCV reads these once, when it loads. Its defaults admit 2**30 pixels: a 631-byte JPEG then costs 4 GiB and 8 s.
os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MAX_IMAGE_PIXELS)
os.environ["OPENCV_IO_MAX_IMAGE_WIDTH"] = str(MAX_IMAGE_SIDE)
os.environ["OPENCV_IO_MAX_IMAGE_HEIGHT"] = str(MAX_IMAGE_SIDE)

import cv2  # noqa: E402

__all__ = [
    "IMAGE_SUFFIXES", "MAX_ENCODED_BYTES", "MAX_IMAGE_PIXELS", "MAX_IMAGE_SIDE", "cv2", "decode_image",
    "encode_mask_png", "encode_png", "read_image", "sniff", "write_atomically", "write_tiff_float32",
]  # fmt: skip

IMAGE_SUFFIXES: frozenset[str] = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})


def sniff(data: bytes | memoryview, max_pixels: int = MAX_IMAGE_PIXELS) -> ImageHeader:
    """What `data` claims to be, from its header alone; cheap, and safe on any bytes.

    Raises:
        ImageRefused: `format` (not PNG, JPEG, BMP or TIFF as cameras write them), `size` (empty, or too many bytes),
            `bomb` (more pixels than `max_pixels`, or than its bytes can hold), `truncated` (its end is missing).
    """
    if not 0 < len(data) <= MAX_ENCODED_BYTES:
        raise ImageRefused("size", f"{len(data)} encoded bytes, expected 1 to {MAX_ENCODED_BYTES}")
    header = read_header(data)
    claim = f"{header.kind} of {header.width} x {header.height}"
    if header.width < 1 or header.height < 1:
        raise ImageRefused("size", f"{claim}: an image has at least one pixel")
    if header.width * header.height > max_pixels or max(header.width, header.height) > MAX_IMAGE_SIDE:
        raise ImageRefused("bomb", f"{claim}: at most {max_pixels} pixels and {MAX_IMAGE_SIDE} on a side are admitted")
    if not header.complete:
        raise ImageRefused("truncated", f"{claim}: {len(data)} bytes end before the image does")
    if len(data) < header.least_bytes:
        raise ImageRefused("bomb", f"{claim} needs at least {header.least_bytes} bytes, it has {len(data)}")
    return header


def decode_image(
    data: bytes | memoryview, channels: int | None = None, max_pixels: int = MAX_IMAGE_PIXELS
) -> NDArray[np.uint8]:
    """Decode PNG, JPEG, BMP or TIFF to (H, W, C) uint8, C = 1 gray or 3 RGB; alpha is dropped.

    `channels` None keeps what is stored, 1 makes luma (BT.601), 3 replicates gray. Trailing bytes after a JPEG's or
    PNG's end are tolerated. A JPEG whose end marker is there but whose inside is damaged decodes to what libjpeg makes
    of it: OpenCV does not pass its warnings on.

    Raises:
        ImageRefused: see `sniff`; also `format` when the decoder gives up.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels is {channels}, expected None, 1 or 3")
    header = sniff(data, max_pixels)
    flag = cv2.IMREAD_GRAYSCALE if header.channels == 1 else cv2.IMREAD_COLOR_RGB
    payload = np.frombuffer(data if header.essence is None else header.essence, np.uint8)
    try:
        decoded = cv2.imdecode(payload, flag | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise ImageRefused("format", f"{header.kind} that OpenCV refuses: {error.err}") from error
    if decoded is None:
        raise ImageRefused("format", f"damaged {header.kind} of {header.width} x {header.height}: it cannot be decoded")
    if decoded.shape[:2] != (header.height, header.width) or decoded.dtype != np.uint8:
        raise ImageRefused("format", f"{header.kind} decodes to {decoded.shape} {decoded.dtype}, unlike its header")
    if header.channels == 3 and channels == 1:
        decoded = cv2.cvtColor(decoded, cv2.COLOR_RGB2GRAY)
    elif header.channels == 1 and channels == 3:
        decoded = cv2.cvtColor(decoded, cv2.COLOR_GRAY2RGB)
    return np.asarray(decoded, np.uint8).reshape(header.height, header.width, -1)


def read_image(path: Path, channels: int | None = None) -> NDArray[np.uint8]:
    """`decode_image` of a file.

    Raises:
        ImageRefused: as `decode_image`, or `format` when the file cannot be read; the message names the path.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_ENCODED_BYTES + 1)
        return decode_image(data, channels)
    except ImageRefused as error:
        raise ImageRefused(error.reason, f"{path}: {error}") from error
    except OSError as error:
        raise ImageRefused("format", f"{path}: cannot be read ({error.strerror})") from error


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """PNG of (H, W), (H, W, 1) gray or (H, W, 3) RGB uint8.

    Raises:
        ValueError: another shape or dtype.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise ValueError(f"a PNG is made of (H, W), (H, W, 1) or (H, W, 3) uint8, not {image.shape} {image.dtype}")
    if image.ndim == 3 and image.shape[2] == 3:
        image = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), np.uint8)
    return cv2.imencode(".png", image)[1].tobytes()


def encode_mask_png(mask: NDArray[np.bool_]) -> bytes:
    """1-bit gray PNG of `mask` (H, W) bool, set pixels white; written by hand, because it is small and exact.

    Raises:
        ValueError: not (H, W) bool, or empty.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_ or mask.size == 0:
        raise ValueError(f"a mask is (H, W) bool with at least one pixel, not {mask.shape} {mask.dtype}")
    height, width = mask.shape
    packed = np.packbits(mask, axis=1)
    lines = np.zeros((height, packed.shape[1] + 1), np.uint8)  # every line opens with its filter type: 0, none
    lines[:, 1:] = packed
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def write_tiff_float32(path: Path, values: NDArray[np.float32]) -> None:
    """Write (H, W) float32 as an uncompressed TIFF, whole or not at all.

    Raises:
        ValueError: another shape or dtype.
        OSError: the file cannot be written.
    """
    if values.ndim != 2 or values.dtype != np.float32 or values.size == 0:
        raise ValueError(f"a map is (H, W) float32 with at least one pixel, not {values.shape} {values.dtype}")
    ok, encoded = cv2.imencode(".tiff", values, [cv2.IMWRITE_TIFF_COMPRESSION, 1])
    if not ok:
        raise OSError(f"{path}: OpenCV cannot encode a {values.shape} float32 TIFF")
    write_atomically(path, encoded.tobytes())


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step, so that no reader ever sees half a file.

    Raises:
        OSError: the folder is missing or full.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)  # mkstemp's 0600 would hide the file from the people it is for
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
