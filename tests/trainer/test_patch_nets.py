"""Patch networks: the paper's geometry, patch = dense at every position, seeded weights, shared normalization."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trainer.patch_nets import LAYERS, PROFILES, InputNormalization, PatchNetSpec, build_patch_net

TINY = {
    17: PatchNetSpec(17, (4, 5, 6), 7),
    33: PatchNetSpec(33, (4, 5, 6), 7),
    65: PatchNetSpec(65, (4, 5, 6, 6), 7),
}


@pytest.mark.parametrize(("patch", "footprint", "stride"), [(17, 17, 1), (33, 32, 4), (65, 60, 8)])
def test_geometry_is_the_papers(patch: int, footprint: int, stride: int) -> None:
    """Pooling floors, so the last rows of a 33 and 65 px patch are never seen; one patch gives one descriptor."""
    spec = TINY[patch]

    assert (spec.footprint, spec.stride) == (footprint, stride)
    assert build_patch_net(spec, 0)(torch.zeros(1, 3, patch, patch)).shape == (1, 7, 1, 1)


def test_full_width_parameter_count_is_the_one_published_for_p_33() -> None:
    """1.616 M parameters without the decoder, the sum over the paper's table with 5x5, 5x5, 2x2, 4x4 kernels."""
    net = build_patch_net(PatchNetSpec(33, (128, 256, 256), 128), 0)

    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(1.616e6, rel=5e-4)


def test_line_costs_what_the_profile_says() -> None:
    """Teacher and three students at 256 x 256, rim padded to a full 64 x 64 grid: at most 11.1 GFLOP."""
    spec = PROFILES["line"]
    padded = 64 * spec.stride + spec.footprint - spec.stride

    assert spec.grid(padded) == 64
    assert 4 * 2 * spec.macs(padded, padded) <= 11.15e9
    assert spec.grid(256) == 57


@pytest.mark.parametrize("patch", sorted(LAYERS))
def test_every_position_of_the_dense_run_is_the_network_on_that_patch(patch: int) -> None:
    """Output (i, j) equals the network on the patch whose corner is (stride i, stride j)."""
    spec = TINY[patch]
    net = build_patch_net(spec, 1)
    image = torch.randn(1, 3, patch + 4 * spec.stride, patch + 2 * spec.stride)
    dense = net(image)

    for i in range(dense.shape[2]):
        for j in range(dense.shape[3]):
            top, left = spec.stride * i, spec.stride * j
            alone = net(image[:, :, top : top + spec.footprint, left : left + spec.footprint])
            torch.testing.assert_close(dense[:, :, i, j], alone[:, :, 0, 0])


def test_a_patch_one_pixel_off_is_noticed() -> None:
    """Control for the test above: the neighboring patch gives another descriptor."""
    spec = TINY[33]
    net = build_patch_net(spec, 1)
    image = torch.randn(1, 3, 41, 41)

    assert not torch.allclose(net(image)[:, :, 1, 1], net(image[:, :, 4:36, 5:37])[:, :, 0, 0])


def test_a_seed_gives_the_same_weights_and_another_seed_others() -> None:
    """Weights depend on the seed alone; the global generator is left as it was."""
    spec = TINY[33]
    before = torch.get_rng_state()
    first, second, other = (build_patch_net(spec, seed) for seed in (4, 4, 5))

    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.last_conv.weight, other.last_conv.weight)


def test_mean_and_deviation_fold_into_the_last_convolution() -> None:
    """The last layer is linear: (W / sigma, (b - mu) / sigma) standardizes the descriptors exactly."""
    net = build_patch_net(TINY[33], 2)
    image = torch.randn(1, 3, 48, 48)
    mean, deviation = torch.randn(7), torch.rand(7) + 0.5
    expected = (net(image) - mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)

    conv = net.last_conv
    bias = conv.bias
    assert bias is not None
    conv.weight = nn.Parameter(conv.weight / deviation.view(-1, 1, 1, 1))
    conv.bias = nn.Parameter((bias - mean) / deviation)

    torch.testing.assert_close(net(image), expected, rtol=1e-4, atol=1e-4)


def test_gray_pixels_are_treated_as_equal_channels() -> None:
    """One channel and the same three times give the same normalized input."""
    gray = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 5, 6, 1), dtype=np.uint8))

    from_gray = InputNormalization()(gray)

    assert from_gray.shape == (2, 3, 5, 6)
    assert torch.equal(from_gray, InputNormalization()(gray.repeat(1, 1, 1, 3)))


@pytest.mark.parametrize(("patch", "widths", "dim"), [(34, (1, 1, 1), 1), (33, (1, 1), 1), (33, (1, 0, 1), 1)])
def test_a_spec_that_cannot_be_built_is_refused(patch: int, widths: tuple[int, ...], dim: int) -> None:
    """Unknown patch, too few widths, a width of nothing."""
    with pytest.raises(ValueError, match=r"patch|widths"):
        PatchNetSpec(patch, widths, dim)


def test_a_spec_survives_json_and_foreign_json_is_refused() -> None:
    """Checkpoints carry the spec; a key too many means another version wrote it."""
    spec = PROFILES["line"]

    assert PatchNetSpec.from_json(spec.to_json()) == spec
    with pytest.raises(ValueError, match="not a patch network spec"):
        PatchNetSpec.from_json(spec.to_json() | {"heads": 3})
