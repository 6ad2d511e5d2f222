"""Steady: this very command again, in a process in which a build gives the same bytes each time.

TensorRT for RTX 1.7 orders some tables of an engine by address, and numbers intermediate values as its threads come to
them. Without address randomization, on one core and with a fixed hash seed there is one order only.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

_MARK: Final = "KIZU_STEADY"
_ADDR_NO_RANDOMIZE: Final = 0x0040000
"""linux/personality.h; kept over exec."""
_THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def restart_steadily() -> bool:
    """Replace this process by a steady one of the same command; returns only where that was not possible, or is done.

    True if this process is steady; False where the system does not allow it (a container's seccomp filter may not).
    Standard streams, terminal and signals stay as they are, since it is the same process.
    """
    if os.environ.get(_MARK) == "1":
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    before = libc.personality(0xFFFFFFFF)
    if before == -1 or libc.personality(before | _ADDR_NO_RANDOMIZE) == -1:
        return False
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    settings = {_MARK: "1", "PYTHONHASHSEED": "0"} | dict.fromkeys(_THREADS, "1")
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | settings)
