"""One receptive field: a teacher and its students, what they learn, and what they say of an image.

Owns the networks of one scale, their evaluation at any stride, the normalized targets and the loss.  Leaves the sum
over scales, the normalization of scores and the deployed graph to the method, formulas to ``student_losses``.

With T the teacher, S_1..S_M the students, mu and sigma the teacher's mean and deviation per channel over all positions
of all training images, and every position (r, c) that is learned from:

    T'      = (T - mu) / sigma
    loss    = sum_i  mean_rc || S_i - T' ||^2                     each student by itself; one sum, separate gradients
    e       = || mean_i S_i - T' ||^2                             the students miss the teacher
    v       = mean_i ||S_i||^2 - || mean_i S_i ||^2               the students disagree (predictive variance)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from edge.errors import CommandError, DataError
from trainer.autoencoder import AutoEncoder
from trainer.backbone_teacher import BackboneTeacher
from trainer.config import Pad, StudentTeacherConfig
from trainer.distill import Teacher
from trainer.distill_losses import varied_exposure
from trainer.fdfe import DenseNet, Form, densify
from trainer.gaussian_metric import GaussianMetric, fit_metric
from trainer.method import Batch, Frames
from trainer.patch_nets import InputNormalization, PatchNet, PatchNetSpec, build_patch_net
from trainer.photographs import Photographs, read_photographs
from trainer.student_losses import hard_distance, jittered, mean_distance, mean_square

TARGET_CACHE_BYTES = 1 << 30
"""The teacher's answers are kept in memory up to this size (416 kB an image of ``line`` at 256 x 256), else computed
every step."""

GRAY_PHOTOGRAPHS = 0.3
"""Share of the penalty's photographs that are turned gray (EfficientAD, algorithm 1)."""

GAUSSIAN = ("gaussian", "placed")

_CHUNK = 8


