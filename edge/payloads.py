"""Payloads: the second part of a frame message <-> arrays, in every encoding of the wire.

Owns encodings, the limits on what a camera may send, color order and demosaicing. What is inside a PNG or JPEG is
judged by `images`; headers are `wire`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from edge import images
from edge.errors import ImageRefused

Buffer = bytes | bytearray | memoryview

_BAYER: Final = ("bayer_rggb8", "bayer_bggr8", "bayer_grbg8", "bayer_gbrg8")
RAW_CHANNELS: Final[Mapping[str, int]] = MappingProxyType(
    {"mono8": 1, "rgb8": 3, "bgr8": 3, **dict.fromkeys(_BAYER, 1)}
)
"""Bytes that a raw encoding's payload holds per pixel."""
ENCODINGS: Final = (*RAW_CHANNELS, "jpeg", "png")


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What a source accepts: pixels per side, pixels per image, bytes per encoded or raw payload."""

    max_side_px: int = 16384
    max_pixels: int = images.MAX_IMAGE_PIXELS
    max_payload_bytes: int = images.MAX_ENCODED_BYTES


def encode_image(image: NDArray[np.uint8], encoding: Literal["png", "jpeg", "raw"]) -> tuple[str, Buffer]:
    """Encode `image` (H, W), (H, W, 1) gray or (H, W, 3) RGB; return the wire's encoding and the payload.

    Raises:
        ImageRefused: `format`; another shape or type, or OpenCV could not encode it.
    """
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))):
        raise ImageRefused(
            "format", f"image {image.shape} {image.dtype}: expected (H, W), (H, W, 1) or (H, W, 3) uint8"
        )
    array = image[:, :, None] if image.ndim == 2 else image
    if encoding == "raw":
        return ("mono8" if array.shape[2] == 1 else "rgb8"), np.ascontiguousarray(array).tobytes()
    if encoding == "png":
        return "png", images.encode_png(array)
    return "jpeg", _encode_jpeg(array)


def _encode_jpeg(array: NDArray[np.uint8]) -> bytes:
    cv2 = images.cv2
    bgr = array if array.shape[2] == 1 else cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])
    if not done:
        raise ImageRefused("format", f"OpenCV could not encode an image of {array.shape} as JPEG")
    return data.tobytes()


def decode_payload(encoding: str, width: int, height: int, payload: Buffer, limits: FrameLimits) -> NDArray[np.uint8]:
    """Decode to (height, width, 1 gray or 3 RGB) uint8; mono8 and rgb8 are a view of `payload`, nothing is copied.

    Raises:
        ImageRefused: `format` (no known encoding, or another kind of payload), `size`, `length`, `truncated`, `bomb`.
    """
    if encoding not in ENCODINGS:
        raise ImageRefused("format", f"encoding {encoding[:40]!r}: expected one of {', '.join(ENCODINGS)}")
    if not (0 < width <= limits.max_side_px and 0 < height <= limits.max_side_px):
        raise ImageRefused("size", f"{width} x {height} px: each side is 1 to {limits.max_side_px}")
    if width * height > limits.max_pixels:
        raise ImageRefused("size", f"{width} x {height} px: at most {limits.max_pixels} pixels")
    size = memoryview(payload).nbytes
    if size > limits.max_payload_bytes:
        raise ImageRefused("length", f"payload of {size} bytes: at most {limits.max_payload_bytes}")
    if encoding in ("jpeg", "png"):
        return _decode_compressed(encoding, width, height, payload, limits)
    channels = RAW_CHANNELS[encoding]
    if size != width * height * channels:
        wanted = width * height * channels
        raise ImageRefused("length", f"{encoding} {width} x {height}: expected {wanted} bytes, got {size}")
    raw = np.frombuffer(payload, dtype=np.uint8).reshape(height, width, channels)
    return raw if encoding in ("mono8", "rgb8") else _to_rgb(raw, encoding)


def _decode_compressed(
    encoding: str, width: int, height: int, payload: Buffer, limits: FrameLimits
) -> NDArray[np.uint8]:
    data = memoryview(payload)
    signature = b"\xff\xd8\xff" if encoding == "jpeg" else b"\x89PNG\r\n\x1a\n"
    start = bytes(data[: len(signature)])
    if start != signature:
        raise ImageRefused("format", f"payload is no {encoding}: it starts with {start.hex()}")
    # Nothing larger than what the header states is ever decoded: a small header on a bomb is refused before OpenCV.
    image = images.decode_image(data, max_pixels=min(width * height, limits.max_pixels))
    if image.shape[:2] != (height, width):
        got = f"{image.shape[1]} x {image.shape[0]}"
        raise ImageRefused("size", f"header states {width} x {height} px, the {encoding} has {got}")
    return image


def _to_rgb(raw: NDArray[np.uint8], encoding: str) -> NDArray[np.uint8]:
    cv2 = images.cv2
    if encoding == "bgr8":
        return np.asarray(cv2.cvtColor(raw, cv2.COLOR_BGR2RGB), dtype=np.uint8)
    if min(raw.shape[:2]) < 2:
        raise ImageRefused("size", f"{raw.shape[1]} x {raw.shape[0]} px: a Bayer pattern needs at least 2 x 2")
    # OpenCV names a pattern by another corner than everybody else; these constants are the usual names.
    code = {
        "bayer_rggb8": cv2.COLOR_BayerRGGB2RGB,
        "bayer_bggr8": cv2.COLOR_BayerBGGR2RGB,
        "bayer_grbg8": cv2.COLOR_BayerGRBG2RGB,
        "bayer_gbrg8": cv2.COLOR_BayerGBRG2RGB,
    }[encoding]
    return np.asarray(cv2.cvtColor(raw, code), dtype=np.uint8)
