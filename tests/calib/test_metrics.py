"""The figures of merit are exact: small cases against brute force, extremes against what they must be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from calib import metrics
from calib.metrics import au_pro, image_auroc, pixel_auroc, rank_pixels

Picture = tuple[NDArray[np.float32], NDArray[np.bool_]]


def brute_auroc(good: NDArray[np.float32], bad: NDArray[np.float32]) -> float:
    """Every pair compared, as the definition says."""
    difference = bad[:, None].astype(np.float64) - good[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def flood(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Components by walking to all eight neighbors."""
    left, found = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        part, border = np.zeros_like(mask), [left.pop()]
        while border:
            y, x = border.pop()
            part[y, x] = True
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            border += near
        found.append(part)
    return found


def brute_au_pro(pictures: list[Picture], limit: float) -> float:
    """PRO and FPR at every distinct threshold, joined by straight lines and cut at the limit."""
    levels = np.unique(np.concatenate([scores.ravel() for scores, _ in pictures]))[::-1]
    parts = [scores[part] for scores, mask in pictures for part in flood(mask)]
    normal = np.concatenate([scores[~mask] for scores, mask in pictures])
    fpr = np.array([0.0] + [(normal >= t).mean() for t in levels])
    pro = np.array([0.0] + [np.mean([(part >= t).mean() for part in parts]) for t in levels])
    inside = fpr < limit
    x = np.append(fpr[inside], limit)
    at_limit = np.interp(limit, fpr, pro) if not (fpr == limit).any() else pro[np.argmax(fpr == limit)]
    return float(np.trapezoid(np.append(pro[inside], at_limit), x) / limit)


