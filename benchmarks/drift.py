"""How soon is a drift noticed, and how often without one? The watch beside ADWIN and a plain martingale.

Scores come from the shipped demo bundle's graph: its good photographs that it was not trained on, each moved by up to
4 px, exposed 2 % more or less and with noise of one gray level, as a line sees parts; and the same with all pixels 10 %
brighter. Streams are drawn from these scores with replacement. Every detector first gets the calibration sample (SAMPLE
parts), then clean parts, then brighter ones.

    watch       `edge.stages.watch` with its default of one false alarm in 10 million parts
    adwin       river's ADWIN on the scores, with its default delta of 0.002
    adwin_rare  with a delta of 1e-7: about as few false alarms as the watch promises
    martingale  the product of the watch's own bets without forgetting, alarm at 100: at most 1 % of lines ever alarm
                falsely (Ville), whatever their length

`false_alarms` counts runs of CLEAN clean parts that alarmed, `false_alarms_with_bad` runs in which BAD_SHARE of the
parts are bad ones (the demo's photographs of them): a certificate is about good parts, and bad ones are why a line is
inspected. `delay` is in parts after the change, over `runs` of them,
for a change after 1,000 and after 20,000 clean parts. Prints one JSON object; run with `python benchmarks/drift.py
[--runs N] [--clean-runs N] [--only NAME ...]`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from calib.dataset import file_sha256
from edge.bundle import ModelBundle, open_bundle
from edge.demo.line import BUNDLE, PHOTOS
from edge.engines.registry import open_engine
from edge.images import read_image
from edge.stages.preprocess import prepare
from edge.stages.watch import EXPONENTS, Watch, WatchSettings

BRIGHTER = 1.10
SAMPLE = 299
CLEAN = 100_000
BAD_SHARE = 0.02
LONGEST = 5_000
"""Parts after the change; a drift not noticed by then counts as missed."""

Scores = NDArray[np.float64]


class Detector(Protocol):
    """Told one score after the other."""

    def alarms(self, score: float) -> bool: ...


class Watched:
    """The watch as a line runs it."""

    def __init__(self, sample: Scores, parts_between: float = WatchSettings().parts_between_false_alarms) -> None:
        self._watch = Watch(sample.tolist(), float(sample.max()), WatchSettings(parts_between))

    def alarms(self, score: float) -> bool:
        """At the first alarm."""
        return self._watch.observe(score) is not None


class Adwin:
    """River's ADWIN on raw scores."""

    def __init__(self, sample: Scores, delta: float) -> None:
        from river import drift

        self._adwin = drift.ADWIN(delta=delta)
        for score in sample.tolist():
            self._adwin.update(score)

    def alarms(self, score: float) -> bool:
        """A change of the mean within its window."""
        self._adwin.update(score)
        return bool(self._adwin.drift_detected)


class Martingale:
    """A mixture of power martingales on online conformal p-values, never restarted (Vovk et al. 2005, ch. 7)."""

    def __init__(self, sample: Scores, limit: float = 100.0, seed: int = 0) -> None:
        self._watch = Watch(sample.tolist(), float("inf"), seed=seed)  # for its p-values
        self._log = np.zeros(2 * len(EXPONENTS))
        self._limit = np.log(limit)

    def alarms(self, score: float) -> bool:
        """The mixture's capital is beyond the limit."""
        p = self._watch._p_value(score)
        powers = np.array(EXPONENTS)
        self._log += np.concatenate(
            [np.log(powers) + (powers - 1) * np.log(p), np.log(powers) + (powers - 1) * np.log1p(-p)]
        )
        top = self._log.max()
        return bool(top + np.log(np.exp(self._log - top).mean()) >= self._limit)


DETECTORS: dict[str, Callable[[Scores], Detector]] = {
    "watch": Watched,
    "adwin": lambda sample: Adwin(sample, 0.002),
    "adwin_rare": lambda sample: Adwin(sample, 1e-7),
    "martingale": Martingale,
}


GOOD, BAD = (PHOTOS / "train" / "good", PHOTOS / "test" / "good"), (PHOTOS / "test" / "color",)