class Scale:
    """One teacher with its students.

    ``nets`` are the networks with parameters to learn: one a student, or one with ``heads="shared"``; ``autoencoder``
    is EfficientAD's or None.  Pixels are uint8 (N, h, w, C) frames throughout; maps are (N, h', w') on the CPU.
    """

    def __init__(self, config: StudentTeacherConfig, teacher: Teacher, *, seed: int, number: int, device: str) -> None:
        self.config, self.teacher, self.device = config, teacher, torch.device(device)
        self.spec: PatchNetSpec = teacher.spec
        self.stride = config.stride or teacher.spec.stride
        self.train_stride = config.train_stride or self.stride
        self.teacher_net = teacher.net.to(self.device).eval().requires_grad_(False)
        self.nets = nn.ModuleList(build_patch_net(spec, _seed(seed, number, i)) for i, spec in enumerate(self._specs()))
        self.nets = self.nets.to(self.device)
        # channels_last: 1.7 x faster a step with one thread (0.116 against 0.201 s an image, three students, AVX-512).
        for parameter in self.nets.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.autoencoder = self._autoencoder(seed) if config.autoencoder else None
        self.normalize = InputNormalization().to(self.device)
        self.mu, self.sigma = torch.zeros(self.spec.descriptor_dim), torch.ones(self.spec.descriptor_dim)
        self.metrics: dict[str, GaussianMetric] = {}
        self._targets: Tensor | None = None
        self._photographs: Photographs | None = None
        if config.penalty > 0:
            if config.photographs is None:
                raise CommandError("the penalty on photographs needs some: add --photographs DIR, or --set penalty=0")
            self._photographs = read_photographs(Path(config.photographs))

    @property
    def trainable(self) -> nn.ModuleDict:
        """All that is learned."""
        parts: dict[str, nn.Module] = {"students": self.nets}
        return nn.ModuleDict(parts if self.autoencoder is None else parts | {"autoencoder": self.autoencoder})

    @torch.no_grad()
    def prepare(self, frames: Frames) -> None:
        """Fit mu and sigma on ``frames`` (n, h, w, C) and cache the normalized teacher's answers if they fit.

        Raises:
            DataError: the teacher answers the same everywhere.
        """
        total = torch.zeros(self.spec.descriptor_dim, dtype=torch.float64)
        squares, positions = total.clone(), 0
        raw: list[Tensor] = []
        fits = self.config.exposure == 0
        for chunk in chunks(frames):
            answer = self._teacher(self.train_stride)(self.pixels(chunk)).float().cpu()
            flat = answer.double().transpose(0, 1).flatten(1)  # (d, positions); fp64: squares of large sums
            total, squares, positions = total + flat.sum(1), squares + (flat**2).sum(1), positions + flat.shape[1]
            fits = fits and 4 * len(frames) * answer[0].numel() <= TARGET_CACHE_BYTES
            raw = [*raw, answer] if fits else []
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
        """What this scale adds to the loss of a step."""
        config, stride = self.config, self.train_stride
        generator = torch.Generator().manual_seed(batch.draw)
        frames = batch.frames
        if config.exposure > 0:
            frames = varied_exposure(frames.float(), config.exposure, generator)
        pixels = self.pixels(frames)
        distance = hard_distance if config.loss == "hard" else mean_distance
        with self._precision():
            answers = self.answers(pixels, stride)
            target = self.target(pixels, stride, batch.index if config.exposure == 0 else None)
            loss = torch.stack([distance(answer.float(), target) for answer in answers]).sum()
            if self._photographs is not None:
                pictures = self.pixels(self._pictures(len(batch.frames), generator))
                loss = loss + config.penalty * mean_square(self.answers(pictures, stride)[0].float())
            if self.autoencoder is not None:
                loss = loss + self._autoencoder_loss(frames, generator)
        return loss

    @torch.no_grad()
    def vectors(self, frames: Frames, kind: str) -> Iterator[Tensor]:
        """What map ``kind`` measures (N, d, h', w'), a few frames at a time: T' - mean S (e), mean S (s), T' (t)."""
        for chunk in chunks(frames):
            pixels = self.pixels(chunk)
            if kind == "t":
                yield self.target(pixels, self.stride).cpu()
                continue
            mean = torch.stack(self.answers(pixels, self.stride)).mean(0)
            yield (mean if kind == "s" else self.target(pixels, self.stride) - mean).cpu()

    @torch.no_grad()
    def maps(self, frames: Frames) -> dict[str, Tensor]:
        """The raw maps (n, h', w') of ``frames`` by name: those of ``student_errors``, and a with an auto-encoder."""
        found: dict[str, list[Tensor]] = {}
        for chunk in chunks(frames):
            pixels = self.pixels(chunk)
            target = self.target(pixels, self.stride)
            answers, guesses = self._split(pixels, self.stride)
            maps = student_errors(target.cpu(), [answer.cpu() for answer in answers], self.metrics)
            if self.autoencoder is not None:
                self.autoencoder.eval()
                maps["a"] = ((self.autoencoder(pixels) - guesses) ** 2).mean(1).cpu()
            for name, one in maps.items():
                found.setdefault(name, []).append(one)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def pixels(self, frames: Tensor) -> Tensor:
        """Frames (N, h, w, C), uint8 or float 0..255 -> normalized (N, 3, h, w) on the device."""
        pixels: Tensor = self.normalize(frames.to(self.device))
        return pixels.contiguous(memory_format=torch.channels_last)

    def answers(self, pixels: Tensor, stride: int) -> list[Tensor]:
        """What each of the M students says of T', (N, d, h', w')."""
        return self._split(pixels, stride)[0]

    def target(self, pixels: Tensor, stride: int, index: NDArray[np.int64] | None = None) -> Tensor:
        """T' (N, d, h', w'), from the cache if ``index`` says where and there is one."""
        if index is not None and self._targets is not None and stride == self.train_stride:
            return self._targets[torch.from_numpy(index)].to(self.device)
        with torch.no_grad():
            answer: Tensor = self._teacher(stride)(pixels).float()
        return (answer - self.mu.to(self.device).view(1, -1, 1, 1)) / self.sigma.to(self.device).view(1, -1, 1, 1)

    def fit_metrics(self, training: Frames, held_out: Frames) -> None:
        """Fit what the configured metric, and the score's s and t, need from good images (n, h, w, C).

        Raises:
            TrainingError: a placed metric would be too large.
        """
        placed = self.config.metric == "placed"
        if self.config.metric == "decoded" and "e" in self.config.terms:
            decoder = self.teacher.decoder_weight.double() * self.sigma.double()
            gram = decoder.T @ decoder  # || D sigma r ||^2 = r' G r
            lower = torch.linalg.cholesky(gram + 1e-9 * gram.diagonal().mean() * torch.eye(len(gram)))
            self.metrics["e"] = GaussianMetric(torch.zeros(1, len(gram)), lower.T.float()[None], 1.0, 0.0)
        always = ("s", "t", "e") if self.config.metric in GAUSSIAN else ("s", "t")
        for term in (term for term in self.config.terms if term in always):
            self.metrics[term] = fit_metric(self.vectors(training, term), self.vectors(held_out, term), placed=placed)

    def describe(self) -> dict[str, Any]:
        """The teacher's name, digest and card, and what the metric came to."""
        teacher = {"name": self.teacher.name, "sha256": self.teacher.sha256, "card": self.teacher.card}
        metrics = {name: {"share": one.share, "placed": one.placed} for name, one in self.metrics.items()}
        return {"teacher": teacher, **({"metrics": metrics} if metrics else {})}

    def _specs(self) -> list[PatchNetSpec]:
        dims, students = self.spec.descriptor_dim, self.config.students
        if self.config.heads == "shared":
            return [replace(self.spec, descriptor_dim=dims * students)]
        # EfficientAD: the second half of the student's channels imitates the auto-encoder.
        return [replace(self.spec, descriptor_dim=2 * dims if self.config.autoencoder else dims)] * students

    def _autoencoder(self, seed: int) -> AutoEncoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(seed, 0, 1000))
            side = cells(self.spec, self.config.size_px, self.train_stride, self.config.pad)
            return AutoEncoder(self.spec.descriptor_dim, side).to(self.device)

    def _teacher(self, stride: int) -> nn.Module:
        return teacher_at(self.teacher_net, self.spec, self.config, stride).to(self.device)

    def _dense(self, net: nn.Module, stride: int) -> nn.Module:
        return around(self.spec, net, stride, self.config.pad, self.config.form)

    def _split(self, pixels: Tensor, stride: int) -> tuple[list[Tensor], Tensor]:
        """The students' answers, and what the second half of the channels guesses of the auto-encoder (or nothing)."""
        dims = self.spec.descriptor_dim
        parts = [part for net in self.nets for part in self._dense(net, stride)(pixels).split(dims, 1)]
        if self.config.autoencoder:
            return parts[:1], parts[1].float()
        return [part.float() for part in parts], pixels.new_zeros(())

    def _autoencoder_loss(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """L_AE + L_STAE on a jittered image; the second one's gradient reaches both networks, as in published code."""
        assert self.autoencoder is not None
        colors = frames.float().expand(*frames.shape[:3], 3).permute(0, 3, 1, 2)
        pixels = self.pixels(jittered(colors, generator).permute(0, 2, 3, 1))
        with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            self.autoencoder.train()
            picture = self.autoencoder(pixels).float()
        _, guesses = self._split(pixels, self.train_stride)
        return mean_square(self.target(pixels, self.train_stride) - picture) + mean_square(picture - guesses)

    def _pictures(self, count: int, generator: torch.Generator) -> Tensor:
        """Photographs for the penalty: zoomed to twice the model's size, some gray, the middle cut out."""
        assert self._photographs is not None
        side = self.config.size_px
        rows = []
        for _ in range(count):
            image = self._photographs.images[int(torch.randint(len(self._photographs), (), generator=generator))]
            whole = cv2.resize(image, (2 * side, 2 * side), interpolation=cv2.INTER_AREA)
            middle = whole[side // 2 : side // 2 + side, side // 2 : side // 2 + side]
            if float(torch.rand((), generator=generator)) < GRAY_PHOTOGRAPHS:
                middle = cv2.cvtColor(cv2.cvtColor(middle, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            rows.append(np.ascontiguousarray(middle))
        return torch.from_numpy(np.stack(rows))

    def _precision(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")


class Around(nn.Module):
    """A dense network with the padding that the graph has before it: normalized (N, 3, h, w) -> (N, d, h', w')."""

    def __init__(self, dense: DenseNet, pad: Pad) -> None:
        super().__init__()
        self.dense, self.pad = dense, pad

    def forward(self, pixels: Tensor) -> Tensor:
        answer: Tensor = self.dense(padded(pixels, self.dense.patch, self.pad))
        return answer


def around(spec: PatchNetSpec, net: nn.Module, stride: int, pad: Pad, form: Form) -> Around:
    """``net`` of ``spec`` at ``stride``.

    Without padding there is a descriptor wherever its footprint, not its patch, lies inside: pooling floors, so the
    last rows of a patch are never seen, and a patch of the footprint's size gives the same answer.
    """
    return Around(densify(net, spec.footprint if pad == "none" else spec.patch, stride, form), pad)


def teacher_at(
    net: PatchNet | BackboneTeacher, spec: PatchNetSpec, config: StudentTeacherConfig, stride: int
) -> nn.Module:
    """The teacher where students of ``spec`` answer at ``stride``: normalized pixels -> (N, d, h', w')."""
    if isinstance(net, PatchNet):
        return around(spec, net, stride, config.pad, config.form)
    side = config.size_px
    centers = offset_px(spec, config.pad) + stride * torch.arange(cells(spec, side, stride, config.pad))
    return net.at(centers, centers, (side, side))


def padded(pixels: Tensor, patch: int, pad: Pad) -> Tensor:
    """``pixels`` (N, C, h, w) and p - 1 px more a side, ceil((p - 1) / 2) of them before (FDFE, section 3)."""
    if pad == "none":
        return pixels
    before, after = patch // 2, (patch - 1) // 2
    return F.pad(pixels, (before, after, before, after), mode="constant" if pad == "zero" else "reflect")


def cells(spec: PatchNetSpec, side_px: int, stride: int, pad: Pad) -> int:
    """How many descriptors lie along a side."""
    return (side_px - spec.footprint) // stride + 1 if pad == "none" else (side_px - 1) // stride + 1


def offset_px(spec: PatchNetSpec, pad: Pad) -> float:
    """Pixel index of the center of the first descriptor's footprint: 15.5 for p = 33 without padding, -0.5 with."""
    return spec.center - (0 if pad == "none" else spec.patch // 2)


def student_errors(
    target: Tensor, students: list[Tensor], metrics: Mapping[str, Callable[[Tensor], Tensor]]
) -> dict[str, Tensor]:
    """The maps (N, h', w') by name from T' (N, d, h', w') and the M answers of that shape.

    e and, of two students or more, v are the paper's (section 3.3); v is computed as mean_i ||S_i - mean S||^2, equal
    to the printed difference of sums but free of its cancellation.  ``metrics["e"]`` measures the residual in place of
    its square; ``metrics["s"]`` adds s and ``metrics["t"]`` t, how unusual the students' and the teacher's answers are
    in themselves.
    """
    maps = {"t": metrics["t"](target)} if "t" in metrics else {}
    if not students:
        return maps
    mean = students[0]
    for answer in students[1:]:
        mean = mean + answer
    mean = mean / len(students)
    residual = target - mean
    maps["e"] = metrics["e"](residual) if "e" in metrics else (residual**2).sum(1)
    if len(students) > 1:
        v = ((students[0] - mean) ** 2).sum(1)
        for answer in students[1:]:
            v = v + ((answer - mean) ** 2).sum(1)
        maps["v"] = v / len(students)
    if "s" in metrics:
        maps["s"] = metrics["s"](mean)
    return maps


def copied(net: PatchNet) -> PatchNet:
    """``net`` on the CPU with weights of its own, ready to be changed for export."""
    copy = PatchNet(net.spec)
    copy.load_state_dict({name: tensor.detach().cpu() for name, tensor in net.state_dict().items()})
    return copy.eval().requires_grad_(False)


def chunks(frames: Frames) -> Iterator[Tensor]:
    """``frames`` (n, h, w, C) a few at a time."""
    for start in range(0, len(frames), _CHUNK):
        yield torch.from_numpy(np.ascontiguousarray(frames[start : start + _CHUNK]))


def _seed(seed: int, scale: int, index: int) -> int:
    """Far apart, so that neither neighboring seeds nor the teacher's own share a student."""
    entropy = [seed, 0x5EED, index] if scale == 0 else [seed, 0x5EED, index, scale]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
