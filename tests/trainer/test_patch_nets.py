"""Patch networks: the paper's geometry, patch = dense at every position, seeded weights, shared normalization."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trainer.patch_nets import LAYERS, PROFILES, Family, InputNormalization, PatchNetSpec, build_patch_net

TINY: dict[tuple[Family, int], PatchNetSpec] = {
    ("paper", 17): PatchNetSpec(17, (4, 5, 6), 7),
    ("paper", 33): PatchNetSpec(33, (4, 5, 6), 7),
    ("paper", 65): PatchNetSpec(65, (4, 5, 6, 6), 7),
    ("pdn", 33): PatchNetSpec(33, (4, 5, 6), 7, "pdn"),
}


@pytest.mark.parametrize(
    ("family", "patch", "footprint", "stride", "center"),
    [("paper", 17, 17, 1, 8.0), ("paper", 33, 32, 4, 15.5), ("paper", 65, 60, 8, 29.5), ("pdn", 33, 33, 4, 16.0)],
)
def test_geometry_is_the_papers(family: Family, patch: int, footprint: int, stride: int, center: float) -> None:
    """Pooling floors, so the last rows of a 33 and 65 px patch are never seen; one patch gives one descriptor."""
    spec = TINY[family, patch]

    assert (spec.footprint, spec.stride, spec.center) == (footprint, stride, center)
    assert build_patch_net(spec, 0)(torch.zeros(1, 3, patch, patch)).shape == (1, 7, 1, 1)


@pytest.mark.parametrize("spec", TINY.values(), ids=lambda spec: f"{spec.family}-{spec.patch}")
def test_a_descriptor_sees_its_footprint_and_nothing_else(spec: PatchNetSpec) -> None:
    """The gradient of one descriptor reaches every row of the footprint, and no row of the patch beyond it."""
    patch = torch.randn(64, 3, spec.patch, spec.patch, requires_grad=True)  # many: a max pool looks away at times
    build_patch_net(spec, 0)(patch).square().sum().backward()
    assert patch.grad is not None

    rows = patch.grad.abs().amax(dim=(0, 1, 3))

    assert (rows > 0).nonzero().flatten().tolist() == list(range(spec.footprint))


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [
        (PROFILES["paper-17"], 2_996_480),
        (PROFILES["paper-33"], 1_616_000),
        (PROFILES["paper-65"], 1_386_624),
        (PatchNetSpec(65, (128, 128, 256, 256), 128), 2_320_640),
        (PROFILES["pdn-s"], 2_694_144),
    ],
)
def test_full_width_parameter_counts_are_the_tables_sums(spec: PatchNetSpec, parameters: int) -> None:
    """Without the decoder: 2.996 M, 1.616 M, 1.387 M (2.321 M if conv3 has 256), and PDN-S's 2 694 144."""
    assert sum(parameter.numel() for parameter in build_patch_net(spec, 0).parameters()) == parameters


def test_the_pdn_pools_by_averages_and_rectifies_plainly() -> None:
    """What the families differ in besides kernels: EfficientAD has ReLU and average pools, the paper neither."""
    kinds = {family: {type(step).__name__ for step in build_patch_net(TINY[family, 33], 0).layers}
             for family in ("paper", "pdn")}  # fmt: skip

    assert kinds == {"paper": {"Conv2d", "LeakyReLU", "MaxPool2d"}, "pdn": {"Conv2d", "ReLU", "AvgPool2d"}}


def test_line_costs_what_the_profile_says() -> None:
    """Teacher and three students at 256 x 256, rim padded to a full 64 x 64 grid: at most 11.1 GFLOP."""
    spec = PROFILES["line"]
    padded = 64 * spec.stride + spec.footprint - spec.stride

    assert spec.grid(padded) == 64
    assert 4 * 2 * spec.macs(padded, padded) <= 11.15e9
    assert spec.grid(256) == 57


@pytest.mark.parametrize(("family", "patch"), sorted(LAYERS))
def test_every_position_of_the_dense_run_is_the_network_on_that_patch(family: Family, patch: int) -> None:
    """Output (i, j) equals the network on the patch whose corner is (stride i, stride j)."""
    spec = TINY[family, patch]
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
    spec = TINY["paper", 33]
    net = build_patch_net(spec, 1)
    image = torch.randn(1, 3, 41, 41)

    assert not torch.allclose(net(image)[:, :, 1, 1], net(image[:, :, 4:36, 5:37])[:, :, 0, 0])


def test_a_seed_gives_the_same_weights_and_another_seed_others() -> None:
    """Weights depend on the seed alone; the global generator is left as it was."""
    spec = TINY["paper", 33]
    before = torch.get_rng_state()
    first, second, other = (build_patch_net(spec, seed) for seed in (4, 4, 5))

    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.last_conv.weight, other.last_conv.weight)


def test_mean_and_deviation_fold_into_the_last_convolution() -> None:
    """The last layer is linear: (W / sigma, (b - mu) / sigma) standardizes the descriptors exactly."""
    net = build_patch_net(TINY["paper", 33], 2)
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


@pytest.mark.parametrize(
    ("family", "patch", "widths", "dim", "message"),
    [
        ("paper", 34, (1, 1, 1), 1, "34 px of family 'paper'; known: 17 px of family 'paper', 33 px"),
        ("pdn", 17, (1, 1, 1), 1, "17 px of family 'pdn'"),
        ("paper", 33, (1, 1), 1, "3 positive widths"),
        ("paper", 33, (1, 0, 1), 1, "3 positive widths"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused(
    family: Family, patch: int, widths: tuple[int, ...], dim: int, message: str
) -> None:
    """Unknown patch, a patch of another family, too few widths, a width of nothing."""
    with pytest.raises(ValueError, match=message):
        PatchNetSpec(patch, widths, dim, family)


@pytest.mark.parametrize("spec", PROFILES.values(), ids=PROFILES.keys())
def test_a_spec_survives_json_and_foreign_json_is_refused(spec: PatchNetSpec) -> None:
    """Checkpoints carry the spec; a key too many or an unknown family means another version wrote it."""
    assert PatchNetSpec.from_json(spec.to_json()) == spec
    for foreign in ({"heads": 3}, {"family": "resnet"}, {"family": 3}):
        with pytest.raises(ValueError, match="not a patch network spec"):
            PatchNetSpec.from_json(spec.to_json() | foreign)


def test_json_without_a_family_is_the_papers() -> None:
    """Teachers written before there were families stay readable, and are written as they were."""
    old = {"patch": 33, "widths": [32, 64, 64], "descriptor_dim": 32}

    assert PatchNetSpec.from_json(old) == PROFILES["line"] and PROFILES["line"].to_json() == old
