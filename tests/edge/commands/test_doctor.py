"""`kizu doctor` works on a bare machine and says what would make it a better one."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest
import typer

from edge.commands import nvidia
from edge.commands.doctor import cpu_features, doctor, examine, told, usable
from edge.commands.nvidia import Finding, driver_version, steps

UBUNTU = {"etc/os-release": "NAME=Ubuntu\nID=ubuntu\n"}
GPU = {"sys/bus/pci/devices/0000:01:00.0/" + name: word for name, word in
       {"vendor": "0x10de\n", "class": "0x030200\n", "device": "0x27b8\n"}.items()}  # fmt: skip
SOUND = {"sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n", "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n"}
VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version:  13.2.0\n"
DRIVER = {"proc/driver/nvidia/version": VERSION}
ORIN = {"proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0000\0nvidia,tegra234\0"}


class Machine:
    """A machine that has what it is told and nothing else."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch, self._versions = folder, patch, dict[str, str]()
        (folder / "bin").mkdir()
        patch.setattr(nvidia, "ROOT", folder)
        patch.setattr(nvidia, "version_of", self._versions.get)
        patch.setattr(nvidia.util, "find_spec", lambda name: None)
        patch.setattr(nvidia.ctypes, "CDLL", self._load)
        patch.setenv("PATH", str(folder / "bin"))

    def has(self, *files: dict[str, str]) -> None:
        for name, text in (pair for group in files for pair in group.items()):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text)

    def installs(self, **versions: str) -> None:
        self._versions.update({name.replace("_", "-"): version for name, version in versions.items()})

    def answers(self, tool: str, says: str, where: str = "bin") -> None:
        """A program of that name, which prints `says` whatever it is asked."""
        path = self.folder / where / tool
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho '{says}'\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def _load(self, name: str) -> None:
        if not (self.folder / name).exists():
            raise OSError(name)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in examine()}


def test_this_machine_can_run_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """--json: one object, the last line of nothing else."""
    doctor(as_json=True)

    report = json.loads(capsys.readouterr().out)
    assert "openvino" in report["backends"] and report["findings"]["openvino"]["found"]


