"""`kizu evaluate --report`: one page whose curves enclose the figures, with the worst images, for people."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from calib import report
from calib.charts import score_histogram
from calib.evaluate_command import evaluate
from calib.evaluation import Evaluation, Judged, evaluate_bundle
from calib.metrics import image_auroc, rank_pixels
from calib.report import pro_points, report_page, roc_points
from edge.bundle import ModelBundle
from edge.config import EngineConfig
from edge.errors import CommandError

Invoke = Callable[..., Any]
MakeFakeBundle = Callable[..., ModelBundle]


class Page(HTMLParser):
    """Tags, alternative texts and all text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.pictures += [value or "" for name, value in attrs if name == "alt"]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def evaluated(
    make_fake_bundle: MakeFakeBundle, test_folder: Path, tmp_path: Path
) -> tuple[Evaluation, list[Judged], ModelBundle]:
    """The fake engine on twelve good parts, five holes and three stains, of which stains pass."""
    judged: list[Judged] = []
    calibration = msgspec.structs.replace(make_fake_bundle(tmp_path / "high").calibration, threshold=0.5)
    bundle = make_fake_bundle(tmp_path / "bundle", calibration=calibration)
    found = evaluate_bundle(bundle, test_folder, through=EngineConfig("fake"), on_judged=judged.extend)
    return found, judged, bundle


def test_the_page_says_what_the_figures_say(evaluated: tuple[Evaluation, list[Judged], ModelBundle]) -> None:
    """Figures of all and of each kind, what the threshold costs, three charts, and where everything came from."""
    found, judged, bundle = evaluated
    page = Page(report_page(found, judged, bundle))

    assert f"rejected {found.false_rejects} of {found.good} good parts" in page.text
    assert f"let {found.escapes} of {found.defective} bad ones pass" in page.text
    assert {"histogram of image scores", "ROC curve", "PRO curve"} <= set(page.pictures)
    for said in (f"{found.pixel_auroc:.3f}", "hole", "stain", found.model_id, found.data_sha256, "not certified"):
        assert said in page.text


def test_every_miss_and_false_reject_is_shown_worst_first(
    evaluated: tuple[Evaluation, list[Judged], ModelBundle],
) -> None:
    """Bad parts that passed by rising score; the pictures hold photograph, map and marks."""
    found, judged, bundle = evaluated
    page = Page(report_page(found, judged, bundle))
    passed = sorted((row.score, row.path) for row in found.images if row.kind != "good" and row.decision == "accept")

    shown = [alt.split(" with its map")[0] for alt in page.pictures if "with its map" in alt]

    assert len(passed) == found.escapes > 0
    assert shown[: len(passed)] == [path for _, path in passed]
    assert len(shown) == found.escapes + min(found.false_rejects, report.WORST)


def test_control_a_page_that_shows_the_best_instead_of_the_worst_is_caught(
    evaluated: tuple[Evaluation, list[Judged], ModelBundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the other end of the order."""
    found, judged, bundle = evaluated
    ordered = report._ordered
    monkeypatch.setattr(report, "_ordered", lambda *given, **how: ordered(*given, **how)[::-1])

    with pytest.raises(AssertionError):
        test_every_miss_and_false_reject_is_shown_worst_first((found, judged, bundle))


def test_the_curves_enclose_the_figures(evaluated: tuple[Evaluation, list[Judged], ModelBundle]) -> None:
    """The area under the drawn ROC is the AUROC, that under the PRO curve AU-PRO, as far as 200 points say."""
    found, judged, _ = evaluated
    good, bad = (np.array(report._scores(judged, good=side)) for side in (True, False))
    random = np.random.default_rng(0)
    maps = [random.normal(size=(40, 40)).astype(np.float32) for _ in range(4)]
    masks = [np.zeros((40, 40), bool) for _ in maps]
    masks[0][5:15, 5:20] = masks[1][30:33, 2:9] = True
    maps[0][masks[0]] += 2
    maps[1][masks[1]] += 1
    ranking = rank_pixels(maps, masks)

    x, y = roc_points(good, bad)
    shares, overlap = pro_points(ranking, 0.3)

    assert np.trapezoid(y, x) == pytest.approx(image_auroc(good, bad), abs=1e-12)
    assert np.trapezoid(overlap, shares) / 0.3 == pytest.approx(ranking.au_pro(0.3), abs=5e-3)
    assert found.image_auroc == pytest.approx(image_auroc(good, bad))


def test_the_page_is_the_same_each_time(evaluated: tuple[Evaluation, list[Judged], ModelBundle]) -> None:
    """No date, no version of a drawing library: two reports can be compared by their digest."""
    assert report_page(*evaluated) == report_page(*evaluated)


def test_a_hostile_file_name_is_text(make_fake_bundle: MakeFakeBundle, test_folder: Path, tmp_path: Path) -> None:
    """A file whose name is markup."""
    stain = test_folder / "test" / "stain" / "000.png"
    stain.rename(stain.with_name("<script>alert(1)<script>.png"))
    judged: list[Judged] = []
    bundle = make_fake_bundle(tmp_path / "bundle")
    found = evaluate_bundle(bundle, test_folder, through=EngineConfig("fake"), on_judged=judged.extend)

    page = Page(report_page(found, judged, bundle))

    assert "script" not in page.tags and "<script>alert(1)<script>.png" in page.text


def test_the_command_writes_the_page(
    invoke: Invoke, make_fake_bundle: MakeFakeBundle, test_folder: Path, tmp_path: Path
) -> None:
    """Beside the table on the terminal, and says where."""
    bundle, page = make_fake_bundle(tmp_path / "bundle").path, tmp_path / "page.html"

    result = invoke(evaluate, bundle, "--data", test_folder, "--backend", "fake", "--report", page)

    assert f"report: {page}" in result.stderr and page.read_text().startswith("<!DOCTYPE html>")
    assert not re.search(r"https?://", page.read_text())


def test_a_report_that_could_not_be_written_is_refused_before_any_work(
    invoke: Invoke, make_fake_bundle: MakeFakeBundle, test_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder, or no matplotlib: at once, with the command that helps."""
    given = [
        evaluate,
        make_fake_bundle(tmp_path / "bundle").path,
        "--data",
        test_folder,
        "--backend",
        "fake",
        "--report",
    ]

    with pytest.raises(CommandError, match="its folder does not exist"):
        invoke(*given, tmp_path / "nowhere" / "page.html")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CommandError, match=r"pip install 'kizu\[report\]'"):
        invoke(*given, tmp_path / "page.html")


@pytest.mark.parametrize("bad", [[], [0.0], [5.0, 1e9]])
def test_a_histogram_is_drawn_of_whatever_scores_there_are(bad: list[float]) -> None:
    """One good part, none bad, or one far beyond all others."""
    assert score_histogram([1.0], bad, 1.0).startswith(b"\x89PNG")
