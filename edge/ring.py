"""Ring: pixels of a camera on the same host, in memory that both sides see; only a note travels.

Owns the memory and its checks. The camera makes it and grabs into its slots; the daemon maps it read-only and looks at
the pixels in place. When a slot may be written again is decided by the acknowledgement of its frame, which is the
business of `sender` and `sources.zeromq`.

The memory is a memfd that its maker has sealed against shrinking: a mapping that a camera could cut short would end the
daemon with SIGBUS. It is opened through /proc/PID/fd, so both sides must run as the same user, or the daemon as root.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from types import TracebackType
from typing import Annotated, Final, Self

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge.errors import ImageRefused

MAX_RING_BYTES: Final = 1 << 30
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class RingNote(msgspec.Struct, frozen=True):
    """Where a camera's ring is: descriptor `fd` of process `pid`, `size_bytes` long."""

    pid: Annotated[int, Meta(ge=1, le=2**22)]
    fd: Annotated[int, Meta(ge=0, le=2**20)]
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_RING_BYTES)]


class Ring:
    """The camera's side: `slots` of `slot_bytes` each, written through `slot`; a context manager.

    Raises:
        ValueError: no slot, no byte, or more than MAX_RING_BYTES in all.
        OSError: there is no such memory.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        size = slots * slot_bytes
        if slots < 1 or slot_bytes < 1 or size > MAX_RING_BYTES:
            raise ValueError(f"a ring of {slots} x {slot_bytes} bytes: expected 1 to {MAX_RING_BYTES} bytes in all")
        self.slots, self.slot_bytes = slots, slot_bytes
        self._fd = os.memfd_create("kizu-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, size)
            self._memory = mmap.mmap(self._fd, size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self._fd)
            raise
        self._pixels = np.frombuffer(self._memory, np.uint8).reshape(slots, slot_bytes)

    @property
    def note(self) -> RingNote:
        """What the daemon is told."""
        return RingNote(os.getpid(), self._fd, self.slots * self.slot_bytes)

    def slot(self, index: int) -> NDArray[np.uint8]:
        """The writable bytes (slot_bytes,) uint8 of a slot."""
        found: NDArray[np.uint8] = self._pixels[index]
        return found

    def close(self) -> None:
        """Give the memory back, once nobody looks at it any more."""
        os.close(self._fd)
        del self._pixels, self._memory

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RingView:
    """The daemon's side: a read-only mapping; frames that look into it keep it alive.

    Raises:
        ImageRefused: `ring`; the memory is not there, not sealed against shrinking, or of another size.
    """

    def __init__(self, note: RingNote) -> None:
        path = f"/proc/{note.pid}/fd/{note.fd}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ImageRefused(
                "ring", f"ring {path}: {error.strerror}; camera and daemon must run on one host as one user"
            ) from None
        try:
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise ImageRefused("ring", f"ring {path} is not sealed; seal the memfd against shrinking and growing")
            if os.fstat(fd).st_size != note.size_bytes:
                raise ImageRefused(
                    "ring", f"ring {path}: {os.fstat(fd).st_size} bytes, the note says {note.size_bytes}"
                )
            self._memory = memoryview(mmap.mmap(fd, note.size_bytes, prot=mmap.PROT_READ))
        except OSError as error:  # F_GET_SEALS: EINVAL for what is no memfd
            raise ImageRefused("ring", f"ring {path} is no memfd: {error.strerror}") from None
        finally:
            os.close(fd)

    def part(self, offset: int, size: int) -> memoryview:
        """`size` bytes from `offset` on, in place.

        Raises:
            ImageRefused: `length`; they reach beyond the ring.
        """
        if offset + size > len(self._memory):
            raise ImageRefused("length", f"ring: bytes {offset} to {offset + size} of {len(self._memory)}")
        return self._memory[offset : offset + size]
