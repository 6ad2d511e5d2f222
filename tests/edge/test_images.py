"""The door through which picture bytes come in: what is admitted, and all that is turned away before OpenCV sees it."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edge import image_headers, images
from edge.errors import ImageRefused
from edge.images import cv2, decode_image, encode_mask_png, encode_png, read_image, sniff, write_tiff_float32

PHOTOS = Path(__file__).parents[2] / "edge" / "demo" / "photos"
PNG = b"\x89PNG\r\n\x1a\n"
rng = np.random.default_rng(7)
COLOR = rng.integers(0, 256, (31, 45, 3), dtype=np.uint8)
GRAY = COLOR[:, :, 1].copy()


def photo() -> bytes:
    found = sorted(PHOTOS.rglob("*.jpg"))
    if not found:
        pytest.skip("the demo's photographs are not there")
    return found[0].read_bytes()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, pixels: bytes, *, bits: int = 8, color: int = 0, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return PNG + header + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def lines(image: NDArray[np.uint8]) -> bytes:
    """PNG pixel data: a filter byte before every line."""
    flat = image.reshape(len(image), -1)
    return zlib.compress(np.hstack((np.zeros((len(flat), 1), np.uint8), flat)).tobytes())


def encoded(suffix: str, image: NDArray[np.uint8]) -> bytes:
    return cv2.imencode(suffix, image if image.ndim == 2 else image[:, :, ::-1])[1].tobytes()


def jpeg_claiming(width: int, height: int) -> bytes:
    """A valid small JPEG whose frame header says otherwise."""
    data = bytearray(encoded(".jpg", GRAY))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def refusal(data: bytes) -> str:
    with pytest.raises(ImageRefused) as caught:
        decode_image(data)
    return caught.value.reason


@pytest.fixture
def opencv_must_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("OpenCV saw the bytes")

    monkeypatch.setattr(cv2, "imdecode", decode)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff"])
@pytest.mark.parametrize("image", [GRAY, COLOR], ids=["gray", "color"])
def test_lossless_kinds_come_out_as_they_went_in(suffix: str, image: NDArray[np.uint8]) -> None:
    """Stored channels are kept, colors come out in RGB order."""
    decoded = decode_image(encoded(suffix, image))

    assert np.array_equal(decoded, image.reshape(31, 45, -1))


def test_a_jpeg_comes_out_in_rgb_order() -> None:
    """Red stays red: the model would learn the wrong color silently."""
    red = np.zeros((32, 32, 3), np.uint8)
    red[:, :, 0] = 255
    decoded = decode_image(encoded(".jpg", red))

    assert decoded[16, 16, 0] > 250 and decoded[16, 16, 2] < 5


@pytest.mark.parametrize("image", [GRAY, COLOR], ids=["gray", "color"])
def test_channels_are_made_as_asked(image: NDArray[np.uint8]) -> None:
    """Gray is replicated for an RGB model, color becomes luma for a gray one, both only when asked for."""
    data = encode_png(image)
    gray, color = decode_image(data, channels=1), decode_image(data, channels=3)

    assert gray.shape == (31, 45, 1) and color.shape == (31, 45, 3)
    assert np.array_equal(gray, image.reshape(31, 45, -1)) if image.ndim == 2 else gray.std() > 0
    with pytest.raises(ValueError, match="expected None, 1 or 3"):
        decode_image(data, channels=4)


@pytest.mark.parametrize(
    ("color", "samples", "channels"), [(0, 1, 1), (2, 3, 3), (4, 2, 1), (6, 4, 3)], ids=["L", "RGB", "LA", "RGBA"]
)
def test_alpha_is_dropped_and_nothing_else_changes(color: int, samples: int, channels: int) -> None:
    """A transparent pixel keeps its color: what the sensor saw is under it."""
    stored = rng.integers(0, 256, (9, 11, samples), dtype=np.uint8)
    decoded = decode_image(png(11, 9, lines(stored), color=color))

    assert np.array_equal(decoded, stored[:, :, :channels])


def test_a_photograph_cut_anywhere_is_refused_as_truncated(tmp_path: Path) -> None:
    """OpenCV would fill the missing rest with gray and say nothing: half a picture would be judged as a whole one."""
    data, path = photo(), tmp_path / "cut.jpg"
    for cut in (1, 2, 3, 20, *np.linspace(30, len(data) - 1, 150).astype(int).tolist()):
        assert refusal(data[:cut]) == "truncated", cut
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageRefused) as caught:
        read_image(path)
    assert caught.value.reason == "truncated"

    assert np.asarray(cv2.imread(str(path)))[-1, -1].tolist() == [128, 128, 128]  # the control: the danger is real
    assert refusal(b"") == "size" and decode_image(data).shape[2] == 3


def test_without_the_check_for_the_end_a_cut_photograph_gets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: the end is taken for granted; with an end marker stuck on, a half gray picture comes out."""
    data = photo()
    honest = image_headers._jpeg_header
    monkeypatch.setattr(image_headers, "_jpeg_header", lambda frame, complete: honest(frame, complete=True))

    assert sniff(data[: len(data) // 2]).complete
    assert decode_image(data[: len(data) // 2] + b"\xff\xd9")[-1, -1].tolist() == [128, 128, 128]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg", ".tiff"])
@pytest.mark.parametrize("image", [GRAY, COLOR], ids=["gray", "color"])
def test_no_proper_beginning_of_an_image_is_admitted(suffix: str, image: NDArray[np.uint8]) -> None:
    """Every single cut of every kind."""
    data = encoded(suffix, image)

    assert {refusal(data[:cut]) for cut in range(1, len(data))} <= {"truncated", "format"}


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_trailing_bytes_are_tolerated(suffix: str) -> None:
    """Some cameras pad their buffers."""
    data = encoded(suffix, COLOR)

    assert np.array_equal(decode_image(data + b"\x00\xff\xd8 padding"), decode_image(data))


@pytest.mark.usefixtures("opencv_must_not_look")
@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(jpeg_claiming(65500, 65500), id="JPEG of 4 gigapixels"),
        pytest.param(jpeg_claiming(8000, 8000), id="JPEG of 64 megapixels in 2 kB"),
        pytest.param(png(65500, 65500, lines(GRAY)), id="PNG of 4 gigapixels"),
        pytest.param(png(2**31 - 1, 1, lines(GRAY)), id="PNG with one endless line"),
        pytest.param(png(8000, 8000, lines(GRAY)), id="PNG of 64 megapixels in 2 kB"),
        pytest.param(b"BM" + struct.pack("<IIIIiiHHI", 0, 0, 54, 40, 60000, 60000, 1, 24, 0) + bytes(20), id="BMP"),
        pytest.param(PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0))
                     + chunk(b"teXt", b"") * 70_000, id="PNG of endless chunks"),
        pytest.param(b"\xff\xd8" + b"\xff" * 200_000, id="JPEG of endless fill"),
        pytest.param(encoded(".jpg", GRAY)[:-2] + b"\xff\xda\x00\x02" * 100 + b"\xff\xd9", id="JPEG of 100 scans"),
    ],
)  # fmt: skip
def test_bombs_are_refused_by_their_header(bomb: bytes) -> None:
    """A 631-byte JPEG costs OpenCV 4 GiB and 8 s at its defaults; it must not even start."""
    assert refusal(bomb) == "bomb"