def test_on_a_bare_machine_it_still_answers(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing installed and no GPU: status 1, the one command that helps, and no advice about drivers."""
    with pytest.raises(typer.Exit) as left:
        doctor()

    text = capsys.readouterr().out
    assert left.value.exit_code == 1
    assert f"a line can run on: nothing; {sys.executable} -m pip install openvino" in text
    assert "not needed: this machine has no NVIDIA GPU" in text and "in this order" not in text


def test_a_gpu_and_nothing_installed_gives_every_command_in_order(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fresh Ubuntu with a card in it: the card is seen on the bus, its sound device is none."""
    machine.has(UBUNTU, GPU, SOUND)
    machine.installs(openvino="2026.4.1")

    doctor()

    text = capsys.readouterr().out
    assert "10de:27b8 on the PCI bus: no driver answers for it" in text
    assert [line.partition(". ")[2].partition("  #")[0] for line in text.splitlines() if line.startswith("  ")] == [
        "sudo apt-get install nvidia-driver-580 && sudo reboot",
        "sudo ldconfig",
        f"{sys.executable} -m pip install 'kizu[tensorrt-rtx]'",
        "sudo apt-get install g++ python3-dev",
        "sudo apt-get install cuda-toolkit-13-0",
        f"{sys.executable} -m pip install 'kizu[gpu]'",
    ]


def test_a_machine_that_has_everything_needs_no_step(machine: Machine) -> None:
    """Driver, library, TensorRT for RTX and pycuda: TensorRT runs, without compiler and toolkit."""
    machine.has(GPU, DRIVER, {"libcuda.so.1": ""})
    machine.answers("nvidia-smi", "NVIDIA L4, 8.9")
    machine.installs(tensorrt_rtx="1.7.1.116", tensorrt_rtx_cu13="1.7.1.116", onnx="1.23.2", pycuda="2026.1")

    found = findings()

    assert [found[name].found for name in ("driver", "gpu", "compute_cap", "tensorrt")] == [
        "580.65.06", "NVIDIA L4", "sm_89", "RTX 1.7.1.116"]  # fmt: skip
    assert usable(examine()) == ["tensorrt"] and steps(examine()) == []


def test_a_driver_older_than_tensorrts_cuda_is_found_but_of_no_use(machine: Machine) -> None:
    """Debian's 535 loads, and every engine of CUDA 13 would be refused."""
    machine.has(GPU, {"proc/driver/nvidia/version": VERSION.replace("580.65.06", "535.261.03"), "libcuda.so.1": ""})
    machine.answers("nvidia-smi", "NVIDIA L4, 8.9")
    machine.installs(tensorrt_rtx="1.7.1.116", tensorrt_rtx_cu13="1.7.1.116", onnx="1.23.2", pycuda="2026.1")

    found = findings()["driver"]

    assert told(found).startswith("535.261.03 (this TensorRT needs 580 or newer); sudo apt-get install cuda-drivers")
    assert usable(examine()) == [] and len(steps(examine())) == 1


@pytest.mark.parametrize("installed", [False, True])
def test_a_gpu_that_rtx_does_not_know_is_sent_to_the_other_tensorrt(machine: Machine, installed: bool) -> None:
    """An H100 is sm_90. RTX has to go first where it is there: the engine would take it."""
    machine.has(GPU, DRIVER)
    machine.answers("nvidia-smi", "NVIDIA H100 80GB HBM3, 9.0")
    if installed:
        machine.installs(tensorrt_rtx="1.7.1.116")

    found = findings()["tensorrt"]

    assert not found.serves and found.add.endswith("-m pip install 'kizu[tensorrt]'")
    assert ("uninstall -y tensorrt-rtx &&" in found.add) == installed


def test_what_rtx_knows_is_what_the_library_says() -> None:
    """The list in `nvidia` is a copy, so that doctor loads no backend; here it is held against the original."""
    from edge.compile import known_targets

    library = pytest.importorskip("tensorrt_rtx", reason="no TensorRT for RTX here")

    assert tuple(name.replace("sm", "sm_") for name in known_targets(library)) == nvidia.RTX_TARGETS


@pytest.mark.parametrize(("files", "step"), [({}, "docker run --gpus all"), (ORIN, "docker run --runtime nvidia")])
def test_a_container_that_was_not_given_the_gpu_is_told_how(machine: Machine, files: dict[str, str], step: str) -> None:
    """The host's driver shows through /proc, and its library does not."""
    machine.has(GPU, DRIVER, {".dockerenv": ""}, files)

    found = findings()

    assert found["driver"].serves and not found["libcuda"].serves and found["libcuda"].add.startswith(step)


def test_without_nvidia_smi_the_kernel_tells_the_gpus_name(machine: Machine) -> None:
    """A container with the capability compute and not utility; no compute capability then."""
    machine.has(DRIVER, {"proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA L4\nIRQ: 1\n"})

    found = findings()

    assert (found["gpu"].found, found["compute_cap"].found) == ("NVIDIA L4", None)


@pytest.mark.parametrize("tool", [True, False])
def test_jetsons_gpu_is_told_by_its_device_tree(machine: Machine, tool: bool) -> None:
    """It is on no PCI bus, and its nvidia-smi does not know the compute capability."""
    machine.has(ORIN, {"etc/nv_tegra_release": "# R39 (release), REVISION: 2.0, GCID: 1\n"})
    if tool:
        machine.answers("nvidia-smi", "Orin (nvgpu), [N/A]")

    found = findings()

    assert (found["gpu"].found, found["compute_cap"].found) == ("Jetson Orin", "sm_87")
    assert found["driver"].found == "Jetson Linux R39.2.0"
    assert f"{sys.executable} -m pip install 'kizu[compile]'" in steps(examine())  # JetPack does not bring onnx
    assert "python3-libnvinfer" in found["tensorrt"].add and "--system-site-packages" in found["tensorrt"].add


def test_jetpack_6_is_told_to_be_too_old(machine: Machine) -> None:
    """Its TensorRT is for Python 3.10, which Kizu does not run on: no command but JetPack 7 adds it."""
    machine.has(ORIN, {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1\n"})

    found = findings()["tensorrt"]

    assert "Python 3.10 only" in found.note and "JetPack 7" in found.add


def test_a_toolkit_that_is_not_on_path_is_found_all_the_same(machine: Machine) -> None:
    """Where NVIDIA's packages put it. pycuda's build would not find it there, so the step is the PATH."""
    machine.has(GPU)
    machine.answers("nvcc", "Cuda compilation tools, release 13.0, V13.0.88", "usr/local/cuda/bin")

    found = findings()["nvcc"]

    assert found.found == "13.0" and not found.serves
    assert found.add == f"export PATH={machine.folder}/usr/local/cuda/bin:$PATH" and found.add in steps(examine())


def test_a_tool_that_fails_or_hangs_finds_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi on a lost GPU."""
    machine.answers("nvidia-smi", "NVIDIA L4, 8.9")
    (machine.folder / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")

    assert not findings()["gpu"].serves


@pytest.mark.parametrize(
    ("parts", "backends"),
    [
        (["openvino"], ["openvino"]),
        (["driver", "libcuda", "gpu", "tensorrt", "pycuda"], ["tensorrt"]),
        (["driver", "libcuda", "gpu", "tensorrt"], []),
        (["tensorrt", "pycuda"], []),
    ],
)
def test_a_backend_is_usable_when_all_it_needs_is_there(parts: list[str], backends: list[str]) -> None:
    """TensorRT needs five things; four of them run nothing."""
    assert usable([Finding(part, "1") for part in parts] + [Finding("nvcc", None)]) == backends


def test_versions_are_read_from_the_kernels_own_words() -> None:
    """/proc/driver/nvidia/version and /proc/cpuinfo, on x86-64 and Arm."""
    assert driver_version(VERSION) == "580.65.06" and driver_version("") is None
    assert cpu_features("flags\t\t: fpu avx2 fma avx512_vnni\n") == "avx2 fma avx512_vnni"
    assert cpu_features("Features\t: fp asimd asimddp\n") == "asimd asimddp"
