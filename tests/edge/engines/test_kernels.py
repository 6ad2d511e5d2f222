"""Our CUDA kernels: they compile for every GPU we support within a register budget; on a GPU they equal NumPy."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

KERNELS = Path(__file__).parents[3] / "edge" / "engines" / "kernels"
TARGETS = {80, 86, 87, 89, 90, 120}
NAMES = {"flat_field", "threshold_pack"}

REGISTERS = 24
"""At 256 threads a block, up to 32 registers leave an SM full (65536 / 2048); the rest is room for another compiler."""

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here: kernels are not compiled")


def compile_into(folder: Path, source: str | None = None) -> str:
    """ptxas' report of a build, from a copy with another source if one is given."""
    script = KERNELS / "build.sh"
    if source is not None:
        shutil.copy(script, folder / "build.sh")
        (folder / "kernels.cu").write_text(source)
        script = folder / "build.sh"
    built = subprocess.run(["sh", str(script), str(folder)], capture_output=True, text=True, timeout=110)
    assert built.returncode == 0, built.stderr
    return built.stdout + built.stderr


def registers(report: str) -> dict[tuple[str, int], int]:
    """Registers of each (kernel, target) in ptxas' report."""
    found = re.findall(r"entry function '(\w+)' for 'sm_(\d+)'(?:.|\n)*?Used (\d+) registers", report)
    return {(name, int(target)): int(count) for name, target, count in found}


@needs_nvcc
def test_every_kernel_is_built_for_every_target_within_its_registers(tmp_path: Path) -> None:
    """One fatbin for all; no spills, and few enough registers for full occupancy everywhere."""
    report = compile_into(tmp_path)

    found = registers(report)
    assert set(found) == {(name, target) for name in NAMES for target in TARGETS}
    assert max(found.values()) <= REGISTERS, found
    assert not re.search(r"[1-9]\d* bytes spill", report)
    assert (tmp_path / "kernels.fatbin").stat().st_size > 10_000


@needs_nvcc
def test_control_a_kernel_that_takes_too_many_registers_is_noticed(tmp_path: Path) -> None:
    """Planted: sixty-four running sums, kept apart by a loop that cannot be folded."""
    sums = (
        'extern "C" __global__ void threshold(const float *in, float *out, unsigned n) { float s[64] = {};\n'
        "for (unsigned i = 0; i < n; ++i)\n"
        "#pragma unroll\nfor (int k = 0; k < 64; ++k) s[k] += in[i * 64 + k] * s[k];\n"
        "#pragma unroll\nfor (int k = 0; k < 64; ++k) out[k] = s[k]; }\n"
    )

    assert max(registers(compile_into(tmp_path, sums)).values()) > REGISTERS


@pytest.mark.gpu
def test_kernels_equal_numpy_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd widths, no numbers and infinities included; bit for bit."""
    from edge.engines import cuda

    compile_into(tmp_path)
    monkeypatch.setattr(cuda, "FATBIN", tmp_path / "kernels.fatbin")
    device = cuda.CudaDevice(0)
    print(device.name)
    random = np.random.default_rng(0)
    cells = random.normal(0, 1, (7, 61)).astype(np.float32)
    cells[0, :3] = (np.nan, np.inf, -np.inf)
    pixels = random.integers(0, 256, (2, 97), dtype=np.uint8)
    dark, gain = random.uniform(0, 9, 97).astype(np.float32), random.uniform(0.5, 2, 97).astype(np.float32)
    above = ~(cells <= np.float32(0.25))
    flat = np.clip(np.rint((pixels.astype(np.float32) - dark) * gain), 0, 255).astype(np.uint8)
    stream, done = device.stream(), device.event()

    def on_device(array: np.ndarray) -> np.uint64:
        host = device.pinned(array.nbytes)
        host[:] = np.frombuffer(array.tobytes(), np.uint8)
        address = device.allocate(array.nbytes)
        device.upload(address, host, stream)
        return np.uint64(address)

    def result(kernel: str, like: np.ndarray, threads: int, *arguments: object) -> np.ndarray:
        address, host = device.allocate(like.nbytes), device.pinned(like.nbytes)
        given = tuple(np.uint64(address) if argument is None else argument for argument in arguments)
        device.launch(kernel, threads, given, stream)
        device.download(host, address, stream)
        device.record(done, stream)
        while not device.done(done):
            pass
        return host.view(like.dtype).reshape(like.shape).copy()

    try:
        at, limit = on_device(cells), np.float32(0.25)
        packed = np.packbits(above, axis=1)
        bits = result("threshold_pack", packed, packed.size, at, None, limit, np.uint32(7), np.uint32(61))
        arguments = (on_device(pixels), on_device(dark), on_device(gain), None, np.uint32(194), np.uint32(97))
        leveled = result("flat_field", flat, flat.size, *arguments)
    finally:
        device.close()

    np.testing.assert_array_equal(bits, packed)
    np.testing.assert_array_equal(leveled, flat)