def test_a_tiff_bomb_is_refused() -> None:
    """A small file that claims tiles or strips beyond what its bytes unpack to."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, GRAY, photometric="minisblack")
    data = bytearray(buffer.getvalue())
    for tag in (256, 257):
        place = data.index(struct.pack("<H", tag) + b"\x04\x00" if tag == 256 else struct.pack("<HH", tag, 4))
        data[place + 8 : place + 12] = struct.pack("<I", 7000)

    assert refusal(bytes(data)) == "bomb"


def test_compressed_text_in_a_png_is_never_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """libpng would inflate each of these 100 text chunks to 7 MB; the pixels alone are passed on."""
    text = b"comment\0\0" + zlib.compress(bytes(7_000_000), 9)
    data = png(45, 31, lines(GRAY), extra=chunk(b"zTXt", text) * 100)
    seen: list[int] = []
    honest = cv2.imdecode

    def decode(payload: NDArray[np.uint8], flag: int) -> object:
        seen.append(len(payload))
        return honest(payload, flag)

    monkeypatch.setattr(cv2, "imdecode", decode)

    assert np.array_equal(decode_image(data)[:, :, 0], GRAY)
    assert seen[0] < 2000 < len(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GIF89a" + bytes(50), "format"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(50), "format"),
        (b"{}", "format"),
        (png(0, 5, lines(GRAY)), "size"),
        (png(45, 31, lines(GRAY), bits=16), "format"),
        (png(45, 31, lines(GRAY), color=5), "format"),
        (png(45, 31, lines(GRAY)[:-30]), "format"),
        (png(45, 31, lines(GRAY[:5])), "format"),
        (encoded(".png", rng.integers(0, 65535, (8, 8)).astype(np.uint16)), "format"),
        (encoded(".tiff", rng.random((8, 8)).astype(np.float32)), "format"),
        (encoded(".jpg", GRAY).replace(b"\xff\xc0", b"\xff\xc9", 1), "format"),
        (jpeg_claiming(0, 31), "size"),
        (jpeg_claiming(45, 0), "size"),
        (b"\xff\xd8\xff\xd9", "truncated"),
        (b"\xff\xd8\xff\xe0\x00\x00" + bytes(50), "format"),
    ],
)
def test_what_is_no_admissible_image_is_refused_with_a_word(data: bytes, reason: str) -> None:
    """Foreign kinds, 16 bits, empty sides, damaged pixels, arithmetic coding."""
    assert refusal(data) == reason


def test_more_encoded_bytes_than_admitted_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on bytes besides the one on pixels."""
    monkeypatch.setattr(images, "MAX_ENCODED_BYTES", 1000)

    assert refusal(encoded(".png", COLOR)) == "size"


