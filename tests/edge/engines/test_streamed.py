"""The double-buffered schedule: right in every order that a GPU may choose, and each way to break it is noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle import ModelBundle, check_golden
from edge.engines.device import BufferPlan
from edge.engines.fake_device import FakeDevice, Hazard
from edge.engines.streamed import StreamedEngine
from edge.engines.tensorrt import spec_of
from edge.errors import DeviceError, EngineError
from streaming import streamed_engine


def batch_of(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 1), dtype=np.uint8)


def stream_through(engine: StreamedEngine, batches: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    """Maps of all batches, with as many in flight as the engine keeps."""
    answers, out = [], 0
    for batch in batches:
        if out == engine.spec.depth:
            answers.append(engine.collect(10.0)[1])
            out -= 1
        engine.submit(batch)
        out += 1
    return answers + [engine.collect(10.0)[1] for _ in range(out)]


def test_the_plan_keeps_every_part_aligned_and_apart(tiny_bundle: ModelBundle) -> None:
    """Frames, maps and scores of the largest batch lie behind each other, each at a multiple of 256 bytes."""
    plan = BufferPlan.of(spec_of(tiny_bundle.manifest, "0", "fake device", 3))

    assert (plan.frame, plan.map) == (32 * 32, 14 * 14 * 4)
    assert plan.maps_at == 3072 >= 3 * plan.frame and plan.scores_at >= plan.maps_at + 3 * plan.map
    assert plan.mask == 14 * 2 and plan.masks_at >= plan.scores_at + 3 * 4 and plan.size >= plan.masks_at + 3 * 28
    assert plan.scores_at % 256 == plan.masks_at % 256 == plan.size % 256 == 0


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_the_answers_do_not_depend_on_the_order_the_device_chooses(
    tiny_bundle: ModelBundle, depth: int, seed: int
) -> None:
    """Streams go on by lot; every batch still gets its own answer, and with two slots or more work overlaps."""
    batches = [batch_of(1 + index % 4, index) for index in range(12)]
    alone, _ = streamed_engine(tiny_bundle, depth=1)
    expected = [alone.infer(batch)[0] for batch in batches]
    engine, device = streamed_engine(tiny_bundle, depth=depth, seed=seed)

    with engine:
        answers = stream_through(engine, batches)

    for answer, wanted in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(answer, wanted)
    one_by_one = ["upload", "compute", "download", "download"] * len(batches)
    assert sorted(device.trace) == sorted(one_by_one)
    assert (device.trace == one_by_one) == (depth == 1)


def test_the_golden_frames_come_out_as_exported(tiny_bundle: ModelBundle) -> None:
    """The whole way, pinned memory and back, changes no answer."""
    with streamed_engine(tiny_bundle)[0] as engine:
        assert check_golden(tiny_bundle, engine, require=True).ok


class _Broken(StreamedEngine):
    """The schedule with one of its precautions left out."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.break_it()

    def break_it(self) -> None: ...


class _NoWaitForUpload(_Broken):
    def break_it(self) -> None:
        device, waits = self._device, self._device.wait
        compute = self._streams[1]
        device.wait = lambda stream, event: None if stream is compute else waits(stream, event)  # type: ignore[method-assign]


class _NoWaitForCompute(_Broken):
    def break_it(self) -> None:
        device, waits = self._device, self._device.wait
        copy_out = self._streams[2]
        device.wait = lambda stream, event: None if stream is copy_out else waits(stream, event)  # type: ignore[method-assign]


class _SlotUsedTooEarly(_Broken):
    """Gives a slot back as soon as its batch is enqueued, so that the next batch gets it."""

    def _start(self, slot: Any, *args: Any, **options: Any) -> None:
        super()._start(slot, *args, **options)
        self._idle.appendleft(slot)


class _OneSlotForAll(_Broken):
    """Every slot is the first one's device memory."""

    def break_it(self) -> None:
        for slot in self._idle:
            slot.address = self._idle[0].address


class _LateIsIdle(_Broken):
    """A batch given up as late counts as over."""

    def _take_back_overdue(self) -> None:
        self._idle.extend(self._overdue)
        self._overdue.clear()


@pytest.mark.parametrize("broken", [_NoWaitForUpload, _NoWaitForCompute, _SlotUsedTooEarly, _OneSlotForAll])
@pytest.mark.parametrize("seed", range(3))
def test_control_a_schedule_without_one_of_its_precautions_is_caught(
    tiny_bundle: ModelBundle, broken: type[StreamedEngine], seed: int
) -> None:
    """Whatever order the device happens to choose: the missing event is the fault, not the collision."""
    engine, _ = streamed_engine(tiny_bundle, kind=broken, seed=seed)

    with pytest.raises(Hazard):
        stream_through(engine, [batch_of(4, index) for index in range(6)])


@pytest.mark.parametrize("kind", [StreamedEngine, _LateIsIdle])
def test_a_batch_that_comes_too_late_keeps_its_slot_until_it_ends(
    tiny_bundle: ModelBundle, kind: type[StreamedEngine]
) -> None:
    """The caller gave up, the device did not: the right engine refuses, the planted one runs into the hazard."""
    engine, _ = streamed_engine(tiny_bundle, depth=1, kind=kind)
    engine.submit(batch_of(2))
    with pytest.raises(EngineError, match="not ready within 0"):
        engine.collect(0.0)

    if kind is _LateIsIdle:
        with pytest.raises(Hazard):
            engine.submit(batch_of(2, seed=1))
        return
    with pytest.raises(EngineError, match="still runs"):
        engine.submit(batch_of(2))
    for _ in range(20):
        try:
            engine.submit(batch_of(2, seed=1))
            break
        except EngineError:
            continue
    maps = engine.collect(10.0)[1]
    np.testing.assert_array_equal(maps, streamed_engine(tiny_bundle)[0].infer(batch_of(2, seed=1))[0])


