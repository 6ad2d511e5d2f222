"""What `kizu doctor` finds of NVIDIA's on this machine, and the command that adds what is missing.

Owns where drivers, GPUs, TensorRT and the toolkit show themselves, on a PC, on Jetson and in a container, and what each
needs of the others. Reads files, asks `nvidia-smi` and `nvcc`; makes no GPU context and imports no backend.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata, util
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

ROOT: Final = Path("/")
RTX_TARGETS: Final = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""What TensorRT for RTX 1.7 builds for; tests hold it against the library."""

# The bindings and their libraries are all that is needed; they import as tensorrt_rtx_bindings.
_RTX: Final = (
    "tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13-bindings",
    "tensorrt-rtx-cu12-bindings",
)  # fmt: skip
_FULL: Final = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
_OLDEST_DRIVER: Final = {"cu13": 580, "cu12": 525}
"""The first driver of each CUDA release, by NVIDIA's table of minor version compatibility."""

# /proc/device-tree/compatible of Jetson modules; their GPU is no PCI device.
_TEGRA: Final = {"nvidia,tegra234": ("Jetson Orin", "sm_87"), "nvidia,tegra264": ("Jetson Thor", "sm_110")}


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked for: what was found, None if nothing; the command that adds it, "" if none does.

    `note` says what it is for, or, where `fits` is false, why what was found is of no use here.
    """

    name: str
    found: str | None
    add: str = ""
    note: str = ""
    fits: bool = True

    @property
    def serves(self) -> bool:
        """Whether it is there and of use."""
        return self.found is not None and self.fits


class Gpu(NamedTuple):
    """A GPU that answers: its name, and its compute capability as `sm_89`, "" where nothing tells."""

    name: str
    capability: str


def nvidia_findings() -> list[Finding]:
    """Everything that decides whether TensorRT runs here, in the order in which one would put it right."""
    gpus = find_gpus()
    flavor = find_tensorrt()
    return [
        _driver(flavor),
        _library(),
        _gpu(gpus),
        Finding("compute_cap", ", ".join(gpu.capability for gpu in gpus if gpu.capability) or None),
        _tensorrt(flavor, gpus),
        package("onnx", pip("kizu[compile]"), "engines are built from graphs"),
        _compiler(),
        _toolkit(),
        package("pycuda", pip("kizu[gpu]"), "is built here, by g++ and nvcc"),
        package("nvidia-ml-py", pip("kizu[gpu]"), "only for the GPU's series on the metrics page"),
        _kernels(),
    ]


def steps(findings: list[Finding]) -> list[str]:
    """The commands that make TensorRT run on this machine's GPU, in order; none where it does or there is no GPU."""
    by_name = {finding.name: finding for finding in findings}
    needed = ["driver", "libcuda", "tensorrt"]
    if by_name["tensorrt"].serves or "kizu[" not in by_name["tensorrt"].add:  # else the extra brings it
        needed.append("onnx")
    if not by_name["pycuda"].serves:
        needed += ["compiler", "nvcc", "pycuda"]
    return [by_name[name].add for name in needed if not by_name[name].serves] if _has_gpu() else []


# --- what is there ----------------------------------------------------------------------------------------------------


def find_gpus() -> list[Gpu]:
    """The GPUs that answer: by nvidia-smi, else by what the kernel tells of them."""
    if tegra := _tegra():  # its nvidia-smi answers, but not this question
        return [tegra]
    rows = [line.split(", ") for line in _smi("name,compute_cap")]
    if asked := [Gpu(row[0], _capability(row[1])) for row in rows if len(row) == 2]:
        return asked
    models = (
        re.search(r"^Model:\s*(.+)$", _text(path), re.MULTILINE)
        for path in _glob("proc/driver/nvidia/gpus/*/information")
    )
    return [Gpu(model[1].strip(), "") for model in models if model]