def test_the_caller_may_admit_fewer_pixels() -> None:
    """The wire knows from its header how large a frame may be."""
    data = encode_png(GRAY)

    assert sniff(data, max_pixels=31 * 45).width == 45
    with pytest.raises(ImageRefused, match="45 x 31"):
        decode_image(data, max_pixels=31 * 45 - 1)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([".png", ".jpg", ".bmp", ".tiff"]), st.data())
def test_damaged_bytes_are_refused_or_decoded_but_nothing_else(suffix: str, data: st.DataObject) -> None:
    """Whatever a broken link makes of a picture: ImageRefused, or a picture of the size that the header says."""
    image = bytearray(encoded(suffix, COLOR))
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_image(bytes(image), max_pixels=100_000)
    except ImageRefused:
        return

    assert decoded.dtype == np.uint8 and decoded.shape[2] in (1, 3) and decoded.size <= 300_000


@settings(max_examples=200)
@given(st.sampled_from([PNG, b"\xff\xd8\xff", b"BM", b"II*\x00", b"MM\x00*", b""]), st.binary(max_size=200))
def test_any_bytes_end_in_an_answer(magic: bytes, rest: bytes) -> None:
    """The header parser sees what strangers send."""
    with pytest.raises(ImageRefused):
        sniff(magic + rest, max_pixels=1000)


def test_exif_orientation_is_ignored() -> None:
    """A mask must share its picture's axes, so the sensor's frame is never turned; OpenCV, the control, turns it."""
    plain = encoded(".jpg", COLOR)
    tag = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01" + tag + bytes(4)
    turned = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]

    assert np.array_equal(decode_image(turned), decode_image(plain))
    by_opencv = np.asarray(cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR))
    assert by_opencv.shape[:2] == (45, 31)


def test_opencv_has_its_own_limits_too() -> None:
    """The second lock on the door, for whoever decodes past this module."""
    assert os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] == str(images.MAX_IMAGE_PIXELS)
    with pytest.raises(cv2.error, match="CV_IO_MAX_IMAGE"):
        cv2.imdecode(np.frombuffer(jpeg_claiming(65500, 65500), np.uint8), cv2.IMREAD_COLOR)


def test_reading_a_file_names_it_in_every_refusal(tmp_path: Path) -> None:
    """Someone has to find the bad file among a thousand."""
    good, cut, gone = tmp_path / "good.png", tmp_path / "cut.png", tmp_path / "gone.png"
    good.write_bytes(encode_png(COLOR))
    cut.write_bytes(encode_png(COLOR)[:-20])

    assert np.array_equal(read_image(good), COLOR)
    for path, reason in ((cut, "truncated"), (gone, "format"), (tmp_path, "format")):
        with pytest.raises(ImageRefused, match=path.name) as caught:
            read_image(path)
        assert caught.value.reason == reason


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)))
def test_a_mask_png_has_one_bit_a_pixel_and_comes_back(mask: NDArray[np.bool_]) -> None:
    """Subscribers in any language read it."""
    data = encode_mask_png(mask)

    assert sniff(data).bits == 1
    assert np.array_equal(decode_image(data)[:, :, 0], mask * np.uint8(255))


def test_a_map_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate --maps` may be interrupted; what lies there is complete, and no temporary file is left behind."""
    values, path = rng.random((20, 30), np.float32), tmp_path / "map.tiff"
    write_tiff_float32(path, values)
    assert np.array_equal(tifffile.imread(path), values)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tiff_float32(path, values + 1)
    assert np.array_equal(tifffile.imread(path), values) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("writer", [encode_png, encode_mask_png])
def test_writers_refuse_other_arrays(writer: object) -> None:
    """A float image would be written as something else."""
    with pytest.raises(ValueError, match=r"not \(4, 4\) float64"):
        writer(np.zeros((4, 4)))  # type: ignore[operator]
