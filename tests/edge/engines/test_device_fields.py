"""Flat fields applied on the device: each frame by its own camera's, in order, to the CPU's bytes; and planted faults.

On the fake device, whose `flat_field` is NumPy; that the real kernel gives the same bytes is `test_kernels`' matter.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle import ModelBundle
from edge.engines.device import PLACE
from edge.engines.device_fields import DeviceFields
from edge.engines.fake_device import Hazard
from edge.engines.streamed import StreamedEngine
from edge.errors import DeviceError, EngineError
from edge.stages.flatfield import level
from edge.types import FlatMaps, Uneven
from streaming import streamed_engine

Job = tuple[NDArray[np.uint8], list[Uneven | None]]


def field(seed: int, height: int = 32, width: int = 32) -> FlatMaps:
    random = np.random.default_rng(seed)
    gain = random.uniform(0.4, 4, (height, width, 1)).astype(np.float32)
    return FlatMaps(gain, random.uniform(0, 30, (height, width, 1)).astype(np.float32))


LEFT, RIGHT = field(1), field(2, 61, 47)  # the second is larger than a frame: its tiles lie anywhere in it
PLACES = (Uneven(LEFT, 0, 0), Uneven(RIGHT, 29, 15), None, Uneven(RIGHT, 40, -7))


def jobs() -> list[Job]:
    """Six batches of one to four frames of several cameras, in another order each time."""
    random = np.random.default_rng(0)
    made = []
    for index in range(6):
        frames = random.integers(0, 256, (1 + index % 4, 32, 32, 1), dtype=np.uint8)
        made.append((frames, [PLACES[(index + at) % 4] for at in range(len(frames))]))
    return made


def by_the_host(job: Job) -> NDArray[np.uint8]:
    frames = job[0].copy()
    for pixels, one in zip(frames, job[1], strict=True):
        if one is not None:
            level(pixels, one)
    return frames


def through(engine: StreamedEngine, given: list[Job]) -> list[NDArray[np.float32]]:
    """Maps of all batches, with as many in flight as the engine keeps."""
    answers, out = [], 0
    for frames, uneven in given:
        if out == engine.spec.depth:
            answers.append(engine.collect(10.0)[1])
            out -= 1
        engine.submit(frames, uneven)
        out += 1
    return answers + [engine.collect(10.0)[1] for _ in range(out)]


@pytest.fixture(scope="module")
def expected(tiny_bundle: ModelBundle) -> list[NDArray[np.float32]]:
    """Corrected by the host, run by an engine that knows no field."""
    with streamed_engine(tiny_bundle)[0] as engine:
        return through(engine, [(by_the_host(job), []) for job in jobs()])


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_every_frame_is_corrected_by_its_own_cameras_field(
    tiny_bundle: ModelBundle, expected: list[NDArray[np.float32]], depth: int, seed: int
) -> None:
    """Cameras share batches, one needs no correction; the maps are those of the host's correction, bit for bit."""
    engine, device = streamed_engine(tiny_bundle, depth=depth, seed=seed, fields=[LEFT, RIGHT, LEFT])

    with engine:
        uploads = device.trace.count("upload")
        answers = through(engine, jobs())

    assert engine.spec.levels
    for answer, wanted in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(answer, wanted)
    assert device.trace.count("flat_field") == len(answers) == device.trace.count("compute")
    assert device.trace.count("upload") - uploads == 2 * len(answers)  # frames and their places; a field never again


def test_a_batch_that_needs_no_correction_gets_none(tiny_bundle: ModelBundle) -> None:
    """Golden frames and cameras without a field go as they are; so does everything without fields."""
    with streamed_engine(tiny_bundle)[0] as plain:
        wanted, _ = plain.infer(jobs()[3][0])
        assert not plain.spec.levels
    engine, device = streamed_engine(tiny_bundle, fields=[LEFT])

    with engine:
        found, _ = engine.infer(jobs()[3][0])

    np.testing.assert_array_equal(found, wanted)
    assert "flat_field" not in device.trace


