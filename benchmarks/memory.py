"""Does the daemon's memory stay where it is?

    python benchmarks/memory.py [BUNDLE] [--frames 50000]

Resident memory of a real daemon with OpenVINO after some hundred frames, and its growth over 50,000 frames with the
fake engine, sampled every second after a warm-up of 2,000. Growth compares the medians of the first and the last tenth
of the samples. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.daemons import cameras, line_bundle, resident_mb, scrape  # noqa: E402
from edge.bundle import ModelBundle, open_bundle  # noqa: E402
from edge.demo.line import BUNDLE, DaemonProcess, write_config  # noqa: E402

RESIDENT_BOUND_MB = 500.0
GROWTH_BOUND = 0.01
NAMES = ["cam0", "cam1"]
SHAPE = (480, 640)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, default=BUNDLE if (BUNDLE / "bundle.json").exists() else None)
    parser.add_argument("--frames", type=int, default=50_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = open_bundle(options.bundle) if options.bundle else line_bundle(folder / "bundle")
        result: dict[str, object] = {"bundle": bundle.manifest.name}
        print(json.dumps(result | resident(folder, bundle) | growth(folder, bundle, options.frames), indent=2))


def resident(folder: Path, bundle: ModelBundle) -> dict[str, object]:
    """With OpenVINO, both cameras at full windows of color frames."""
    shape = (*SHAPE, bundle.manifest.input.channels)
    config = write_config(folder / "openvino.toml", bundle.path, NAMES)
    with DaemonProcess(config) as daemon:
        ready = daemon.wait_until_ready(60.0)
        idle_mb = resident_mb(daemon.pid)
        with cameras(ready["frames_address"], NAMES, shape, 150):
            used_mb = resident_mb(daemon.pid)
    return {
        "openvino_idle_mb": round(idle_mb, 1),
        "openvino_resident_mb": round(used_mb, 1),
        "openvino_bound_mb": RESIDENT_BOUND_MB,
        "openvino_ratio": round(used_mb / RESIDENT_BOUND_MB, 3),
    }


def growth(folder: Path, bundle: ModelBundle, frames: int) -> dict[str, object]:
    """With the fake engine, `frames` frames after the warm-up."""
    shape = (*SHAPE, bundle.manifest.input.channels)
    config = write_config(
        folder / "fake.toml", bundle.path, NAMES, engine={"backend": "fake"}, log={"path": "fake.sqlite"}
    )
    samples: list[float] = []
    over = threading.Event()
    with DaemonProcess(config) as daemon:
        ready = daemon.wait_until_ready(60.0)
        with cameras(ready["frames_address"], NAMES, shape, 1000):
            pass

        def sample() -> None:
            while not over.wait(1.0):
                samples.append(resident_mb(daemon.pid))

        sampler = threading.Thread(target=sample)
        sampler.start()
        with cameras(ready["frames_address"], NAMES, shape, frames // 2) as reports:
            pass
        over.set()
        sampler.join()
        judged = sum(v for k, v in scrape(ready["metrics_url"]).items() if k.startswith("kizu_verdicts_total"))
    tenth = max(1, len(samples) // 10)
    first, last = statistics.median(samples[:tenth]), statistics.median(samples[-tenth:])
    return {
        "fake_frames": int(judged) - 2000,
        "fake_left": sum(left for _, _, left in reports),
        "fake_first_mb": round(first, 2),
        "fake_last_mb": round(last, 2),
        "fake_peak_mb": round(max(samples), 2),
        "fake_growth": round(last / first - 1, 4),
        "fake_growth_bound": GROWTH_BOUND,
    }


if __name__ == "__main__":
    main()
