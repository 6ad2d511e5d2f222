"""How long until it answers?

    python benchmarks/startup.py [BUNDLE] [--rounds 5]

`import edge`, `import edge.daemon` and `kizu --help` in fresh interpreters, less the interpreter's own start, and from
the start of `kizu run` to its ready line (engine and kernels warm, sockets bound). Medians; prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.daemons import line_bundle  # noqa: E402
from edge.demo.line import BUNDLE, DaemonProcess, write_config  # noqa: E402

BOUNDS_S = {"import_edge": 0.1, "import_edge_daemon": 1.0, "ready": 5.0}
CALLS = {
    "interpreter": ["-c", "pass"],
    "import_edge": ["-c", "import edge"],
    "import_edge_daemon": ["-c", "import edge.daemon"],
    "kizu_help": ["-m", "edge.cli", "--help"],
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, default=BUNDLE if (BUNDLE / "bundle.json").exists() else None)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = options.bundle or line_bundle(folder / "bundle").path
        print(json.dumps(measure(folder, bundle, options.rounds), indent=2))


def measure(folder: Path, bundle: Path, rounds: int) -> dict[str, object]:
    """See the module's docstring."""
    times: dict[str, list[float]] = {name: [] for name in (*CALLS, "ready")}
    config = write_config(folder / "line.toml", bundle, ["cam0"])
    for _ in range(rounds):
        for name, arguments in CALLS.items():
            start = time.monotonic()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.monotonic() - start)
        start = time.monotonic()
        with DaemonProcess(config) as daemon:
            daemon.wait_until_ready(60.0)
            times["ready"].append(time.monotonic() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    found = {name: value - (medians["interpreter"] if name != "ready" else 0) for name, value in medians.items()}
    return {
        **{f"{name}_s": round(found[name], 3) for name in found if name != "interpreter"},
        **{f"{name}_ratio_to_bound": round(found[name] / bound, 3) for name, bound in BOUNDS_S.items()},
        "rounds": rounds,
    }


if __name__ == "__main__":
    main()
