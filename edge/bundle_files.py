"""The bytes of a bundle's directory: files read once and under a cap, hashed, .npy, written all or nothing.

Knows files and arrays, not what they mean; that is `bundle`.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import BundleError

MAX_FILES = 4096
"""Most files in one bundle; a directory with more is refused before it is walked to the end."""


def read_once(path: Path, max_bytes: int) -> bytes:
    """Return the content of the regular file at `path`, read in one pass from one descriptor.

    Raises:
        BundleError: missing, a link, not a regular file, or larger than `max_bytes`.
    """
    # O_NOFOLLOW: a link could lead out of the bundle. O_NONBLOCK: opening a FIFO must not hang us.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        reason = "is a symbolic link" if path.is_symlink() else f"cannot be read ({error.strerror})"
        raise BundleError(f"{path} {reason}; expected a regular file of the bundle") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path} is not a regular file; bundles hold regular files only")
        if status.st_size > max_bytes:
            raise BundleError(f"{path} has {status.st_size} bytes; at most {max_bytes} are read")
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror})") from error
    if len(data) > max_bytes:
        raise BundleError(f"{path} grew past {max_bytes} bytes while it was read")
    return data


def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def plain_name(name: str) -> bool:
    """Whether `name` is a relative POSIX path that can only name something inside the bundle."""
    parts = name.split("/")
    return len(name) <= 255 and len(parts) <= 8 and all(_plain_part(part) for part in parts)


def _plain_part(part: str) -> bool:
    return part not in ("", ".", "..") and "\\" not in part and part.isprintable()


def files_below(directory: Path) -> set[str]:
    """Relative POSIX paths of everything in `directory` that is not a directory itself; links are not followed.

    Raises:
        BundleError: not a directory, unreadable, or more than `MAX_FILES` entries.
    """
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise BundleError(f"bundle {directory} {what}; `kizu train` writes bundles")
    found: set[str] = set()
    pending = [PurePosixPath()]
    entries = 0
    while pending:
        here = pending.pop()
        try:
            with os.scandir(directory / here) as scan:
                for entry in scan:
                    entries += 1
                    if entries > MAX_FILES:
                        raise BundleError(f"bundle {directory} holds more than {MAX_FILES} entries; this is no bundle")
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(here / entry.name)
                    else:
                        found.add(str(here / entry.name))
        except OSError as error:
            raise BundleError(f"bundle {directory} cannot be listed at {error.filename}: {error.strerror}") from error
    return found


def parse_array(data: bytes, dtype: np.dtype[Any], shape: tuple[int | None, ...], where: str) -> NDArray[Any]:
    """Read the .npy file `data` without copying or unpickling; the result is read-only.

    `shape` is what is expected, None where any length >= 1 will do; `where` names the file in errors.

    Raises:
        BundleError: not .npy version 1.0, another dtype, shape or order, or another length than its header says.
    """
    found, fortran, stored, start = _npy_header(data, where)
    expected = f"{dtype} {tuple('any' if side is None else side for side in shape)}"
    if stored != dtype or fortran or not _shape_fits(found, shape):
        raise BundleError(f"{where} holds {stored} {found}{' Fortran' if fortran else ''}, expected {expected}")
    # The product in Python integers: a header may claim more elements than 64 bits hold.
    count = 1
    for side in found:
        count *= side
    if len(data) - start != count * dtype.itemsize:
        raise BundleError(f"{where} has {len(data) - start} bytes of values, its header says {count * dtype.itemsize}")
    return np.frombuffer(data, dtype, count, start).reshape(found)


_NPY_MAGIC = b"\x93NUMPY\x01\x00"
# What `array_bytes` writes, and nothing else: NumPy's own reader evaluates the header as Python, and on a damaged one
# raises whatever its tokenizer does.
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<|][a-z][0-9]{1,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,18}, )*[0-9]{0,18},?)\), \} *\n"
)


def _npy_header(data: bytes, where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, Fortran order, dtype, and where the values start."""
    if not data.startswith(_NPY_MAGIC):
        raise BundleError(f"{where} is not a .npy array of format version 1.0")
    start = 10 + int.from_bytes(data[8:10], "little")
    parsed = _NPY_HEADER.fullmatch(data[10:start])
    if parsed is None or len(data) < start:
        raise BundleError(f"{where} is not a .npy array: no bundle's array has such a header; make it again")
    try:
        stored = np.dtype(parsed[1].decode())
    except TypeError:
        raise BundleError(f"{where} is not a .npy array: it holds {parsed[1].decode()!r}") from None
    shape = tuple(int(side) for side in parsed[3].split(b",") if side.strip())
    return shape, parsed[2] == b"True", stored, start


def _shape_fits(found: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return len(found) == len(shape) and all(
        side >= 1 if wanted is None else side == wanted for side, wanted in zip(found, shape, strict=True)
    )


def array_bytes(array: NDArray[Any]) -> bytes:
    """The .npy file (version 1.0, C order) of `array`."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def write_directory(target: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` as the directory `target`: it appears complete and synced, or not at all.

    Raises:
        BundleError: `target` exists, its parent does not, or the disk refuses.
    """
    if target.exists() or target.is_symlink():
        raise BundleError(f"{target} exists; bundles are written once: choose another path or remove it first")
    if not target.parent.is_dir():
        raise BundleError(f"{target.parent} is not a directory; make it first, then run the command again")
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise BundleError(f"cannot write beside {target}: {error.strerror}") from error
    try:
        for name, data in files.items():
            _write_synced(staging / name, data)
        for folder in {staging / name for name in files}:
            _sync(folder.parent)
        _sync(staging)
        staging.chmod(0o755)  # mkdtemp makes it private; a bundle is read by the daemon's own user
        os.rename(staging, target)  # fails on anything but an empty directory made meanwhile
        _sync(target.parent)
    except OSError as error:
        raise BundleError(f"cannot write bundle {target}: {error.strerror} ({error.filename})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_synced(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