def pci_gpus() -> list[str]:
    """NVIDIA's display and 3D controllers on the PCI bus, as `10de:27b8`, whether or not a driver answers for them."""
    found = []
    for folder in _glob("sys/bus/pci/devices/*"):
        if _text(folder / "vendor").strip() == "0x10de" and _text(folder / "class").startswith("0x03"):
            found.append(f"10de:{_text(folder / 'device').strip().removeprefix('0x')}")
    return found


def driver_version(text: str) -> str | None:
    """The version in /proc/driver/nvidia/version; None where there is none."""
    found = re.search(r"\b(\d{3,4}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None


def jetson_release() -> tuple[int, str] | None:
    """The release of Jetson Linux and its revision, (36, "4.3"); None on another machine."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _text(ROOT / "etc/nv_tegra_release"))
    return (int(found[1]), found[2]) if found else None


def find_tensorrt() -> tuple[str, str] | None:
    """Distribution and version of the TensorRT that would be imported; RTX first, as `engines/tensorrt` tries them."""
    for name in (*_RTX, *_FULL):
        if version := version_of(name):
            return name, version
    # NVIDIA's Debian packages do not all carry Python's metadata.
    return ("tensorrt", "of unknown version") if util.find_spec("tensorrt") is not None else None


def version_of(distribution: str) -> str | None:
    """The installed version of a Python distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def package(name: str, add: str, note: str = "") -> Finding:
    """The finding of a Python distribution."""
    return Finding(name, version_of(name), add, note)


def pip(*wanted: str) -> str:
    """The command that installs `wanted` into the interpreter that runs this."""
    return f"{sys.executable} -m pip install {' '.join(repr(one) if '[' in one else one for one in wanted)}"


# --- what it means ----------------------------------------------------------------------------------------------------


def _driver(flavor: tuple[str, str] | None) -> Finding:
    jetson = jetson_release()
    if jetson:
        return Finding("driver", f"Jetson Linux R{jetson[0]}.{jetson[1]}")
    found = driver_version(_text(ROOT / "proc/driver/nvidia/version")) or next(iter(_smi("driver_version")), None)
    if found is None and not _has_gpu():
        return Finding("driver", None, note="not needed: this machine has no NVIDIA GPU")
    oldest = _oldest_driver(flavor)
    if found is not None and int(found.partition(".")[0]) < oldest:
        return Finding("driver", found, _driver_command(), f"this TensorRT needs {oldest} or newer", fits=False)
    return Finding("driver", found, _driver_command(), "NVIDIA's driver, 580 or newer for CUDA 13")


def _oldest_driver(flavor: tuple[str, str] | None) -> int:
    if flavor is None:
        return 0
    # The meta packages name no CUDA; what they bring does.
    names = [flavor[0], *(name for name in (*_RTX, *_FULL) if version_of(name))]
    return max((_OLDEST_DRIVER[cuda] for cuda in _OLDEST_DRIVER if any(cuda in name for name in names)), default=0)


def _driver_command() -> str:
    if "ID=ubuntu" in _text(ROOT / "etc/os-release"):
        return "sudo apt-get install nvidia-driver-580 && sudo reboot"
    return "sudo apt-get install cuda-drivers && sudo reboot  # repository: developer.nvidia.com/cuda-downloads"


def _library() -> Finding:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        if not _has_gpu():
            return Finding("libcuda", None, note="comes with the driver")
        if any((ROOT / name).exists() for name in (".dockerenv", "run/.containerenv")):
            step = "docker run --runtime nvidia" if jetson_release() or _tegra() else "docker run --gpus all"
            return Finding("libcuda", None, f"{step} ...  # with NVIDIA's container toolkit on the host")
        return Finding("libcuda", None, "sudo ldconfig  # else install the driver again", "comes with the driver")
    return Finding("libcuda", "libcuda.so.1")


def _gpu(gpus: list[Gpu]) -> Finding:
    if gpus:
        return Finding("gpu", ", ".join(gpu.name for gpu in gpus))
    seen = pci_gpus()
    if seen:
        return Finding("gpu", None, "nvidia-smi", f"{', '.join(seen)} on the PCI bus: no driver answers for it")
    return Finding("gpu", None, note="no NVIDIA GPU on the PCI bus")


def _tensorrt(flavor: tuple[str, str] | None, gpus: list[Gpu]) -> Finding:
    capabilities = {gpu.capability for gpu in gpus if gpu.capability}
    served = not capabilities or bool(capabilities & set(RTX_TARGETS))
    if flavor is None:
        return _no_tensorrt(served)
    name, version = flavor
    if name not in _RTX:
        return Finding("tensorrt", f"TensorRT {version}")
    unused = f"TensorRT for RTX does not know {', '.join(sorted(capabilities))}"
    # Uninstalled, not only joined by the other: the engine takes RTX first.
    rtx = " ".join(one for one in (*_RTX, "tensorrt-rtx-cu13-libs") if version_of(one))
    other = f"{sys.executable} -m pip uninstall -y {rtx} && {pip('kizu[tensorrt]')}"
    return Finding("tensorrt", f"RTX {version}", *(("", "") if served else (other, unused)), fits=served)


def _no_tensorrt(rtx: bool) -> Finding:
    jetson = jetson_release()
    if jetson and jetson[0] < 38:
        note = f"R{jetson[0]} has TensorRT for Python 3.10 only, Kizu needs 3.11 or 3.12"
        return Finding("tensorrt", None, "install JetPack 7 (Ubuntu 24.04, Python 3.12)", note)
    if jetson or _tegra():
        # JetPack's module lies outside of every virtual environment.
        return Finding(
            "tensorrt",
            None,
            f"sudo apt-get install python3-libnvinfer && python3 -m venv --system-site-packages --upgrade {sys.prefix}",
            "JetPack's own; a virtual environment sees it with --system-site-packages",
        )
    return Finding("tensorrt", None, pip("kizu[tensorrt-rtx]" if rtx else "kizu[tensorrt]"))


def _compiler() -> Finding:
    compiler, header = shutil.which("g++"), Path(sysconfig.get_paths()["include"]) / "Python.h"
    found = "g++ and Python.h" if compiler and header.exists() else None
    return Finding("compiler", found, "sudo apt-get install g++ python3-dev", "only building pycuda needs it")


def _toolkit() -> Finding:
    note = "only building pycuda and kernels needs it"
    add = "sudo apt-get install cuda-toolkit-13-0  # repository: developer.nvidia.com/cuda-downloads"
    if shutil.which("nvcc"):
        return Finding("nvcc", _release("nvcc"), add, note)
    # NVIDIA's packages put nothing on PATH, and pycuda's build looks nowhere else.
    beside = ROOT / "usr/local/cuda/bin"
    if release := _release(str(beside / "nvcc")):
        return Finding("nvcc", release, f"export PATH={beside}:$PATH", f"{beside} is not on PATH", fits=False)
    return Finding("nvcc", None, add, note)


def _release(nvcc: str) -> str | None:
    found = re.search(r"release ([\d.]+)", "\n".join(_output(nvcc, "--version")))
    return found[1] if found else None


def _kernels() -> Finding:
    from edge.engines.cuda import FATBIN

    found = FATBIN.name if FATBIN.exists() else None
    return Finding("kernels", found, f"sh {FATBIN.parent / 'build.sh'}", 'only engine.maps = "flawed" needs them')


# --- asking -----------------------------------------------------------------------------------------------------------


def _has_gpu() -> bool:
    return bool(find_gpus() or pci_gpus())


def _tegra() -> Gpu | None:
    words = _text(ROOT / "proc/device-tree/compatible").split("\0")
    return next((Gpu(*_TEGRA[word]) for word in words if word in _TEGRA), None)


def _capability(text: str) -> str:
    return f"sm_{text.replace('.', '')}" if re.fullmatch(r"\d+\.\d", text) else ""


def _smi(question: str) -> list[str]:
    return _output("nvidia-smi", f"--query-gpu={question}", "--format=csv,noheader")


def _output(*command: str) -> list[str]:
    """What a tool prints, nothing where it is missing, fails or hangs, as nvidia-smi does on a lost GPU."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _glob(pattern: str) -> list[Path]:
    return sorted(ROOT.glob(pattern))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
