"""What PNG, JPEG, BMP and TIFF bytes claim, read without decoding a pixel.

Owns the parsing of headers and the question whether an image's end is there; limits on what is claimed belong to
`images`. Only kinds that cameras write are understood; everything else is refused here, so that the decoder's rarer
paths are never reached.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from edge.errors import ImageRefused

MAX_JPEG_SCANS = 64
"""Scans of a progressive JPEG, each of which costs a pass over all pixels; encoders write about ten."""

MAX_PARTS = 65_536
"""Chunks of a PNG or markers of a JPEG; more of them only keep the parser busy."""

MAX_TIFF_ENTRIES = 256
MAX_TIFF_PIECES = 65_536


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image claims: `channels` is 1 or 3 with alpha left out, `bits` those of one stored sample.

    `least_bytes` is the fewest bytes that can hold that many pixels in this kind; `complete` says that the end is
    there. `essence`, if not None, is the same picture without the parts that only cost time and memory.
    """

    kind: str
    width: int
    height: int
    channels: int
    bits: int
    complete: bool
    least_bytes: int = 0
    essence: bytes | None = None


def read_header(data: bytes | memoryview) -> ImageHeader:
    """Parse the header of `data`.

    Raises:
        ImageRefused: `format` for another kind, `truncated` when it ends within the header.
    """
    view = memoryview(data).cast("B")
    head = bytes(view[:8])
    for magic, parse in _PARSERS:
        if head.startswith(magic):
            try:
                return parse(view)
            except (struct.error, IndexError) as error:
                raise ImageRefused("truncated", f"{len(view)} bytes end within the image's header") from error
    if any(magic.startswith(head) for magic, _ in _PARSERS):
        raise ImageRefused("truncated", f"{len(view)} bytes end within the image's first marker")
    raise ImageRefused("format", f"bytes that open with {head.hex(' ')}, expected PNG, JPEG, BMP or TIFF")


# --- PNG (ISO/IEC 15948) ---------------------------------------------------------------------------------------------

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_SAMPLES = {0: (1, 1), 2: (3, 3), 3: (3, 1), 4: (1, 2), 6: (3, 4)}  # color type -> (channels, stored samples)
_PNG_BITS = {0: (1, 2, 4, 8), 2: (8,), 3: (1, 2, 4, 8), 4: (8,), 6: (8,)}
_PNG_ESSENTIAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")


