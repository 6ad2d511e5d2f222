"""Dense networks against the patch network run on every patch, one by one; and what cannot be made dense.

The reference is always the plainest thing there is: cut the patch, run the network, look at the one answer.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import edge.demo
import trainer.fdfe as module
from edge.errors import TrainingError
from edge.images import read_image
from trainer.distill import load_teacher
from trainer.fdfe import CannotDensify, Form, densify
from trainer.patch_nets import InputNormalization, PatchNet, PatchNetSpec, build_patch_net
from trainer.student_scale import padded

PHOTOGRAPHS = Path(next(iter(edge.demo.__path__))) / "photos" / "train" / "good"

FORMS: tuple[Form, ...] = ("multipool", "dilated")
NARROW = {
    "p17": PatchNetSpec(17, (4, 5, 6), 7),
    "p33": PatchNetSpec(33, (4, 5, 6), 7),
    "p65": PatchNetSpec(65, (4, 5, 6, 6), 7),
    "pdn": PatchNetSpec(33, (4, 5, 6), 7, family="pdn"),
}


@torch.no_grad()
def patch_by_patch(net: nn.Module, image: Tensor, patch: int, stride: int) -> Tensor:
    """The network on the patch at every multiple of ``stride``, (N, k, rows, columns)."""
    rows, columns = ((side - patch) // stride + 1 for side in image.shape[2:])
    answers = [
        net(image[:, :, y * stride : y * stride + patch, x * stride : x * stride + patch]).flatten(1)
        for y in range(rows)
        for x in range(columns)
    ]
    return torch.stack(answers, 2).unflatten(2, (rows, columns))


def image_of(height: int, width: int, channels: int = 3, count: int = 2) -> Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", NARROW)
def test_every_network_of_the_paper_is_equal_at_every_position(name: str, stride: int, form: Form) -> None:
    """p = 17, 33, 65 and EfficientAD's PDN; H != W, neither a multiple of the network's own stride."""
    spec = NARROW[name]
    net = build_patch_net(spec, 3).eval()
    image = image_of(spec.patch + 13, spec.patch + 6)

    with torch.no_grad():
        dense = densify(net, spec.patch, stride, form)(image)

    torch.testing.assert_close(dense, patch_by_patch(net, image, spec.patch, stride), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_trained_network_is_equal_at_every_pixel_of_a_photograph_borders_included(form: Form) -> None:
    """The shipped teacher on a shipped photograph with zeros around it, a descriptor for every pixel: 1e-4 at most."""
    photograph = read_image(PHOTOGRAPHS / "00.jpg")[100:148, 80:120]
    pixels = InputNormalization()(torch.from_numpy(photograph[None]))
    around = padded(pixels, 33, "zero")
    net = load_teacher("line").net

    with torch.no_grad():
        dense = densify(net, 33, 1, form)(around)

    assert dense.shape[2:] == (48, 40)
    assert float((dense - patch_by_patch(net, around, 33, 1)).abs().max()) <= 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_an_image_of_one_patch_gives_one_answer(form: Form) -> None:
    """The smallest image there is: every phase but one lies outside it."""
    net = build_patch_net(NARROW["p65"], 3).eval()
    image = image_of(65, 65)

    torch.testing.assert_close(densify(net, 65, 1, form)(image), net(image))


@st.composite
def random_networks(draw: st.DrawFn) -> tuple[nn.Sequential, int]:
    """A chain of convolutions, poolings and pointwise layers, and the patch size that leaves exactly one value."""
    layers: list[nn.Module] = []
    channels, side = 2, 1
    plan: list[tuple[str, int, int, int]] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "max", "avg"]))
        kernel = draw(st.integers(1 if kind == "conv" else 2, 3))
        stride = draw(st.integers(1, 3))
        dilation = 1 if kind == "avg" else draw(st.integers(1, 2))
        plan.append((kind, kernel, stride, dilation))
    for _, kernel, stride, dilation in reversed(plan):
        side = (side - 1) * stride + (kernel - 1) * dilation + 1
    # Poolings floor: a patch may be a little larger than what is seen of it.
    patch = side + draw(st.integers(0, 2))
    for kind, kernel, stride, dilation in plan:
        if kind == "conv":
            groups = draw(st.sampled_from([1, channels]))
            layers.append(nn.Conv2d(channels, 2 * groups, kernel, stride, 0, dilation, groups))
            channels = 2 * groups
            layers.append(draw(st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.1), nn.BatchNorm2d(channels), nn.Tanh()])))
        elif kind == "max":
            layers.append(nn.MaxPool2d(kernel, stride, 0, dilation))
        else:
            layers.append(nn.AvgPool2d(kernel, stride))
    return nn.Sequential(*layers).eval(), patch


@settings(max_examples=120, deadline=None)
@given(made=random_networks(), stride=st.integers(1, 7), extra=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_any_chain_of_layers_at_any_stride_is_equal_in_both_forms(
    made: tuple[nn.Sequential, int], stride: int, extra: tuple[int, int]
) -> None:
    """Strides of 2 and 3 mixed, kernels smaller than strides, dilation in the network itself, sides of any size."""
    net, patch = made
    image = image_of(patch + extra[0], patch + extra[1], channels=2, count=1)
    try:
        dense = [densify(net, patch, stride, form) for form in FORMS]
    except CannotDensify as error:  # the few extra pixels made room for a second answer
        assert "expected 1 x 1" in str(error)
        return
    expected = patch_by_patch(net, image, patch, stride)

    for one in dense:
        with torch.no_grad():
            torch.testing.assert_close(one(image), expected, rtol=1e-4, atol=1e-5)


class LeNet(nn.Module):
    """A patch classifier as people write them: functional activations, flatten, two Linear layers, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 5), nn.Conv2d(4, 6, 5)
        self.pool, self.drop = nn.MaxPool2d(2), nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(8)
        self.fc1, self.fc2 = nn.Linear(6 * 4 * 4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        answer: Tensor = self.fc2(self.drop(torch.relu(self.norm(self.fc1(x)))))
        return answer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [1, 4])