@st.composite
def picture_sets(draw: st.DrawFn) -> list[Picture]:
    """A few small pictures whose scores tie often; at least one pixel is defective and one is normal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.integers(1, 30))
    pictures = []
    for _ in range(draw(st.integers(1, 4))):
        shape = tuple(rng.integers(1, 9, size=2))
        pictures.append(
            (rng.integers(0, levels, size=shape).astype(np.float32), rng.random(shape) < rng.uniform(0, 0.6))
        )
    pictures.append((np.float32([[levels / 2, levels / 3]]), np.array([[True, False]])))
    return pictures


def split(pictures: list[Picture]) -> tuple[list[NDArray[np.float32]], list[NDArray[np.bool_] | None]]:
    """Maps and masks; an empty mask is given as None, as for good images."""
    return [scores for scores, _ in pictures], [mask if mask.any() else None for _, mask in pictures]


@settings(max_examples=150, deadline=None)
@given(picture_sets(), st.sampled_from([0.05, 0.3, 0.77, 1.0]))
def test_pixel_figures_equal_brute_force_whatever_ties(pictures: list[Picture], limit: float) -> None:
    """The sorted, compiled pass and the definitions agree to rounding."""
    maps, masks = split(pictures)
    good = np.concatenate([s[~m] for s, m in pictures])
    bad = np.concatenate([s[m] for s, m in pictures])

    assert pixel_auroc(maps, masks) == pytest.approx(brute_auroc(good, bad), abs=1e-12)
    assert au_pro(maps, masks, limit) == pytest.approx(brute_au_pro(pictures, limit), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_image_auroc_equals_every_pair_compared(good: list[int], bad: list[int]) -> None:
    """Ties count one half."""
    assert image_auroc(good, bad) == pytest.approx(brute_auroc(np.float32(good), np.float32(bad)), abs=1e-12)


def two_blobs() -> NDArray[np.bool_]:
    """A large and a small defect in a 100 x 100 picture."""
    mask = np.zeros((100, 100), dtype=bool)
    mask[10:40, 10:40] = mask[80:83, 80:83] = True
    return mask


@pytest.mark.parametrize("limit", [0.30, 0.05])
def test_a_perfect_map_reaches_one_and_a_constant_or_random_one_half_the_limit(limit: float) -> None:
    """What everybody may expect of the scale: 1 at best, limit / 2 for a map that knows nothing, 0 if it lies."""
    mask = two_blobs()
    masks = [mask, None, None]
    good = [np.zeros((100, 100), np.float32)] * 2
    noise = list(np.random.default_rng(3).random((3, 100, 100), dtype=np.float32))

    assert au_pro([mask.astype(np.float32), *good], masks, limit) == pytest.approx(1.0, abs=1e-12)
    assert au_pro([np.zeros((100, 100), np.float32)] * 3, masks, limit) == pytest.approx(limit / 2, abs=1e-12)
    assert au_pro(noise, masks, limit) == pytest.approx(limit / 2, abs=0.08)
    assert au_pro([-mask.astype(np.float32), *good], masks, limit) == pytest.approx(0.0, abs=1e-12)


def test_a_random_map_has_half_the_limit_on_average() -> None:
    """Forty random maps: the mean is limit / 2 within four standard errors."""
    mask, rng = two_blobs(), np.random.default_rng(0)
    values = [au_pro([rng.random((100, 100), dtype=np.float32)], [mask], 0.30) for _ in range(40)]

    assert np.mean(values) == pytest.approx(0.15, abs=4 * np.std(values) / np.sqrt(40))


def test_components_count_alike_whatever_their_size() -> None:
    """Finding only the large blob of two is worth one half in AU-PRO and nearly all of the pixel AUROC."""
    mask = two_blobs()
    found = mask.copy()
    found[80:83, 80:83] = False
    scores = found.astype(np.float32)

    assert au_pro([scores], [mask], 0.05) == pytest.approx(0.5 + 0.5 * 0.025, abs=1e-6)
    assert pixel_auroc([scores], [mask]) > 0.99


def test_diagonal_neighbors_are_one_component() -> None:
    """Two pixels that touch at a corner are one defect; with 4-connectivity they would be two."""
    mask = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=bool)

    assert rank_pixels([np.zeros((3, 3), np.float32)], [mask]).components == 1


def test_pixels_of_good_images_count_as_false_positives() -> None:
    """A map perfect on the defective image but loud on the good one is not perfect."""
    mask = two_blobs()
    loud = np.full((100, 100), 2, np.float32)

    assert au_pro([mask.astype(np.float32)], [mask], 0.30) == pytest.approx(1.0)
    assert au_pro([mask.astype(np.float32), loud], [mask, None], 0.30) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("planted", "values"),
    [
        ("EIGHT_NEIGHBORS", np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.int8)),
        ("_area_to_limit", lambda n, d, w, limit: metrics._integrate(n, d, w, np.floor(limit))),
        ("_area_to_limit", lambda n, d, w, limit: metrics._integrate(n[:-1], d, w, limit)),
    ],
)
def test_planted_errors_are_seen_by_the_comparison(
    monkeypatch: pytest.MonkeyPatch, planted: str, values: object
) -> None:
    """4-connectivity, no interpolation at the limit, one normal pixel lost: brute force differs each time."""
    rng = np.random.default_rng(5)
    pictures = [(rng.integers(0, 40, (9, 9)).astype(np.float32), rng.random((9, 9)) < 0.3) for _ in range(3)]
    maps, masks = split(pictures)
    monkeypatch.setattr(metrics, planted, values)

    assert abs(au_pro(maps, masks, 0.05) - brute_au_pro(pictures, 0.05)) > 1e-6


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        ([np.zeros((2, 2), np.float32)], [], "1 maps but 0 masks"),
        ([np.zeros((2, 2), np.float32)], [np.zeros((2, 3), bool)], "one"),
        ([np.full((2, 2), np.nan, np.float32)], [None], "not finite"),
        ([np.zeros((2, 2), np.float32)], [np.ones((2, 2), bool)], "no normal pixel"),
        ([np.zeros((2, 2), np.float32)], [None], "no defective pixel"),
    ],
)
def test_what_has_no_figure_is_refused_with_the_reason(maps: list, masks: list, message: str) -> None:
    """Never a NaN that looks like a figure."""
    with pytest.raises(ValueError, match=message):
        pixel_auroc(maps, masks)


def test_scores_that_have_no_rank_are_refused() -> None:
    """NaN and an empty side."""
    with pytest.raises(ValueError, match="NaN"):
        image_auroc([0.0, np.nan], [1.0])
    with pytest.raises(ValueError, match="at least one"):
        image_auroc([], [1.0])