@pytest.mark.parametrize("seed", range(3))
def test_maps_without_a_flaw_stay_on_the_device_and_no_verdict_can_tell(tiny_bundle: ModelBundle, seed: int) -> None:
    """Flawed frames bring their map; every other one reads as the limit, above which nothing is; `infer` as ever."""
    batches = [batch_of(4, index) for index in range(6)]
    with streamed_engine(tiny_bundle)[0] as whole:
        expected = stream_through(whole, batches)
    peaks = np.sort(np.concatenate([maps.max(axis=(1, 2)) for maps in expected]))
    limit = float(peaks[len(peaks) // 2])  # half of the frames are not above it
    engine, device = streamed_engine(tiny_bundle, seed=seed, quiet_below=limit)

    with engine:
        answers = stream_through(engine, batches)
        np.testing.assert_array_equal(engine.infer(batches[0])[0], expected[0])

    found, wanted = np.concatenate(answers), np.concatenate(expected)
    flawed = wanted.max(axis=(1, 2)) > np.float32(limit)
    assert 0 < flawed.sum() < len(flawed)
    np.testing.assert_array_equal(found[flawed], wanted[flawed])
    assert (found[~flawed] == np.float32(limit)).all()
    assert device.trace.count("threshold_pack") == len(batches)
    assert device.trace.count("download") == 2 * (len(batches) + 1) + flawed.sum()


class _MaskReadTooEarly(_Broken):
    """Copies the mask back before the kernel has made it."""

    def _mark_flawed(self, slot: Any, count: int, stream: Any) -> None:
        super()._mark_flawed(slot, count, self._streams[0])


def test_control_a_mask_that_nothing_waits_for_is_caught(tiny_bundle: ModelBundle) -> None:
    """The kernel in another stream than the graph's: it may run before the map is there."""
    engine, _ = streamed_engine(tiny_bundle, kind=_MaskReadTooEarly, quiet_below=0.0)

    with pytest.raises(Hazard):
        stream_through(engine, [batch_of(4, index) for index in range(4)])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_map_with_a_value_that_is_no_number_always_comes_back(tiny_bundle: ModelBundle, value: float) -> None:
    """What cannot be compared is for the verdict to refuse, not for a kernel to hide."""
    from edge.engines.fake_device import FakeProgram

    def compute(frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        maps = np.zeros((len(frames), 14, 14), np.float32)
        maps[1, 3, 13] = value
        return maps, maps.max(axis=(1, 2))

    device, spec = FakeDevice(), spec_of(tiny_bundle.manifest, "0", "fake device", 4)
    program = FakeProgram(device, spec, compute, fail_at=frozenset())
    with StreamedEngine(spec, device, program, quiet_below=1.0) as engine:
        engine.submit(batch_of(3))
        _, maps, _ = engine.collect(10.0)

    assert np.isnan(maps[1, 3, 13]) if np.isnan(value) else maps[1, 3, 13] == value
    assert (maps[[0, 2]] == 1.0).all()


def test_a_batch_that_cannot_be_enqueued_costs_only_itself(tiny_bundle: ModelBundle) -> None:
    """Its pixels may be on their way already; its slot is used again once they have arrived."""
    engine, _ = streamed_engine(tiny_bundle, depth=1, fail_at=frozenset({0}))
    with pytest.raises(DeviceError, match="call 0 fails"):
        engine.submit(batch_of(1))

    for _ in range(20):
        try:
            maps, _ = engine.infer(batch_of(1))
            break
        except EngineError as error:
            assert "still runs" in str(error)
    assert np.isfinite(maps).all()


def test_a_lost_device_fails_what_is_in_flight_and_everything_after(tiny_bundle: ModelBundle) -> None:
    """One clear error each time, with the next step; closing still works."""
    engine, device = streamed_engine(tiny_bundle)
    engine.submit(batch_of(1))
    device.lose("Xid 79: GPU has fallen off the bus")

    with pytest.raises(DeviceError, match="Xid 79") as lost:
        engine.collect(10.0)
    with pytest.raises(DeviceError, match="opened again"):
        engine.submit(batch_of(1))
    engine.__exit__(None, None, None)
    assert lost.value.reason == "lost"


def test_a_full_gpu_is_refused_when_the_engine_opens(tiny_bundle: ModelBundle) -> None:
    """All memory is taken at the start: a line that runs cannot run out of it."""
    with pytest.raises(DeviceError, match="are free") as full:
        streamed_engine(tiny_bundle, memory=10_000)

    assert full.value.reason == "memory"


def test_several_engines_share_one_device(tiny_bundle: ModelBundle) -> None:
    """Each has streams and memory of its own; work of one does not wait for the other's."""
    one, device = streamed_engine(tiny_bundle)
    from edge.engines.fake_device import FakeProgram, onnx_compute

    spec = spec_of(tiny_bundle.manifest, "0", "fake device", 4)
    two = StreamedEngine(spec, device, FakeProgram(device, spec, onnx_compute(tiny_bundle), fail_at=frozenset()))
    one.submit(batch_of(2))
    two.submit(batch_of(3, seed=1))

    assert two.collect(10.0)[1].shape == (3, 14, 14)
    assert one.collect(10.0)[1].shape == (2, 14, 14)


def test_memory_outside_of_a_block_is_noticed() -> None:
    """The fake's own check: nothing adjacent is there to be hit unnoticed."""
    device = FakeDevice()
    address = device.allocate(100)

    with pytest.raises(Hazard, match="not allocated"):
        device.view(address + 1, 100)
