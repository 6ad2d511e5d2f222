"""Our CUDA kernels: for every GPU we support within a register budget; their source, and the device, give our bytes."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.engines.device import PLACE
from edge.stages.flatfield import level
from edge.types import FlatMaps, Uneven

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


needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here: kernels do not run on the CPU")

# What nvcc brings of itself, so that g++ takes the kernels' source as it stands and runs them thread by thread.
ON_THE_CPU = """
#include <algorithm>
#include <cmath>
#include <cstdint>
struct { unsigned x; } blockIdx, threadIdx;
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
static float __fmul_rn(float a, float b) { return a * b; }
static float __fsub_rn(float a, float b) { return a - b; }
using std::min;
#include "kernels.cu"
#define EVERY_THREAD(cells) \\
    for (unsigned t = 0; t < (cells + 255u) / 256u * 256u; ++t) if (blockIdx.x = t / 256u, threadIdx.x = t % 256u, true)
extern "C" void run_flat_field(uint8_t *f, const Place *p, unsigned n, unsigned h, unsigned w, unsigned c)
{ EVERY_THREAD(n) flat_field(f, p, n, h, w, c); }
extern "C" void run_threshold_pack(const float *a, uint8_t *b, float limit, unsigned rows, unsigned width)
{ EVERY_THREAD(rows * ((width + 7u) / 8u)) threshold_pack(a, b, limit, rows, width); }
"""


def on_the_cpu(folder: Path, planted: tuple[str, str] = ("", "")) -> ctypes.CDLL:
    """Both kernels' own source as host code, with one text in place of another if a fault is planted."""
    source = (KERNELS / "kernels.cu").read_text()
    assert planted[0] in source
    (folder / "kernels.cu").write_text(source.replace(*planted) if planted[0] else source)
    (folder / "cpu.cpp").write_text(ON_THE_CPU)
    library = folder / "kernels.so"
    built = subprocess.run(
        ["g++", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-o", library, folder / "cpu.cpp"],
        capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(library))


@dataclass(frozen=True)
class Leveling:
    """Frames of several cameras in one batch, where they lie in their fields, and what the CPU makes of them."""

    pixels: NDArray[np.uint8]
    uneven: tuple[Uneven | None, ...]
    expected: NDArray[np.uint8]

    def places(self, at: Callable[[FlatMaps], int]) -> NDArray[Any]:
        """The kernel's table, with the fields at the addresses given."""
        rows = [
            (0,) * 7 if one is None else (at(one.maps), one.top, one.left, *one.maps.gain.shape, 0)
            for one in self.uneven
        ]
        return np.array(rows, PLACE)


def leveling() -> Leveling:
    """Color and gray fields, none, tiles in the middle and beyond every side, gains that make halves."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (5, 33, 41, 3), dtype=np.uint8)
    gain = random.uniform(0.4, 4, (37, 53, 3)).astype(np.float32)
    gain[:, :20] = 0.5
    dark = random.uniform(0, 30, gain.shape).astype(np.float32)
    dark[:, :20] = 0.0
    color = FlatMaps(gain, dark)
    gray = FlatMaps(gain[:, :, :1].copy(), dark[:, :, :1].copy())
    line = FlatMaps(gain[:1].copy(), dark[:1].copy())
    uneven = (Uneven(color, 0, 0), None, Uneven(gray, 20, 30), Uneven(color, -16, -90), Uneven(line, -3, 5))
    expected = pixels.copy()
    for frame, one in zip(expected, uneven, strict=True):
        if one is not None:
            level(frame, one)
    return Leveling(pixels, uneven, expected)


@needs_gxx
@pytest.mark.parametrize(
    "planted",
    [
        ("", ""),
        ("places[frame]", "places[0]"),
        ("place.channels - 1", "0"),
        ("place.left +", ""),
        ("period - i", "period - i - 1"),
        ("__fsub_rn(frames[i], *dark)", "frames[i]"),
        ("rintf(", "("),
        ("fminf(fmaxf(value, 0.0f), 255.0f)", "value"),
    ],
    ids=lambda planted: planted[0],
)
def test_the_flat_fields_source_gives_the_stages_bytes(tmp_path: Path, planted: tuple[str, str]) -> None:
    """Its very source, run on the CPU thread by thread. Controls: each line of it left out or changed shows."""
    job, kernels = leveling(), on_the_cpu(tmp_path, planted)
    kept = {maps: np.stack((maps.dark, maps.gain)) for maps in {one.maps for one in job.uneven if one is not None}}
    frames, places = job.pixels.copy(), job.places(lambda maps: kept[maps].ctypes.data)

    kernels.run_flat_field(
        ctypes.c_void_p(frames.ctypes.data), ctypes.c_void_p(places.ctypes.data), frames.size, *frames.shape[1:]
    )

    assert np.array_equal(frames, job.expected) is not bool(planted[0])


def cells_and_their_bits() -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """An odd width, no numbers and infinities; above 0.25 or not."""
    cells = np.random.default_rng(0).normal(0, 1, (7, 61)).astype(np.float32)
    cells[0, :4] = (np.nan, np.inf, -np.inf, 0.25)
    return cells, np.packbits(~(cells <= np.float32(0.25)), axis=1)


@needs_gxx
@pytest.mark.parametrize("planted", [("", ""), ("!(row[first + k] <= limit)", "row[first + k] > limit")])
def test_the_masks_source_gives_numpys_bits(tmp_path: Path, planted: tuple[str, str]) -> None:
    """Its very source on the CPU. Control: compared the other way round, what is no number would count as quiet."""
    cells, expected = cells_and_their_bits()
    bits = np.zeros_like(expected)

    on_the_cpu(tmp_path, planted).run_threshold_pack(
        ctypes.c_void_p(cells.ctypes.data), ctypes.c_void_p(bits.ctypes.data), ctypes.c_float(0.25), *cells.shape
    )

    assert np.array_equal(bits, expected) is not bool(planted[0])


@pytest.mark.gpu
def test_kernels_equal_the_cpu_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both, on the same cases as above, bit for bit."""
    from edge.engines import cuda

    compile_into(tmp_path)
    monkeypatch.setattr(cuda, "FATBIN", tmp_path / "kernels.fatbin")
    device = cuda.CudaDevice(0)
    print(device.name)
    stream, done = device.stream(), device.event()

    def on_device(array: NDArray[Any]) -> int:
        host = device.pinned(array.nbytes)
        host[:] = np.frombuffer(array.tobytes(), np.uint8)
        address = device.allocate(array.nbytes)
        device.upload(address, host, stream)
        return address

    def result(address: int, like: NDArray[np.uint8]) -> NDArray[np.uint8]:
        host = device.pinned(like.nbytes)
        device.download(host, address, stream)
        device.record(done, stream)
        while not device.done(done):
            pass
        return host.reshape(like.shape).copy()

    try:
        cells, packed = cells_and_their_bits()
        source, target = on_device(cells), device.allocate(packed.nbytes)
        sides = (np.float32(0.25), *map(np.uint32, cells.shape))
        device.launch("threshold_pack", packed.size, (np.uint64(source), np.uint64(target), *sides), stream)
        bits = result(target, packed)
        job = leveling()
        kept = {one.maps: on_device(np.stack((one.maps.dark, one.maps.gain))) for one in job.uneven if one is not None}
        frames, table = on_device(job.pixels), on_device(job.places(kept.__getitem__))
        sizes = (np.uint32(job.pixels.size), *map(np.uint32, job.pixels.shape[1:]))
        device.launch("flat_field", job.pixels.size, (np.uint64(frames), np.uint64(table), *sizes), stream)
        leveled = result(frames, job.pixels)
    finally:
        device.close()

    np.testing.assert_array_equal(bits, packed)
    np.testing.assert_array_equal(leveled, job.expected)