class _Broken(StreamedEngine):
    """The schedule with one fault in how it corrects."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.break_it()

    def break_it(self) -> None: ...


class _AnotherSlotsFields(_Broken):
    """Each frame by its neighbor's field."""

    def break_it(self) -> None:
        fields, places = self._fields, self._fields.places
        fields.places = lambda uneven, count: np.roll(places(uneven, count), PLACE.itemsize)  # type: ignore[method-assign]


class _EveryFrameByTheFirst(_Broken):
    """One field for the whole batch."""

    def break_it(self) -> None:
        fields, places = self._fields, self._fields.places
        fields.places = lambda uneven, count: places([next(filter(None, uneven))] * count, count)  # type: ignore[method-assign]


class _TheWholeFieldFromItsCorner(_Broken):
    """A tile by the part of the field at the region's corner."""

    def break_it(self) -> None:
        fields, places = self._fields, self._fields.places
        fields.places = lambda uneven, count: places(  # type: ignore[method-assign]
            [one and Uneven(one.maps, 0, 0) for one in uneven], count
        )


class _CorrectedInAnotherStream(_Broken):
    """The kernel where nothing waits for the copy, nor the graph for it."""

    def break_it(self) -> None:
        fields, right, other = self._fields, self._fields.level, self._streams[2]
        fields.level = lambda frames, places, count, stream: right(frames, places, count, other)  # type: ignore[method-assign]


class _CopiedWithoutWaiting(_Broken):
    """The compute stream does not wait for frames and places."""

    def break_it(self) -> None:
        device, waits, compute = self._device, self._device.wait, self._streams[1]
        device.wait = lambda stream, event: None if stream is compute else waits(stream, event)  # type: ignore[method-assign]


class _OneTableForAllSlots(_Broken):
    """Every batch's places at one address."""

    def break_it(self) -> None:
        fields, right, first = self._fields, self._fields.level, self._idle[0].address + self._plan.places_at
        fields.level = lambda frames, places, count, stream: right(frames, first, count, stream)  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", [_AnotherSlotsFields, _EveryFrameByTheFirst, _TheWholeFieldFromItsCorner])
def test_control_a_wrong_field_shows_in_the_maps(
    tiny_bundle: ModelBundle, expected: list[NDArray[np.float32]], kind: type[StreamedEngine]
) -> None:
    """Nothing collides and nothing fails: only the bytes tell, and the comparison above would see them."""
    with streamed_engine(tiny_bundle, kind=kind, fields=[LEFT, RIGHT])[0] as engine:
        answers = through(engine, jobs())

    assert not all(np.array_equal(answer, wanted) for answer, wanted in zip(answers, expected, strict=True))


@pytest.mark.parametrize("kind", [_CorrectedInAnotherStream, _CopiedWithoutWaiting, _OneTableForAllSlots])
@pytest.mark.parametrize("seed", range(3))
def test_control_a_correction_that_nothing_puts_in_order_is_caught(
    tiny_bundle: ModelBundle, kind: type[StreamedEngine], seed: int
) -> None:
    """Whatever order the device happens to choose: the missing event is the fault, not the collision."""
    engine, _ = streamed_engine(tiny_bundle, kind=kind, seed=seed, fields=[LEFT, RIGHT])

    with pytest.raises(Hazard):
        through(engine, jobs())


class _PutWithoutWaiting(StreamedEngine):
    """Goes on with the next piece of a field while the last one is still on its way."""

    def _reached(self, event: Any, until: float) -> bool:
        return True


def test_control_a_field_overwritten_while_it_is_copied_is_caught(tiny_bundle: ModelBundle) -> None:
    """A field is larger than the pinned memory that it goes through, so each piece must have arrived."""
    wide = field(3, 300, 300)
    with streamed_engine(tiny_bundle, fields=[wide])[0] as engine:
        assert wide.gain.nbytes > 8 * engine._plan.size

    with pytest.raises(Hazard, match="written to while its upload waited"):
        streamed_engine(tiny_bundle, kind=_PutWithoutWaiting, fields=[wide])[1].close()


