"""A camera that tells when it lost its daemon and when frames are acknowledged, with the time of the monotonic clock.

    python partition_camera.py ADDRESS NAME

One line each: `TIME lost`, `TIME back` or `TIME acked EPOCH SEQUENCE`.
"""

from __future__ import annotations

import contextlib
import sys
import time

import numpy as np

from edge.errors import SinkFull
from edge.sender import CameraSender

GRAY = np.full((32, 32), 128, np.uint8)


def tell(*words: object) -> None:
    print(time.monotonic(), *words, flush=True)


if __name__ == "__main__":
    with CameraSender(sys.argv[1], sys.argv[2], plain_off_host=True) as sender:
        out: set[int] = set()
        in_touch = False
        while True:
            with contextlib.suppress(SinkFull):
                out.add(sender.send(GRAY, encoding="raw", timeout_s=0.05).sequence)
            time.sleep(0.01)
            if sender.in_touch != in_touch:
                in_touch = sender.in_touch
                tell("back" if in_touch else "lost")
            for sequence in sorted(one for one in out if one not in sender._kept):
                out.remove(sequence)
                tell("acked", sender.epoch, sequence)
