"""DROCC's loss by hand, the networks' shapes, the toy manifolds of the paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calib.metrics import image_auroc
from edge.errors import CommandError, TrainingError
from trainer.drocc_nets import LeNetSpec, VectorNet, build_lenet
from trainer.drocc_objective import Objective, adversaries, drocc_loss, saliency
from trainer.fdfe import CannotDensify, densify
from trainer.shell_search import Ascent, Shell


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """f(x) = x . w + b: its worst point on a sphere is known."""

    def __init__(self, w: list[float], b: float) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(b))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w + self.b)[:, None]


def test_the_loss_of_a_linear_network_is_the_one_computed_by_hand() -> None:
    """CE = log(1 + e^-f); the worst point has logit f + r ||w||, and counts mu log(1 + e^(f + r ||w||))."""
    net = Linear([0.6, 0.8], 0.2)
    x = torch.tensor([[1.0, -0.5], [0.0, 0.3]])
    logits = [1.0 * 0.6 - 0.5 * 0.8 + 0.2, 0.3 * 0.8 + 0.2]

    value = drocc_loss(net, x, Objective(Shell(1.5), Ascent(400, 0.2), mu=0.5), generator())

    plain = sum(math.log1p(math.exp(-f)) for f in logits) / 2
    worst = sum(math.log1p(math.exp(f + 1.5)) for f in logits) / 2
    assert float(value.detach()) == pytest.approx(plain + 0.5 * worst, rel=2e-3)
    value.backward()  # type: ignore[no-untyped-call]
    assert net.b.grad is not None and float(net.b.grad) != 0


def test_bad_samples_count_by_their_label_and_have_no_adversary() -> None:
    """DROCC-LF: y = 0 joins the cross-entropy; the adversarial term is over good samples alone."""
    net = Linear([0.6, 0.8], 0.2)
    x = torch.tensor([[1.0, -0.5], [3.0, 3.0]])
    label = torch.tensor([1.0, 0.0])
    good, bad = 0.4, 0.6 * 3 + 0.8 * 3 + 0.2

    value = drocc_loss(net, x, Objective(Shell(1.5), Ascent(400, 0.2)), generator(), label=label)

    expected = (math.log1p(math.exp(-good)) + math.log1p(math.exp(bad))) / 2 + math.log1p(math.exp(good + 1.5))
    assert float(value.detach()) == pytest.approx(expected, rel=2e-3)


def test_saliency_is_the_size_of_the_gradient_with_mean_one() -> None:
    """And the weighted shell then lies nearer along the inputs that matter."""
    net = Linear([3.0, -1.0], 0.0)
    x = torch.zeros(2, 2)

    found = adversaries(net, x, Objective(Shell(1.0), Ascent(50, 0.1), metric="saliency"), generator())

    sigma = saliency(net, x)
    torch.testing.assert_close(sigma, torch.tensor([[1.5, 0.5]] * 2))
    torch.testing.assert_close((sigma * found**2).sum(1).sqrt(), torch.ones(2))


def test_the_search_leaves_batch_norm_and_gradients_alone_unless_it_is_the_authors_way() -> None:
    """`joint` searches by running statistics; `apart` lets them drift, as the official code does."""
    net = build_lenet(LeNetSpec("paper", 16, 1), 1).train()
    mean = dict(net.named_buffers())["1.running_mean"]
    before = mean.clone()
    x = torch.randn(4, 1, 16, 16, generator=generator())

    adversaries(net, x, Objective(Shell(4.0), Ascent(2, 0.1)), generator())
    kept = mean.clone()
    adversaries(net, x, Objective(Shell(4.0), Ascent(2, 0.1), batch_norm="apart"), generator())

    assert torch.equal(before, kept) and not torch.equal(before, mean)
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())


def test_a_term_that_is_not_a_number_is_named() -> None:
    """The loop stops before the step; the message says where to look."""
    net = Linear([0.0, 0.0], float("nan"))

    with pytest.raises(TrainingError, match="cross-entropy term"):
        drocc_loss(net, torch.zeros(2, 2), Objective(Shell(1.0), Ascent(0, 1.0)), generator())
    with pytest.raises(TrainingError, match="saliency is 0"):
        saliency(Linear([0.0, 0.0], 1.0), torch.zeros(2, 2))


def test_the_paper_network_has_the_published_shapes() -> None:
    """Deep SVDD's LeNet with 2048 -> 128 -> 64 -> 1 behind it, no bias anywhere, batch norm without parameters."""
    net = build_lenet(LeNetSpec("paper", 32, 3), 1)

    shapes = [tuple(p.shape) for p in net.parameters()]
    assert shapes == [(32, 3, 5, 5), (64, 32, 5, 5), (128, 64, 5, 5), (128, 2048), (64, 128), (1, 64)]
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 1)