def test_fields_that_do_not_fit_are_refused_when_the_engine_opens(tiny_bundle: ModelBundle) -> None:
    """They are part of the plan: a line that runs cannot run out of memory for them. Control: without them it opens."""
    memory = 100_000
    streamed_engine(tiny_bundle, memory=memory)[0].__exit__(None, None, None)

    with pytest.raises(DeviceError, match="are free") as full:
        streamed_engine(tiny_bundle, memory=memory, fields=[field(3, 200, 200)])
    assert full.value.reason == "memory"


@pytest.mark.parametrize(
    ("uneven", "words"),
    [
        ([Uneven(field(1), 0, 0)] * 2, "not one that this engine was opened with"),
        ([PLACES[0]], "1 flat fields for 2 frames"),
    ],
    ids=["a stranger of the same values", "one too few"],
)
def test_what_cannot_be_corrected_is_refused_and_costs_no_slot(
    tiny_bundle: ModelBundle, uneven: list[Uneven | None], words: str
) -> None:
    """A frame that its field did not reach must not be judged; the engine goes on."""
    with streamed_engine(tiny_bundle, depth=1, fields=[LEFT])[0] as engine:
        with pytest.raises(EngineError, match=words):
            engine.submit(np.zeros((2, 32, 32, 1), np.uint8), uneven)

        engine.submit(np.zeros((2, 32, 32, 1), np.uint8), [PLACES[0], None])
        assert engine.collect(10.0)[1].shape == (2, 14, 14)


def test_warming_up_runs_the_kernel_too(tiny_bundle: ModelBundle) -> None:
    """Or the first frame would wait for its loading."""
    engine, device = streamed_engine(tiny_bundle, fields=[LEFT])

    with engine:
        engine.warmup()

    assert device.trace.count("flat_field") == 4 * 2


def test_a_batch_beyond_the_kernels_counter_is_refused(tiny_bundle: ModelBundle) -> None:
    """The kernel counts bytes in 32 bits."""
    from dataclasses import replace

    engine, device = streamed_engine(tiny_bundle)
    huge = replace(engine.spec, height=1 << 15, width=1 << 15, max_batch=4)

    with pytest.raises(EngineError, match=r'engine.flat_field = "host"'):
        DeviceFields(device, huge, [LEFT], lambda address, data: None)


@pytest.mark.gpu
def test_a_real_gpu_corrects_to_the_hosts_bytes(
    tiny_bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same plan, same batches: the maps of frames corrected there and of frames corrected here are the same bytes."""
    from edge.engines import cuda
    from edge.engines.device import Plan
    from edge.engines.registry import open_engine
    from tensorrt_plans import build_plan, where_the_gpu_is_known

    script = Path(cuda.__file__).with_name("kernels") / "build.sh"
    subprocess.run(["sh", script, tmp_path], check=True, capture_output=True, timeout=110)
    monkeypatch.setattr(cuda, "FATBIN", tmp_path / "kernels.fatbin")
    plan = Plan.read(build_plan(tiny_bundle, tmp_path / "tiny.plan"))

    def opened(**options: Any) -> Any:
        with where_the_gpu_is_known():
            return open_engine(tiny_bundle, backend="tensorrt", device="cuda:0", plan=plan, **options)

    with opened() as plain:
        print(plain.spec)
        wanted = through(plain, [(by_the_host(job), []) for job in jobs()])
    with opened(fields=[LEFT, RIGHT]) as engine, opened() as beside:
        engine.warmup()
        found = through(engine, jobs())
        assert beside.infer(jobs()[0][0])[0].shape == (1, 14, 14)  # two engines on one GPU

    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
