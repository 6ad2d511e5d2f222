"""Student-teacher regression: Bergmann et al., "Uninformed Students", CVPR 2020 (arXiv 1911.02357).

Owns the students' loss (section 3.2 of the paper, "Ensemble of Student Networks"), the scores e, v and their sum
(section 3.3, "Scoring Functions for Anomaly Detection"), and the graph that is deployed.  Leaves the teacher to
``distill``, the layer tables to ``patch_nets`` and the order of steps to ``loop``.

With T the teacher, S_1..S_M the students, mu and sigma the teacher's mean and deviation per channel over all positions
of all training images, and every position (r, c) of the map:

    T'      = (T - mu) / sigma
    loss    = sum_i  mean_rc || S_i - T' ||^2                     each student by itself; one sum, separate gradients
    e       = || mean_i S_i - T' ||^2                             the students miss the teacher
    v       = mean_i ||S_i||^2 - || mean_i S_i ||^2               the students disagree (predictive variance)
    score   = (e - e_mu) / e_sigma + (v - v_mu) / v_sigma         scalars over all positions of held-out good images
    image score = max_rc score

Deviations: descriptors lie on the teacher's stride (4 px) instead of every pixel, and only where the whole footprint
lies inside the image, because padded borders make good images peak at the rim.  The students see each image once a
step together, in the same order; the paper trains them one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge.bundle import MapGeometry
from edge.errors import DataError, TrainingError
from trainer.config import StudentTeacherConfig
from trainer.distill import Teacher
from trainer.method import Batch, Frames
from trainer.patch_nets import InputNormalization, PatchNet, build_patch_net

TARGET_CACHE_BYTES = 1 << 30
"""The teacher's answers are kept in memory up to this size (416 kB an image at 256 x 256), else computed every step."""

_CHUNK = 8