def test_linear_layers_behind_a_flatten_become_convolutions(stride: int, form: Form) -> None:
    """So that an image classifier of crops gives a full map of the image."""
    net = LeNet()
    net(image_of(28, 28, channels=1, count=16))  # running statistics that are not the initial ones
    net.eval()
    image = image_of(37, 33, channels=1)

    with torch.no_grad():
        dense = densify(net, 28, stride, form)(image)

    torch.testing.assert_close(dense, patch_by_patch(net, image, 28, stride), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_shift_by_one_pixel_or_a_wrong_phase_would_be_seen(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bugs for the equality tests: phases put back in the wrong order, a dilation that is forgotten."""
    net = build_patch_net(NARROW["p65"], 3).eval()
    image = image_of(75, 71)
    unwarp, dilated = module._unwarp, module._dilated
    monkeypatch.setattr(module, "_unwarp", lambda x, counts: unwarp(x, counts[::-1]).roll(1, 2))
    monkeypatch.setattr(module, "_dilated", lambda steps, stride: dilated(steps, 1 + stride % 8))

    with torch.no_grad():
        wrong = densify(net, 65, 1, form)(image)

    expected = patch_by_patch(net, image, 65, 1)
    assert wrong.shape != expected.shape or not torch.allclose(wrong, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_dense_and_strided_training_have_one_objective_at_the_positions_that_both_see(form: Form) -> None:
    """A student trained at stride 4 on a CPU and one trained at every pixel on a GPU learn one thing."""
    spec = NARROW["p33"]
    student, teacher = build_patch_net(spec, 1), build_patch_net(spec, 2).eval()
    image = image_of(60, 53)

    def objective(stride: int, every: int) -> Tensor:
        answers = [densify(net, 33, stride, form)(image)[:, :, ::every, ::every] for net in (student, teacher)]
        return ((answers[0] - answers[1]) ** 2).sum(1).mean()

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(student.parameters()))])

    strided, dense = objective(4, 1), objective(1, 4)
    native = ((student(image[:, :, :57, :53]) - teacher(image[:, :, :57, :53])) ** 2).sum(1).mean()

    torch.testing.assert_close(strided, dense)
    torch.testing.assert_close(gradient(strided), gradient(dense), rtol=1e-3, atol=1e-5)
    assert native.shape == ()


def test_a_dense_network_shares_its_parameters_and_a_copy_has_its_own() -> None:
    """Training one form trains the other; a deep copy for export must not follow."""
    net = build_patch_net(NARROW["p33"], 1).eval()
    image = image_of(40, 40)
    dense = densify(net, 33)
    kept = copy.deepcopy(dense)
    before = kept(image)

    with torch.no_grad():
        net.last_conv.weight.mul_(2.0)

    assert {id(p) for p in dense.parameters()} == {id(p) for p in net.parameters()}
    torch.testing.assert_close(kept(image), before)
    assert not torch.allclose(dense(image), before)


def as_onnx(dense: nn.Module, image: Tensor) -> Any:
    import io

    import onnx

    buffer = io.BytesIO()
    torch.onnx.export(
        dense, (image,), buffer, input_names=["x"], output_names=["y"], opset_version=17,
        dynamic_axes={"x": {0: "N"}, "y": {0: "N"}}, dynamo=False,
    )  # fmt: skip
    return onnx.load_from_string(buffer.getvalue())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["p65", "pdn"])
def test_both_forms_export_without_what_tensorrt_refuses_and_give_the_same_numbers(name: str, form: Form) -> None:
    """No dilated pooling, nothing but plain operators; N stays dynamic (design: graph contract)."""
    import onnxruntime as ort

    spec = NARROW[name]
    dense = densify(build_patch_net(spec, 3).eval(), spec.patch, 1, form).eval()
    image = image_of(spec.patch + 10, spec.patch + 3)
    model = as_onnx(dense, image)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    answer = session.run(None, {"x": image[:1].repeat(3, 1, 1, 1).numpy()})[0]

    for node in model.graph.node:
        if node.op_type in ("MaxPool", "AveragePool"):
            assert all(list(a.ints) in ([], [1, 1]) for a in node.attribute if a.name == "dilations")
            assert all(not a.i for a in node.attribute if a.name == "ceil_mode")
        assert node.op_type not in ("NonZero", "TopK", "Resize", "Loop", "If"), node.op_type
    np.testing.assert_allclose(answer[2], dense(image[:1])[0].detach().numpy(), rtol=1e-4, atol=1e-5)


def sequence(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).eval()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


REFUSED = {
    "1 (AdaptiveAvgPool2d): global pooling": sequence(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)),
    "0 (Conv2d): pads by (1, 1)": sequence(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 5)),
    "0 (MaxPool2d): pads inside": sequence(nn.MaxPool2d(3, 2, padding=1), nn.Conv2d(3, 4, 3)),
    "0 (MaxPool2d): ceil mode": sequence(nn.MaxPool2d(2, 2, ceil_mode=True), nn.Conv2d(3, 4, 3)),
    "1 (BatchNorm2d): statistics of the batch": nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4)),
    "1 (Dropout): drops at random": nn.Sequential(nn.Conv2d(3, 4, 5), nn.Dropout()),
    "1 (InstanceNorm2d): no exact dense form": sequence(nn.Conv2d(3, 4, 5), nn.InstanceNorm2d(4)),
    "0 (MultiheadAttention)": sequence(nn.MultiheadAttention(4, 1)),
    "1 (Linear): takes 7 values": sequence(nn.Flatten(), nn.Linear(7, 1)),
    "0 (Linear): comes without a flatten": sequence(nn.Linear(75, 1)),
    "2 (Conv2d): comes after a flatten": sequence(nn.Flatten(), nn.Linear(75, 4), nn.Conv2d(4, 1, 1)),
    "branches and sums": Residual().eval(),
    "gives 3 x 3 values for a patch of 5": sequence(nn.Conv2d(3, 4, 3)),
    "nothing is left of a 5 px patch": sequence(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 4)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_dense_form_is_refused_by_the_layers_name(message: str) -> None:
    """The message names the layer, and mostly what to write instead."""
    with pytest.raises(CannotDensify) as refusal:
        densify(REFUSED[message], 5)

    assert message in str(refusal.value)


def test_ceil_mode_that_makes_no_difference_on_the_patch_is_taken() -> None:
    """6 px in poolings of 2: nothing to round."""
    net = sequence(nn.MaxPool2d(2, 2, ceil_mode=True), nn.Conv2d(3, 2, 3))
    image = image_of(9, 8)

    torch.testing.assert_close(densify(net, 6)(image), patch_by_patch(net, image, 6, 1))


@pytest.mark.parametrize(
    ("arguments", "message"), [((33, 0), "at least 1 px, got 0"), ((33, 1, "fast"), "unknown dense form 'fast'")]
)
def test_a_stride_or_form_that_makes_no_sense_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    """Before any work is done."""
    with pytest.raises(TrainingError, match=message):
        densify(build_patch_net(NARROW["p33"], 1).eval(), *arguments)


def test_an_image_smaller_than_the_patch_is_refused() -> None:
    """Both sizes are named."""
    dense = densify(PatchNet(NARROW["p33"]).eval(), 33)

    with pytest.raises(TrainingError, match="32 x 40 px is smaller than the network's patch of 33 px"):
        dense(image_of(40, 32))