def _png(view: memoryview) -> ImageHeader:
    length, kind, width, height, bits, color, _, _, interlace = struct.unpack_from(">I4sIIBBBBB", view, 8)
    if kind != b"IHDR" or length != 13 or color not in _PNG_SAMPLES:
        raise ImageRefused("format", "PNG whose first chunk is no valid IHDR")
    if bits not in _PNG_BITS[color]:
        raise ImageRefused("format", f"PNG with {bits} bits a sample of color type {color}, expected at most 8")
    channels, samples = _PNG_SAMPLES[color]
    complete, essence, packed = _png_chunks(view)
    # Deflate makes at most 1032 bytes of one; every line has a filter byte besides its pixels.
    raw = height * (1 + (width * samples * bits + 7) // 8) if not interlace else height * width * samples * bits // 8
    if complete and packed * 1032 < raw:
        raise ImageRefused("bomb", f"PNG of {width} x {height}: {packed} bytes of pixels cannot unpack to {raw}")
    return ImageHeader("PNG", width, height, channels, bits, complete, raw // 1032, essence)


def _png_chunks(view: memoryview) -> tuple[bool, bytes | None, int]:
    """Whether IEND is there, the PNG without ancillary chunks if it has any, and how many bytes of IDAT there are.

    Text and profile chunks are compressed too, so each may be a bomb of its own; animation, gamma, transparency and
    orientation would change pixels. None of them is passed on.
    """
    position, packed, extra = 8, 0, False
    kept = [(0, 8)]
    for _ in range(MAX_PARTS):
        if position + 12 > len(view):
            return False, None, packed
        length, kind = struct.unpack_from(">I4s", view, position)
        end = position + 12 + length
        if end > len(view):
            return False, None, packed
        if kind in _PNG_ESSENTIAL:
            kept.append((position, end))
        else:
            extra = True
        if kind == b"IDAT":
            packed += length
        if kind == b"IEND":
            essence = b"".join(view[start:stop] for start, stop in kept) if extra else None
            return True, essence, packed
        position = end
    raise ImageRefused("bomb", f"PNG of more than {MAX_PARTS} chunks")


# --- JPEG (ITU T.81) -------------------------------------------------------------------------------------------------

_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive Huffman
_JPEG_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_JPEG_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # within a scan: not a stuffed zero, not a restart


def _jpeg(view: memoryview) -> ImageHeader:
    position, scans = 2, 0
    frame: tuple[int, int, int, int] | None = None
    for _ in range(MAX_PARTS):
        if position + 2 > len(view):
            return _jpeg_header(frame, complete=False)
        if view[position] != 0xFF:
            raise ImageRefused("format", f"JPEG without a marker at byte {position}")
        marker = view[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0xD9:
            return _jpeg_header(frame, complete=scans > 0)
        if marker in _JPEG_OTHER_FRAMES:
            raise ImageRefused("format", f"JPEG of process 0x{marker:02X}, expected baseline or progressive Huffman")
        (length,) = struct.unpack_from(">H", view, position + 2)
        if length < 2:
            raise ImageRefused("format", f"JPEG segment of length {length} at byte {position}")
        if marker in _JPEG_FRAMES:
            if frame is not None:
                raise ImageRefused("format", "JPEG with two frame headers")
            bits, height, width, channels = struct.unpack_from(">BHHB", view, position + 4)
            frame = (width, height, channels, bits)
        position += 2 + length
        if marker == 0xDA:
            scans += 1
            if scans > MAX_JPEG_SCANS:
                raise ImageRefused("bomb", f"JPEG with more than {MAX_JPEG_SCANS} scans")
            found = _JPEG_NEXT_MARKER.search(view, position)
            if found is None:
                return _jpeg_header(frame, complete=False)
            position = found.start()
    raise ImageRefused("bomb", f"JPEG of more than {MAX_PARTS} markers")


def _jpeg_header(frame: tuple[int, int, int, int] | None, *, complete: bool) -> ImageHeader:
    if frame is None:
        if complete:
            raise ImageRefused("format", "JPEG without a frame header")
        raise ImageRefused("truncated", "JPEG that ends before its frame header")
    width, height, channels, bits = frame
    if bits != 8 or channels not in (1, 3):
        raise ImageRefused("format", f"JPEG with {channels} components of {bits} bits, expected 1 or 3 of 8")
    # Every 8 x 8 block of the finest component takes at least one bit, its DC code: fewer bytes cannot be a picture.
    return ImageHeader("JPEG", width, height, channels, bits, complete, width * height // 512)


# --- BMP -------------------------------------------------------------------------------------------------------------


def _bmp(view: memoryview) -> ImageHeader:
    offset, size, width, height, _, bits, compression = struct.unpack_from("<IIiiHHI", view, 10)
    if size < 40 or bits not in (8, 24, 32) or compression != 0:
        raise ImageRefused("format", f"BMP of {bits} bits, compression {compression}; expected 8, 24 or 32 plain")
    height = abs(height)  # negative: the top line comes first
    channels = 3
    if bits == 8:
        (colors,) = struct.unpack_from("<I", view, 46)
        colors = min(colors or 256, 256)
        palette = bytes(view[14 + size : 14 + size + 4 * colors])
        if palette[0::4] == palette[1::4] == palette[2::4]:
            channels = 1
    needed = offset + (max(width, 0) * bits + 31) // 32 * 4 * height
    return ImageHeader("BMP", width, height, channels, 8, len(view) >= needed)


# --- TIFF 6.0 --------------------------------------------------------------------------------------------------------

_TIFF_READ = frozenset({256, 257, 258, 259, 262, 273, 274, 277, 279, 322, 323, 324, 325})
_TIFF_TYPES = {1: "B", 3: "H", 4: "I"}
# Compression -> bytes that one byte can become, at most: none, LZW, deflate, packbits, deflate's older number.
_TIFF_PACKED = {1: 1, 5: 4096, 8: 1032, 32773: 128, 32946: 1032}


def _tiff(view: memoryview) -> ImageHeader:
    order = "<" if view[0] == 0x49 else ">"
    (directory,) = struct.unpack_from(f"{order}I", view, 4)
    tags = _tiff_tags(view, order, directory)
    width, height = tags.get(256, [0])[0], tags.get(257, [0])[0]
    bits, samples = tags.get(258, [1]), tags.get(277, [1])[0]
    compression, photometric = tags.get(259, [1])[0], tags.get(262, [-1])[0]
    if compression not in _TIFF_PACKED or set(bits) not in ({8}, {1}) or photometric not in (0, 1, 2, 3):
        raise ImageRefused(
            "format", f"TIFF of {bits[0]} bits, photometric {photometric}, compression {compression}; "
            "expected 8-bit gray or RGB, uncompressed, LZW, deflate or packbits"
        )  # fmt: skip
    if (photometric == 2) != (samples in (3, 4)) or (samples not in (1, 3, 4)) or tags.get(274, [1])[0] != 1:
        raise ImageRefused("format", f"TIFF with {samples} samples a pixel or turned axes, expected 1, 3 or 4 upright")
    tile_width, tile_height = tags.get(322, [0])[0], tags.get(323, [0])[0]
    # A tile may be larger than the image, and the decoder makes room for all of it.
    if tile_width * tile_height > 4 * max(width * height, 1024 * 1024):
        raise ImageRefused("bomb", f"TIFF of {width} x {height} in tiles of {tile_width} x {tile_height}")
    offsets, counts = tags.get(273) or tags.get(324) or [], tags.get(279) or tags.get(325) or []
    if not offsets or len(offsets) != len(counts):
        raise ImageRefused("format", "TIFF without the places of its strips or tiles")
    complete = all(start + count <= len(view) for start, count in zip(offsets, counts, strict=True))
    raw = (width * samples * bits[0] + 7) // 8 * height
    if complete and sum(counts) * _TIFF_PACKED[compression] < raw:
        raise ImageRefused("bomb", f"TIFF of {width} x {height}: {sum(counts)} bytes cannot unpack to {raw}")
    return ImageHeader("TIFF", width, height, 1 if photometric < 2 else 3, bits[0], complete)


def _tiff_tags(view: memoryview, order: str, directory: int) -> dict[int, list[int]]:
    """The whole-number tags of the first directory."""
    (entries,) = struct.unpack_from(f"{order}H", view, directory)
    if entries > MAX_TIFF_ENTRIES:
        raise ImageRefused("format", f"TIFF with {entries} tags, expected at most {MAX_TIFF_ENTRIES}")
    struct.unpack_from(f"{order}I", view, directory + 2 + 12 * entries)  # closes the directory: where the next one is
    tags: dict[int, list[int]] = {}
    for place in range(directory + 2, directory + 2 + 12 * entries, 12):
        tag, kind, count = struct.unpack_from(f"{order}HHI", view, place)
        if tag not in _TIFF_READ or kind not in _TIFF_TYPES or count == 0:
            continue
        if tag in tags:
            raise ImageRefused("format", f"TIFF with tag {tag} twice")
        if count > MAX_TIFF_PIECES:
            raise ImageRefused("format", f"TIFF with {count} values in tag {tag}, expected at most {MAX_TIFF_PIECES}")
        values = f"{order}{count}{_TIFF_TYPES[kind]}"
        inside = struct.calcsize(values) <= 4
        where = place + 8 if inside else struct.unpack_from(f"{order}I", view, place + 8)[0]
        tags[tag] = list(struct.unpack_from(values, view, where))
    return tags


_PARSERS = (
    (_PNG_MAGIC, _png), (b"\xff\xd8\xff", _jpeg), (b"BM", _bmp), (b"II*\x00", _tiff), (b"MM\x00*", _tiff),
)  # fmt: skip
