"""A camera in a process of its own: sends small frames until it is killed and writes down each that was acknowledged.

python camera.py ADDRESS NAME FILE
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from edge.errors import SinkFull
from edge.sender import CameraSender

if __name__ == "__main__":
    address, name, file = sys.argv[1:]
    # One write per line with O_APPEND: a SIGKILL leaves whole lines.
    noted = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    rng = np.random.default_rng(os.getpid())
    with CameraSender(address, name, resend_after_s=0.5) as sender:
        out: dict[int, None] = {}
        while True:
            try:
                frame = sender.send(rng.integers(0, 256, (32, 32), np.uint8), encoding="raw", timeout_s=2.0)
                out[frame.sequence] = None
            except SinkFull:
                pass
            time.sleep(0.002)
            for sequence in [one for one in out if one not in sender._kept]:
                del out[sequence]
                os.write(noted, f"{name}/{sender.epoch}/{sequence}\n".encode())