@pytest.mark.parametrize("patch", [36, 44])
@pytest.mark.parametrize("stride", [8, 4])
def test_the_dense_network_on_a_frame_equals_itself_on_every_patch(patch: int, stride: int) -> None:
    """What makes a map of an image classifier: FC as convolution, nothing padded."""
    net = build_lenet(LeNetSpec("dense", patch, 1), 3)
    with torch.no_grad():
        net(torch.randn(16, 1, patch, patch, generator=generator()))  # running statistics other than 0 and 1
    net.eval()
    image = torch.randn(1, 1, 70, 62, generator=generator(2))

    with torch.no_grad():
        whole = densify(net, patch, stride, "dilated")(image)[0, 0]
        one_by_one = torch.stack([
            torch.stack([net(image[:, :, y : y + patch, x : x + patch])[0, 0]
                         for x in range(0, 62 - patch + 1, stride)])
            for y in range(0, 70 - patch + 1, stride)
        ])  # fmt: skip

    torch.testing.assert_close(whole, one_by_one, atol=1e-5, rtol=1e-4)


def test_the_padded_network_and_one_in_training_mode_have_no_dense_form() -> None:
    """Padding is inside the crop; statistics of the batch at hand are no function of the patch."""
    with pytest.raises(CannotDensify, match="pads"):
        densify(build_lenet(LeNetSpec("paper", 32, 1), 1).eval(), 32, 8)
    with pytest.raises(CannotDensify, match="eval"):
        densify(build_lenet(LeNetSpec("dense", 36, 1), 1).train(), 36, 8)


@pytest.mark.parametrize(("kind", "patch"), [("paper", 30), ("dense", 32), ("dense", 40)])
def test_a_patch_that_poolings_would_cut_is_refused(kind: str, patch: int) -> None:
    """Rows that no answer depends on would be a silent blind spot."""
    with pytest.raises(CommandError, match="patch_px"):
        LeNetSpec(kind, patch, 1)  # type: ignore[arg-type]


def learned(rows: np.ndarray, objective: Objective, *, steps: int, batch: int = 128) -> VectorNet:
    net = VectorNet(rows.shape[1], seed=1)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    random, data = generator(5), torch.tensor(rows, dtype=torch.float32)
    for _ in range(steps):
        x = data[torch.randint(len(data), (batch,), generator=random)]
        optimizer.zero_grad()
        drocc_loss(net, x, objective, random).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return net


def auroc(net: VectorNet, good: np.ndarray, bad: np.ndarray) -> float:
    with torch.no_grad():
        a, b = ((-net(torch.tensor(rows, dtype=torch.float32))[:, 0]).tolist() for rows in (good, bad))
    return image_auroc(a, b)


def test_points_on_a_sine_are_told_from_the_same_points_shifted() -> None:
    """The paper's toy manifold (table 7): y = sin x, anomalies 0.6 above; without the adversary, chance."""
    random = np.random.default_rng(3)

    def sine(count: int, shift: float) -> np.ndarray:
        x = random.uniform(-2, 2, count)
        return np.stack([x, np.sin(2 * x) + shift], 1)

    rows = sine(500, 0.0)
    net = learned(rows, Objective(Shell(0.4), Ascent(10, 0.05)), steps=500)
    blind = learned(rows, Objective(Shell(0.4), Ascent(0, 1.0), mu=1e-9), steps=500)

    good, bad = sine(400, 0.0), sine(400, 0.6)
    assert auroc(net, good, bad) > 0.9
    assert auroc(blind, good, bad) < 0.8