def parts(
    bundle: ModelBundle, variants: int, folders: tuple[Path, ...] = GOOD, seed: int = 0
) -> Iterator[NDArray[np.float64]]:
    """Pictures (H, W, C) of parts as a line sees them, not yet rounded; none that the bundle was trained on."""
    known, rng = set(bundle.provenance["training_files"]), np.random.default_rng(seed)
    for path in sorted(path for folder in folders for path in folder.iterdir()):
        if file_sha256(path) in known:
            continue
        image = read_image(path)
        for _ in range(variants):
            moved = np.roll(image, rng.integers(-4, 5, 2), (0, 1)).astype(np.float64)
            yield moved * rng.uniform(0.98, 1.02) + rng.normal(0, 1, image.shape)


def real_scores(variants: int, *, gain: float = 1.0, folders: tuple[Path, ...] = GOOD) -> Scores:
    """Scores of the demo's parts by its own graph, their pixels times `gain`."""
    bundle, found = open_bundle(BUNDLE), []
    with open_engine(bundle, backend="openvino", streams=1, max_batch=1) as engine:
        for picture in parts(bundle, variants, folders):
            pixels, _ = prepare(np.clip(np.rint(picture * gain), 0, 255).astype(np.uint8), bundle.manifest.input)
            found.append(float(engine.infer(pixels[None])[1][0]))
    return np.array(found)


def until_alarm(detector: Detector, scores: Scores) -> int | None:
    """Parts seen when it alarms; None if it does not."""
    return next((place for place, score in enumerate(scores.tolist(), start=1) if detector.alarms(score)), None)


def false_alarms(
    make: Callable[[Scores], Detector], clean: Scores, runs: int, length: int = CLEAN, bad: Scores | None = None
) -> int:
    """How many of `runs` lines alarmed within `length` clean parts; with `bad`, BAD_SHARE of them are such."""
    found = 0
    for run in range(runs):
        rng = np.random.default_rng([1, run])
        detector, live = make(rng.choice(clean, SAMPLE)), rng.choice(clean, length)
        if bad is not None:
            live = np.where(rng.random(length) < BAD_SHARE, rng.choice(bad, length), live)
        found += until_alarm(detector, live) is not None
    return found


def delays(
    make: Callable[[Scores], Detector], clean: Scores, drifted: Scores, before: int, runs: int
) -> dict[str, Any]:
    """Parts from the change to the alarm; runs that alarmed before the change are counted apart."""
    found: list[int] = []
    early = missed = 0
    for run in range(runs):
        rng = np.random.default_rng([2, before, run])
        detector = make(rng.choice(clean, SAMPLE))
        if until_alarm(detector, rng.choice(clean, before)) is not None:
            early += 1
            continue
        delay = until_alarm(detector, rng.choice(drifted, LONGEST))
        missed += delay is None
        found += [] if delay is None else [delay]
    spread = np.quantile(found, [0.5, 0.95, 1.0]).tolist() if found else [None] * 3
    return {"runs": runs, "early": early, "missed": missed,
            **dict(zip(("median", "p95", "max"), spread, strict=True))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", type=int, default=12, help="pictures made of each photograph")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--clean-runs", type=int, default=10)
    parser.add_argument("--only", choices=[*DETECTORS], nargs="+", default=[*DETECTORS])
    given = parser.parse_args()
    clean, bright = real_scores(given.variants), real_scores(given.variants, gain=BRIGHTER)
    bad = real_scores(4, folders=BAD)
    found: dict[str, Any] = {
        "bundle": Path(BUNDLE).name,
        "scores": {name: {"median": float(np.median(one)), "max": float(one.max()), "number": len(one)}
                   for name, one in (("clean", clean), ("brighter", bright), ("bad", bad))},
        "sample": SAMPLE,
        "clean_parts_per_run": CLEAN,
    }  # fmt: skip
    for name in given.only:
        make = DETECTORS[name]
        found[name] = {
            "clean_runs": given.clean_runs,
            "false_alarms": false_alarms(make, clean, given.clean_runs),
            "false_alarms_with_bad": false_alarms(make, clean, given.clean_runs, bad=bad),
            "delay_after_1000": delays(make, clean, bright, 1_000, given.runs),
            "delay_after_20000": delays(make, clean, bright, 20_000, max(1, given.runs // 5)),
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
