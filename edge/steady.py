"""Steady: this very command again, in a process in which a build gives the same bytes each time.

TensorRT for RTX 1.7 orders some tables of an engine by address, and numbers intermediate values in that order. Address
randomization is one reason for other addresses. The other is its worker threads: some twenty come and go in a build,
nearly idle, but each takes a stack, an arena and a block for the library's thread-local variables (12 KiB), which the
building thread frees and takes again when it joins them; what comes first is the scheduler's choice. So all run on one
core where a thread that wakes up waits for its turn, thread-local variables are part of the stacks, and the building
thread gets its large blocks where no thread interferes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import Final

_MARK: Final = "KIZU_STEADY"
_ADDR_NO_RANDOMIZE: Final = 0x0040000
"""linux/personality.h; kept over exec."""
_HEAP_ONLY: Final = "glibc.malloc.mmap_max=0:glibc.malloc.mmap_threshold=68719476736"
"""The main thread's large blocks come from the heap below (brk), not from mmap, where threads have theirs. The C
library reads it as it starts, so it has to be set before; others ignore it.
"""
_TUNABLES: Final = "GLIBC_TUNABLES"
_PRELOAD: Final = "LD_PRELOAD"
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
    os.sched_setaffinity(0, {libc.sched_getcpu()})
    # No thread that wakes up preempts another. Kept over exec; needs no privilege, as a real-time policy would.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    settings = {_MARK: "1", "PYTHONHASHSEED": "0"} | dict.fromkeys(_THREADS, "1")
    # Of two equal tunables the last counts.
    settings[_TUNABLES] = ":".join(filter(None, (os.environ.get(_TUNABLES), _HEAP_ONLY)))
    settings[_PRELOAD] = ":".join(filter(None, (os.environ.get(_PRELOAD), _library())))
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | settings)


def _library() -> str:
    """TensorRT for RTX's file, empty where there is none: what is there from the start has static thread-local storage.

    A path with a space or colon cannot be preloaded, and is left out.
    """
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    folders = (found.submodule_search_locations or ()) if found else ()
    files = [str(file) for folder in folders for file in sorted(Path(folder).glob("libtensorrt_rtx.so*"))]
    return next((file for file in files if not set(file) & {" ", ":"}), "")
