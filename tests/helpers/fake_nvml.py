"""A stand-in for NVIDIA's management library, so that its real Python binding can be used where there is no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def build_fake_nvml(folder: Path) -> Path | None:
    """Compile it into `folder`, which is returned for LD_LIBRARY_PATH; None without a C compiler."""
    if shutil.which("cc") is None:
        return None
    source = Path(__file__).with_suffix(".c")
    command = ["cc", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(source)]
    return folder if subprocess.run(command, capture_output=True).returncode == 0 else None
