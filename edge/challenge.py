"""The challenge: known good and known bad samples go through the line, which is READY only if it tells them apart.

Owns which samples there are, what passing means, and the event. The samples take the way of every frame: the running
pipeline's preprocessing, engine, threshold and rules (`Pipeline.probe`); no account of frames counts them, no camera
hears of them. When a challenge is due is `challenge_duty`'s, withholding frames the pipeline's.

    DIR/good/*  DIR/bad/*                     for every camera
    DIR/CAMERA/good/*  DIR/CAMERA/bad/*       or for each its own
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from edge.errors import ConfigError, ImageRefused
from edge.events import SCHEMA_VERSION, DefectEvent
from edge.images import IMAGE_SUFFIXES, read_image
from edge.inference import EngineRunner, Scored, Stages, Unjudged, judged
from edge.metrics import Metrics
from edge.protocols import Clock, Engine
from edge.types import Decision, Frame, FrameId, Verdict

CAMERA: Final = "challenge"
"""The camera's name in a challenge's event: a topic of its own, so that who follows a camera never sees one."""

KIND: Final = "challenge"
MAX_SAMPLES: Final = 256
ANSWER_TIMEOUT_S: Final = 60.0
_IN_FLIGHT: Final = 4
"""Samples held in memory at once, whatever their number and size."""
_POLL_S: Final = 0.1
_MAX_DETAIL: Final = 2000
_NAMED: Final = 5
_PROBE: Final = "challenge/"
_WORDS: Final = {Decision.ACCEPT: "accepted", Decision.REJECT: "rejected", Decision.INCONCLUSIVE: "inconclusive"}

Answer = Callable[[Verdict], None]
Probe = Callable[[Frame, Answer], None]
"""Lets the pipeline judge a frame on the side; the answer comes in its verdict thread."""


def probe_name(camera: str) -> str:
    """Under what name a camera's samples go through the pipeline; no camera can be called that."""
    return _PROBE + camera


@dataclass(frozen=True, slots=True)
class Sample:
    """One known part: `name` is its path below the folder, `expected` ACCEPT or REJECT."""

    camera: str
    name: str
    path: Path
    expected: Decision


class Miss(msgspec.Struct, frozen=True):
    """A sample that was not answered as expected, and why in words."""

    camera: str
    sample: str
    expected: str
    decision: str
    detail: str


class ChallengeResult(msgspec.Struct, frozen=True):
    """What came of one challenge; `took_ns` is its duration, `at_ns` Unix time at its end."""

    passed: bool
    samples: int
    missed: tuple[Miss, ...]
    model_id: str
    at_ns: int
    took_ns: int

    @property
    def detail(self) -> str:
        """For people: which sample and why."""
        if self.passed:
            return f"passed: {self.samples} samples answered as they should be"
        first = "; ".join(f"{one.sample} ({one.camera}): {one.detail}" for one in self.missed[:_NAMED])
        more = f"; and {len(self.missed) - _NAMED} more" if len(self.missed) > _NAMED else ""
        return f"failed: {len(self.missed)} of {self.samples} samples: {first}{more}"[:_MAX_DETAIL]