class StudentTeacher:
    """``method.Method`` for M students of one teacher; ``seed`` draws the students, each from its own stream."""

    name = "student-teacher"

    def __init__(self, config: StudentTeacherConfig, teacher: Teacher, *, seed: int, device: str = "cpu") -> None:
        self.config = config
        self.teacher = teacher
        self.device = torch.device(device)
        self._teacher_net = teacher.net.to(self.device).eval().requires_grad_(False)
        students = [build_patch_net(teacher.spec, _student_seed(seed, i)) for i in range(config.students)]
        # channels_last: 1.7 x faster a step with one thread (0.116 against 0.201 s an image, three students, AVX-512).
        self.students = nn.ModuleList(students).to(self.device)
        for parameter in self.students.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.normalize = InputNormalization().to(self.device)
        self._targets: Tensor | None = None
        self.mu, self.sigma = torch.zeros(teacher.spec.descriptor_dim), torch.ones(teacher.spec.descriptor_dim)
        self.statistics: dict[str, float] = {}

    @property
    def trainable(self) -> nn.Module:
        """The students."""
        return self.students

    @torch.no_grad()
    def prepare(self, frames: Frames) -> None:
        """Fit mu and sigma on ``frames`` (n, h, w, C) and cache the normalized teacher's answers if they fit.

        Raises:
            DataError: the teacher answers the same everywhere.
        """
        total = torch.zeros(self.teacher.spec.descriptor_dim, dtype=torch.float64)
        squares, positions = total.clone(), 0
        raw = []
        fits = len(frames) * self._answer_bytes(frames.shape) <= TARGET_CACHE_BYTES
        for chunk in _chunks(frames):
            answer = self._teacher_net(self._pixels(chunk)).cpu()
            flat = answer.double().transpose(0, 1).flatten(1)  # (d, positions); fp64: squares of large sums
            total, squares, positions = total + flat.sum(1), squares + (flat**2).sum(1), positions + flat.shape[1]
            if fits:
                raw.append(answer)
        mean = total / positions
        sigma = (squares / positions - mean**2).clamp_min(0).sqrt()
        if not bool((sigma > 0).all()):
            raise DataError(
                f"the teacher {self.teacher.name} answers the same at every place of all {len(frames)} training "
                "images; expected pictures of parts, are these blank?"
            )
        self.mu, self.sigma = mean.float(), sigma.float()
        if fits:
            self._targets = (torch.cat(raw) - self.mu.view(1, -1, 1, 1)) / self.sigma.view(1, -1, 1, 1)

    def loss(self, batch: Batch) -> Tensor:
        """Sum over the students of the mean over positions of the squared L2 distance to T' (paper, section 3.2)."""
        pixels = self._pixels(batch.frames)
        target = self._target(pixels, batch.index)
        return torch.stack([((student(pixels) - target) ** 2).sum(1).mean() for student in self.students]).sum()

    @torch.no_grad()
    def fit_statistics(self, frames: Frames) -> None:
        """Fit e_mu, e_sigma, v_mu, v_sigma over all positions of held-out good images (n, h, w, C).

        Raises:
            TrainingError: e or v does not vary.
        """
        self.statistics = {}
        answers = [self._errors(self._pixels(chunk)) for chunk in _chunks(frames)]
        for name, parts in (("e", [e for e, _ in answers]), ("v", [v for _, v in answers])):
            values = torch.cat([part.flatten() for part in parts]).double()
            mean, deviation = float(values.mean()), float(values.std(correction=0))
            # Relative to e: equal students give a v of pure rounding, about 1e-14 of it, not zero.
            floor = 1e-6 * self.statistics.get("e_mu", mean)
            if not np.isfinite(mean) or not deviation > floor:
                raise TrainingError(
                    f"score {name} has mean {mean:.4g}, deviation {deviation:.4g} over {len(frames)} held-out images; "
                    "nothing can be normalized by that: train longer or at a lower learning rate"
                )
            self.statistics |= {f"{name}_mu": mean, f"{name}_sigma": deviation}

    def deployed(self, channels: int) -> nn.Module:
        """The graph contract as a module on the CPU: uint8 (N, h, w, channels) -> maps (N, h', w'), scores (N,)."""
        return DeployedStudentTeacher(
            self._teacher_net,
            list(self._students()),
            self.mu,
            self.sigma,
            self.statistics,
            channels,
            center=self.config.center,
        )

    def map_geometry(self, height_px: int, width_px: int) -> MapGeometry:
        """Cells at the teacher's stride, centered in its footprint: 57 x 57 for p = 33 at 256 px (offset 15.5)."""
        spec = self.teacher.spec
        return MapGeometry(
            height=spec.grid(height_px), width=spec.grid(width_px), stride=float(spec.stride),
            offset_y=spec.center, offset_x=spec.center, reduction="max",
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """The teacher's name, digest and card, and the fitted scalars."""
        teacher = {"name": self.teacher.name, "sha256": self.teacher.sha256, "card": self.teacher.card}
        return {"teacher": teacher, "statistics": self.statistics}

    def _students(self) -> Iterator[PatchNet]:
        for student in self.students:
            assert isinstance(student, PatchNet)  # nn.ModuleList forgets the type
            yield student

    def _pixels(self, frames: Tensor) -> Tensor:
        """uint8 (N, h, w, C) -> normalized (N, 3, h, w) on the device."""
        pixels: Tensor = self.normalize(frames.to(self.device))
        return pixels.contiguous(memory_format=torch.channels_last)

    def _target(self, pixels: Tensor, index: NDArray[np.int64] | None = None) -> Tensor:
        """T' (B, d, h', w'), from the cache if ``index`` says where and there is one."""
        if index is not None and self._targets is not None:
            return self._targets[torch.from_numpy(index)].to(self.device)
        with torch.no_grad():
            answer: Tensor = self._teacher_net(pixels)
        return (answer - self.mu.to(self.device).view(1, -1, 1, 1)) / self.sigma.to(self.device).view(1, -1, 1, 1)

    def _errors(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """e and v (N, h', w') of normalized pixels, on the CPU."""
        e, v = student_errors(self._target(pixels), [student(pixels) for student in self.students])
        return e.cpu(), v.cpu()

    def _answer_bytes(self, shape: tuple[int, ...]) -> int:
        spec = self.teacher.spec
        return 4 * spec.descriptor_dim * spec.grid(shape[1]) * spec.grid(shape[2])


def student_errors(target: Tensor, students: list[Tensor]) -> tuple[Tensor, Tensor]:
    """e and v (N, h', w') from T' (N, d, h', w') and the M students' answers of that shape (paper, section 3.3).

    v is computed as mean_i ||S_i - mean S||^2, equal to the printed difference of sums but free of its cancellation.
    """
    mean = students[0]
    for answer in students[1:]:
        mean = mean + answer
    mean = mean / len(students)
    e = ((mean - target) ** 2).sum(1)
    v = ((students[0] - mean) ** 2).sum(1)
    for answer in students[1:]:
        v = v + ((answer - mean) ** 2).sum(1)
    return e, v / len(students)


class DeployedStudentTeacher(nn.Module):
    """Teacher, students, e, v and their normalization as one graph: uint8 (N, h, w, C) -> (N, h', w'), (N,).

    Input normalization is folded into the first convolutions and mu, sigma into the teacher's last: exact, since no
    layer pads, and for gray input the first layers then cost a third.
    """

    def __init__(
        self, teacher: PatchNet, students: list[PatchNet], mu: Tensor, sigma: Tensor, statistics: dict[str, float],
        channels: int, *, center: Literal["none", "image"] = "none",
    ) -> None:  # fmt: skip
        super().__init__()
        self.center = center
        self.teacher = _with_raw_input(teacher, channels)
        self.students = nn.ModuleList(_with_raw_input(student, channels) for student in students)
        _standardize_output(self.teacher.last_conv, mu, sigma)
        # score = e / e_sigma + v / v_sigma - shift
        self.e_scale, self.v_scale = 1 / statistics["e_sigma"], 1 / statistics["v_sigma"]
        self.shift = statistics["e_mu"] * self.e_scale + statistics["v_mu"] * self.v_scale

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        pixels = frames.float().permute(0, 3, 1, 2)  # (N, C, h, w); cast before permute, as TensorRT wants it
        e, v = student_errors(self.teacher(pixels), [student(pixels) for student in self.students])
        anomaly_map = e * self.e_scale + v * self.v_scale - self.shift
        if self.center == "image":
            anomaly_map = anomaly_map - anomaly_map.mean((1, 2), keepdim=True)
        return anomaly_map, anomaly_map.amax((1, 2))


def _with_raw_input(net: PatchNet, channels: int) -> PatchNet:
    """A copy on the CPU for pixels 0..255 of ``channels`` channels: w' = w / std, b' = b - sum w' mean."""
    copy = PatchNet(net.spec)
    copy.load_state_dict({name: tensor.detach().cpu() for name, tensor in net.state_dict().items()})
    first = copy.layers[0]
    assert isinstance(first, nn.Conv2d)
    normalize = InputNormalization()
    weight = first.weight.detach().double() / normalize.std
    assert first.bias is not None
    bias = first.bias.detach().double() - (weight * normalize.mean).sum((1, 2, 3))
    if channels == 1:
        weight = weight.sum(1, keepdim=True)  # the gray value is every color
    folded = nn.Conv2d(channels, first.out_channels, first.kernel_size)  # type: ignore[arg-type]
    folded.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    copy.layers[0] = folded
    return copy.eval().requires_grad_(False)


def _standardize_output(conv: nn.Conv2d, mu: Tensor, sigma: Tensor) -> None:
    """Fold (y - mu) / sigma into the linear convolution that gives y (reference, section 10)."""
    conv.weight.data = (conv.weight.double() / sigma.double().view(-1, 1, 1, 1)).float()
    assert conv.bias is not None
    conv.bias.data = ((conv.bias.double() - mu.double()) / sigma.double()).float()


def _student_seed(seed: int, index: int) -> int:
    """Far apart, so that neither neighboring seeds nor the teacher's own share a student."""
    return int(np.random.SeedSequence([seed, 0x5EED, index]).generate_state(1, np.uint64)[0] >> 1)


def _chunks(frames: Frames) -> Iterator[Tensor]:
    for start in range(0, len(frames), _CHUNK):
        yield torch.from_numpy(np.ascontiguousarray(frames[start : start + _CHUNK]))
