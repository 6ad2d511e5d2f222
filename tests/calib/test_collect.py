"""A folder is scored exactly as the daemon would, in its order, and every file that cannot be scored is named."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calib.collect import collect
from calib.dataset import read_stored_image
from calib.progress import progress
from edge.bundle import ModelBundle
from edge.engines.fake import FakeEngine, spec_of
from edge.errors import DataError, EngineError
from edge.images import encode_png
from edge.stages.preprocess import prepare
from edge.types import Decision, Reason


@pytest.fixture
def bundle(make_fake_bundle: Callable[..., ModelBundle], tmp_path: Path) -> ModelBundle:
    """A gray bundle for the fake engine."""
    return make_fake_bundle(tmp_path / "bundle")


@pytest.fixture
def paths(test_folder: Path) -> list[Path]:
    """Pictures of several sizes, some with a white square."""
    return sorted((test_folder / "test" / "hole").iterdir()) + sorted((test_folder / "test" / "good").iterdir())[:4]


def test_scores_come_in_the_order_of_the_files_and_equal_a_direct_run(bundle: ModelBundle, paths: list[Path]) -> None:
    """Several tickets are in flight; each answer still belongs to its own file."""
    with FakeEngine(spec_of(bundle.manifest, depth=3)) as engine:
        found = list(collect(bundle, engine, paths))
    with FakeEngine(spec_of(bundle.manifest)) as engine:
        direct = [engine.infer(prepare(read_stored_image(path), bundle.manifest.input)[0][None]) for path in paths]

    assert [one.path for one in found] == paths
    assert [one.verdict.score for one in found] == [float(scores[0]) for _, scores in direct]
    assert all(np.array_equal(one.anomaly_map.scores, maps[0]) for one, (maps, _) in zip(found, direct, strict=True))
    assert [one.verdict.frame_size for one in found][:2] == [(64, 96), (72, 96)]


def test_a_mixed_up_ticket_is_noticed(bundle: ModelBundle, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: an engine that answers out of order would give every file another's score."""
    with FakeEngine(spec_of(bundle.manifest, depth=3)) as engine:
        collect_one = engine.collect
        monkeypatch.setattr(engine, "collect", lambda timeout_s: (engine._out.rotate(1), collect_one(timeout_s))[1])

        with pytest.raises(EngineError, match="answered ticket"):
            list(collect(bundle, engine, paths))


def spoil(folder: Path) -> None:
    """One file cut short, one that is no image, one too small for the bundle, one in color for a gray model."""
    whole = encode_png(np.full((64, 64, 1), 128, np.uint8))
    (folder / "003.png").write_bytes(whole[:-20])
    (folder / "007.png").write_bytes(encode_png(np.full((8, 8, 1), 128, np.uint8)))
    (folder / "008.png").write_bytes(encode_png(np.full((64, 64, 3), 128, np.uint8)))
    (folder / "notes.txt").write_text("hello")


def test_bad_files_are_refused_together_and_by_name(bundle: ModelBundle, test_folder: Path) -> None:
    """Whoever cleans up the folder does it once."""
    folder = test_folder / "test" / "good"
    spoil(folder)
    with FakeEngine(spec_of(bundle.manifest)) as engine, pytest.raises(DataError, match="4 of 13") as refused:
        list(collect(bundle, engine, sorted(folder.iterdir())))

    assert all(
        name in str(refused.value) for name in ("003.png", "007.png", "008.png", "notes.txt", "--skip-bad-images")
    )


def test_bad_files_are_inconclusive_when_they_may_be_skipped(bundle: ModelBundle, test_folder: Path) -> None:
    """The verdict that the daemon would give, in its place in the order; the others are scored as before."""
    folder = test_folder / "test" / "good"
    spoil(folder)
    with FakeEngine(spec_of(bundle.manifest)) as engine:
        found = list(collect(bundle, engine, sorted(folder.iterdir()), skip_bad=True))
    bad = {one.path.name: one.verdict.reason for one in found if one.verdict.decision is Decision.INCONCLUSIVE}

    assert [one.path.name for one in found] == sorted(path.name for path in folder.iterdir())
    assert bad == {
        "003.png": Reason.UNREADABLE,
        "007.png": Reason.SHAPE,
        "008.png": Reason.SHAPE,
        "notes.txt": Reason.UNREADABLE,
    }


def test_an_engine_fault_names_the_file(bundle: ModelBundle, paths: list[Path]) -> None:
    """The third batch fails."""
    with (
        FakeEngine(spec_of(bundle.manifest), fail_tickets={2}) as engine,
        pytest.raises(EngineError, match=r"002\.png"),
    ):
        list(collect(bundle, engine, paths))


def test_progress_is_one_line_a_minute_when_nobody_watches() -> None:
    """Two and a half minutes of work on a manual clock: two lines with the time left."""
    out, now = io.StringIO(), iter([0.0, 30.0, 61.0, 90.0, 125.0])
    with progress("evaluate", 10, stream=out, monotonic=lambda: next(now)) as advance:
        for done in (1, 2, 4, 5):
            advance(done)

    assert out.getvalue().splitlines() == ["evaluate: 2 of 10, 4.1 min left", "evaluate: 5 of 10, 2.1 min left"]