def find_samples(folder: Path, cameras: Collection[str]) -> tuple[Sample, ...]:
    """The samples below `folder` for `cameras`, at least one good and one bad for each.

    Raises:
        ConfigError: the folder is missing, holds something else, or lacks a kind for a camera.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; make it, with good/ and bad/ in it")
    shared = any((folder / kind).is_dir() for kind in ("good", "bad"))
    found = [
        sample
        for camera in cameras
        for sample in _samples_of(camera, folder if shared else folder / camera, folder, cameras if not shared else ())
    ]
    if len(found) > MAX_SAMPLES:
        raise ConfigError(f"{folder}: {len(found)} samples, at most {MAX_SAMPLES}; a challenge is meant to be quick")
    return tuple(found)


def _samples_of(camera: str, folder: Path, root: Path, cameras: Collection[str]) -> Iterator[Sample]:
    for kind, expected in (("good", Decision.ACCEPT), ("bad", Decision.REJECT)):
        paths = sorted(folder.glob(f"{kind}/*"))
        if not paths:
            layout = f"expected {root}/{kind}/* for every camera, or {root}/CAMERA/{kind}/*"
            raise ConfigError(f"{folder / kind}: no sample for camera {camera}; {layout}")
        for path in paths:
            if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
                raise ConfigError(f"{path}: not a picture; expected {', '.join(sorted(IMAGE_SUFFIXES))}")
            yield Sample(camera, path.relative_to(root).as_posix(), path, expected)
    if stray := sorted(path.name for path in root.iterdir() if cameras and path.name not in cameras):
        raise ConfigError(f"{root / stray[0]}: no camera of this line is called so; {', '.join(cameras)} are")


def take(
    samples: Sequence[Sample],
    probe: Probe,
    clock: Clock,
    *,
    timeout_s: float = ANSWER_TIMEOUT_S,
    stopped: Callable[[], bool] = lambda: False,
) -> ChallengeResult:
    """Put all samples through `probe`, a few at a time; one that gets no answer in time, or cannot be read, is missed.

    Each sample has `timeout_s` from when it was given; `stopped` ends the waiting.
    """
    started_ns, epoch = clock.monotonic_ns(), secrets.randbits(53)
    answered: dict[int, Verdict] = {}
    changed = threading.Condition()
    missed: dict[int, Miss] = {}
    awaited: dict[int, int] = {}  # until when

    def note(index: int, verdict: Verdict) -> None:
        with changed:
            answered[index] = verdict
            changed.notify_all()

    def settle(most: int) -> None:
        """Wait until at most so many are under way."""
        with changed:
            while True:
                now_ns = clock.monotonic_ns()
                for index in [index for index, until_ns in awaited.items() if index in answered or now_ns >= until_ns]:
                    del awaited[index]
                if len(awaited) <= most or stopped():
                    return
                changed.wait(_POLL_S)

    for index, sample in enumerate(samples):
        settle(_IN_FLIGHT - 1)
        if stopped():
            break
        frame = _frame(sample, epoch, index, clock)
        if isinstance(frame, Miss):
            missed[index] = frame
            continue
        awaited[index] = clock.monotonic_ns() + round(timeout_s * 1e9)
        probe(frame, partial(note, index))
    settle(0)
    with changed:
        return _result(samples, dict(answered), missed, clock, started_ns, timeout_s)


def take_apart(
    samples: Sequence[Sample], engine: Engine, stages: Stages, clock: Clock, max_batch: int
) -> ChallengeResult:
    """A challenge of a model that does not judge the line (yet): `engine`, closed in the end, and `stages`, here."""
    from prometheus_client import CollectorRegistry

    started_ns, answered = clock.monotonic_ns(), dict[int, Verdict]()

    def hand_over(item: Scored | Unjudged) -> None:
        answered.update({verdict.frame_id.sequence: verdict for verdict in verdicts_of(item, stages)})

    frames = _SampleQueue(samples, clock)
    aside = Metrics(CollectorRegistry(), (), clock)  # series of its own: the line's count what the line did

    def warn(text: str, fields: Mapping[str, object]) -> None: ...  # what fails is a miss

    runner = EngineRunner(engine, lambda: engine, stages, aside, clock, max_batch, 0, hand_over, warn, ANSWER_TIMEOUT_S)
    runner.run(frames)
    return _result(samples, answered, frames.missed, clock, started_ns, ANSWER_TIMEOUT_S)


def verdicts_of(item: Scored | Unjudged, stages: Stages) -> Iterator[Verdict]:
    """What follows from one answer of the inference, frame by frame; `stages` judge what was never scored."""
    if isinstance(item, Unjudged):
        yield stages.decide.inconclusive(item.frame, item.reason, item.detail)
        return
    for frame, model_input, scores, score in zip(item.frames, item.inputs, item.maps, item.scores, strict=True):
        yield judged(item.stages, frame, model_input, scores, float(score), item.geometry)


class _SampleQueue:
    """A `FrameQueue` of samples, each read when it is asked for; `missed` are those that cannot be."""

    def __init__(self, samples: Sequence[Sample], clock: Clock) -> None:
        self.missed: dict[int, Miss] = {}
        self._left = iter(enumerate(samples))
        self._clock = clock

    def get(self, *, timeout: float) -> Frame | None:
        return self.get_nowait()

    def get_nowait(self) -> Frame | None:
        for index, sample in self._left:
            frame = _frame(sample, 0, index, self._clock)
            if isinstance(frame, Frame):
                return frame
            self.missed[index] = frame
        return None


def _frame(sample: Sample, epoch: int, index: int, clock: Clock) -> Frame | Miss:
    try:
        image = read_image(sample.path)
    except ImageRefused as error:
        return Miss(sample.camera, sample.name, sample.expected.value, Decision.INCONCLUSIVE.value, str(error))
    name = FrameId(probe_name(sample.camera), epoch, index, clock.wall_ns())
    return Frame(name, image, clock.monotonic_ns())


def _result(
    samples: Sequence[Sample],
    answered: Mapping[int, Verdict],
    unreadable: Mapping[int, Miss],
    clock: Clock,
    started_ns: int,
    timeout_s: float,
) -> ChallengeResult:
    missed = [
        unreadable.get(index) or _miss(sample, answered.get(index), timeout_s) for index, sample in enumerate(samples)
    ]
    found = tuple(miss for miss in missed if miss is not None)
    model_id = next((verdict.model_id for verdict in answered.values()), "")
    took_ns = clock.monotonic_ns() - started_ns
    return ChallengeResult(not found, len(samples), found, model_id, clock.wall_ns(), took_ns)


def _miss(sample: Sample, verdict: Verdict | None, timeout_s: float) -> Miss | None:
    """What is wrong with a sample's answer; None if nothing is."""
    if verdict is not None and verdict.decision is sample.expected:
        return None
    if verdict is None:
        return Miss(sample.camera, sample.name, sample.expected.value, "none", f"no answer within {timeout_s:g} s")
    detail = f"{_WORDS[verdict.decision]}, expected {_WORDS[sample.expected]}"
    if verdict.score is not None and verdict.threshold is not None:
        side = "above" if verdict.score > verdict.threshold else "not above"
        detail += f": score {verdict.score:.6g} is {side} the threshold {verdict.threshold:.6g}"
    detail += f" ({verdict.detail})" if verdict.detail else ""
    return Miss(sample.camera, sample.name, sample.expected.value, verdict.decision.value, detail)


def event_of_challenge(result: ChallengeResult, line: str, epoch: int, number: int) -> DefectEvent:
    """The event of one challenge, number `number` of the daemon's run `epoch`; the log numbers it at commit."""
    return DefectEvent(
        version=SCHEMA_VERSION,
        id=f"{CAMERA}/{epoch}/{number}",
        line=line,
        camera=CAMERA,
        camera_epoch=epoch,
        frame_sequence=number,
        captured_ns=result.at_ns - result.took_ns,
        decided_ns=result.at_ns,
        latency_ns=result.took_ns,
        # Never "reject": there is no part to be thrown out by whoever does not look at `kind`.
        decision="accept" if result.passed else "inconclusive",
        reason=KIND,
        detail=result.detail,
        score=None,
        threshold=None,
        p_value=None,
        certified=False,
        regions=(),
        frame_height=0,
        frame_width=0,
        model_id=result.model_id,
        mask="none",
        kind=KIND,
    )
