"""The certificate keeps its promise in simulated calibrations whose true false-reject rate is known."""

from __future__ import annotations

import pytest

from benchmarks import certificate
from benchmarks.certificate import cases, simulate

KEPT, CONTROLS = ("parts", "frames", "blocks", "zones"), ("frames_ungrouped", "blocks_ungrouped", "zones_each_alone")


@pytest.fixture(scope="module")
def cheap() -> tuple[dict[str, certificate.Calibration], dict[str, certificate.Calibration]]:
    """With a shorter reference; `python benchmarks/certificate.py` is the whole thing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "REFERENCE", 100_000)
        return cases()


@pytest.mark.parametrize("name", KEPT)
def test_the_true_rate_exceeds_the_certified_one_as_rarely_as_stated(
    cheap: tuple[dict[str, certificate.Calibration], ...], name: str
) -> None:
    """300 calibrations at 1 % and 95 %; the exact binomial test does not find more than 5 % of them broken."""
    found = simulate(cheap[0][name], 300)

    assert found["p_value"] > 0.001 and found["broken"] > 0


@pytest.mark.parametrize("name", CONTROLS)
def test_control_frames_counted_as_parts_break_the_promise_and_are_seen(
    cheap: tuple[dict[str, certificate.Calibration], ...], name: str
) -> None:
    """The planted faults: no grouping, no blocks, no correction for two thresholds."""
    assert simulate(cheap[1][name], 300)["p_value"] < 1e-6


def test_blocks_are_cut_as_the_command_cuts_them() -> None:
    """Maxima of whole blocks, with the frames between them left out."""
    assert certificate.block_maxima(certificate.np.arange(10.0), 2, 2).tolist() == [1.0, 5.0, 9.0]
