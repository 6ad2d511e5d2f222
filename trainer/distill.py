"""P -> patch teacher: the distillation loop, its two losses, and reading a finished teacher.

Owns the schedule, the losses L_k and L_c, resume, and the published form of a teacher (weights and card).  Leaves
pixels to ``photographs``, P to ``backbones``, targets to ``targets``, and the command line to ``distill_command``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge.errors import TrainingError
from trainer.backbones import LoadedBackbone
from trainer.checkpoint import (
    Checkpoint, load_checkpoint, module_tensors, optimizer_tensors, restore_module, restore_optimizer, save_checkpoint,
)  # fmt: skip
from trainer.patch_nets import PROFILES, InputNormalization, PatchNet, PatchNetSpec, build_patch_net
from trainer.photographs import Photographs, ViewRecipe, cut_view, hold_out
from trainer.targets import MapTarget, PatchTarget, make_target


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """Everything that decides the result besides photographs and P; goes into checkpoint and card.

    Paper's values where it states them: lambda 1 and 1, Adam, weight decay 1e-5, d, architecture.  Ours: the
    learning rate is 10x the paper's and falls to zero along a cosine, because a batch here holds 17,000 patches
    where the paper's holds 64.
    """

    spec: PatchNetSpec = PROFILES["line"]
    target: str = "map"
    layers: tuple[str, ...] = ("layer2", "layer3")
    magnify: int = 2
    seed: int = 1
    steps: int | None = 20_000
    minutes: float | None = None
    views: int = 8_000
    validation_views: int = 256
    validation_share: float = 0.06
    batch_views: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 1e-5
    lambda_k: float = 1.0
    lambda_c: float = 1.0
    exposure: float = 0.0
    recipe: ViewRecipe = field(default_factory=ViewRecipe)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form, as recorded in checkpoints and cards."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Progress:
    """State of a run for a progress display: steps done, share of the plan (0..1), seconds, last figures."""

    step: int
    share: float
    elapsed_s: float
    figures: dict[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """A finished teacher: frozen network, the linear decoder to normalized P features, and its card.

    ``decoder_weight`` is (C, d), ``decoder_bias`` (C,).  ``net`` maps normalized pixels (N, 3, h, w) to descriptors
    (N, d, grid(h), grid(w)); the descriptors are not standardized, mu and sigma belong to the students' training.
    """

    name: str
    spec: PatchNetSpec
    net: PatchNet
    decoder_weight: Tensor
    decoder_bias: Tensor
    card: dict[str, Any]
    sha256: str


def load_teacher(name_or_path: str | Path) -> Teacher:
    """Read a teacher by the name of a shipped one (``line``) or from a ``.safetensors`` file.

    Raises:
        TrainingError: no such teacher, or the file is damaged or not a teacher.
    """
    path = _teacher_path(name_or_path)
    checkpoint = load_checkpoint(path)
    if checkpoint.metadata.get("kind") != "teacher":
        raise TrainingError(
            f"{path}: a checkpoint of kind {checkpoint.metadata.get('kind')!r}, not a teacher; "
            "give the --out file of `kizu distill`"
        )
    spec = PatchNetSpec.from_json(checkpoint.metadata["spec"])
    net = PatchNet(spec)
    whole = Checkpoint({k: v.float() for k, v in checkpoint.tensors.items()}, checkpoint.metadata, checkpoint.sha256)
    restore_module(whole, "net", net)
    decoder = whole.group("decoder")
    card_path = path.with_suffix(".json")
    card = json.loads(card_path.read_text()) if card_path.is_file() else {}
    return Teacher(
        path.stem, spec, net.eval().requires_grad_(False), decoder["weight"], decoder["bias"], card, checkpoint.sha256
    )


def distillation_loss(descriptors: Tensor, predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """L_k and L_c of one batch (Bergmann et al. 2020, eq. 2 and 4), each as a mean over its entries.

    ``descriptors`` (N, d, g, g); ``predicted`` and ``target`` (N, C, g, g), the latter NaN where P was not asked.
    """
    error = predicted - target
    knowledge = torch.nanmean(error * error)
    return knowledge, correlation_loss(descriptors)


def correlation_loss(descriptors: Tensor) -> Tensor:
    """Mean squared off-diagonal entry of the d x d correlation matrix over all positions of (N, d, g, g)."""
    columns = descriptors.transpose(0, 1).flatten(1).float()
    columns = columns - columns.mean(dim=1, keepdim=True)
    columns = columns / columns.norm(dim=1, keepdim=True).clamp_min(1e-6)
    correlation = columns @ columns.T
    dims = correlation.shape[0]
    if dims < 2:
        return correlation.sum() * 0.0
    off_diagonal = correlation - torch.diag(torch.diagonal(correlation))
    return off_diagonal.square().sum() / (dims * (dims - 1))


def varied_exposure(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Random gain, gamma and offset per view on float pixels (N, h, w, C) in 0..255; clipped like a sensor.

    Only the teacher's input is varied, P's target stays, so the descriptors learn to disregard the exposure.
    """
    draws = torch.rand(3, pixels.shape[0], 1, 1, 1, generator=generator) * 2 - 1
    gain, gamma, offset = (strength * draws[0]).exp(), (strength * draws[1]).exp(), 40.0 * strength * draws[2]
    return (255.0 * (pixels / 255.0).pow(gamma) * gain + offset).clamp(0.0, 255.0)


class Distillation:
    """One run: prepares views and targets once (on disk), then trains until the plan is done or it is interrupted.

    ``working`` is the resumable checkpoint, ``out`` the teacher written at the end (``publish`` may be called at any
    time).  All randomness comes from the seed and the step number, so a resumed run repeats what the killed one
    would have done (to the last bit with ``steps`` on the same machine and thread count).
    """

    def __init__(
        self, config: DistillConfig, photographs: Photographs, backbone: LoadedBackbone, *, cache: Path | None = None
    ) -> None:
        if (config.steps is None) == (config.minutes is None):
            raise TrainingError("give either a number of steps or of minutes")
        self.config, self.photographs, self.backbone = config, photographs, backbone
        self.target = make_target(config.target, backbone.net, config.spec, config.layers, config.magnify)
        self.net = build_patch_net(config.spec, config.seed).to(memory_format=torch.channels_last)
        self.decoder = _new_decoder(config.spec.descriptor_dim, self.target.channels, config.seed)
        self.normalization = InputNormalization()
        self.optimizer = torch.optim.Adam(
            [*self.net.parameters(), *self.decoder.parameters()],
            lr=config.learning_rate, weight_decay=config.weight_decay,
        )  # fmt: skip
        self.step, self.elapsed_s = 0, 0.0
        self.history: list[dict[str, float]] = []
        self._cache = cache

    def run(
        self,
        working: Path,
        *,
        save_every_s: float = 120.0,
        validate_every: int = 1_000,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """Train to the end of the plan; on KeyboardInterrupt save and raise it again."""
        with _folder(self._cache) as folder:
            views, targets, validation = self._prepare(folder, report)
            started, saved = time.monotonic() - self.elapsed_s, time.monotonic()
            try:
                while self.share() < 1.0:
                    figures = self._train_step(views, targets)
                    self.step += 1
                    self.elapsed_s = time.monotonic() - started
                    if not math.isfinite(figures["loss"]):
                        raise TrainingError(f"distillation diverged at step {self.step}; lower --learning-rate")
                    if self.step % validate_every == 0 or self.share() >= 1.0:
                        figures |= {"validation": self.validate(*validation)}
                        self.history.append({"step": self.step, "seconds": round(self.elapsed_s, 1)} | figures)
                    report(Progress(self.step, min(self.share(), 1.0), self.elapsed_s, figures))
                    if time.monotonic() - saved > save_every_s:
                        self.save(working)
                        saved = time.monotonic()
            finally:
                self.save(working)

    def share(self) -> float:
        """Share of the plan that is done; drives the cosine."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        return self.elapsed_s / (60.0 * (self.config.minutes or 1.0))

    def learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to zero at the end of the plan."""
        warm = min(1.0, (self.step + 1) / self.config.warmup_steps)
        return self.config.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * min(self.share(), 1.0)))

    def validate(self, views: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> float:
        """L_k on held-out photographs as a share of what the training mean as the only prediction would cost."""
        error = total = 0.0
        with torch.inference_mode():
            for start in range(0, len(views), self.config.batch_views):
                part = slice(start, start + self.config.batch_views)
                target = torch.from_numpy(targets[part].astype(np.float32))
                _, predicted = self._forward(torch.from_numpy(views[part]).float())
                error += float(torch.nansum((predicted - target) ** 2))
                total += float(torch.nansum(target**2))
        return error / total

    def save(self, path: Path) -> None:
        """Write the resumable checkpoint."""
        tensors = module_tensors("net", self.net) | module_tensors("decoder", self.decoder)
        tensors |= optimizer_tensors("optimizer", self.optimizer)
        save_checkpoint(path, tensors, self._metadata("distillation"))

    def resume(self, path: Path) -> None:
        """Continue from ``save``.

        Raises:
            TrainingError: the checkpoint belongs to other photographs, another P, or another configuration.
        """
        checkpoint = load_checkpoint(path)
        mine, theirs = self._metadata("distillation"), checkpoint.metadata
        for key in ("kind", "config", "photographs", "backbone_sha256"):
            if mine[key] != theirs.get(key):
                raise TrainingError(
                    f"{path}: cannot resume, its {key} differs ({theirs.get(key)!r}, this run has {mine[key]!r}); "
                    "repeat the first command, or start anew without --resume"
                )
        restore_module(checkpoint, "net", self.net)
        restore_module(checkpoint, "decoder", self.decoder)
        restore_optimizer(checkpoint, "optimizer", self.optimizer)
        self.step, self.elapsed_s = int(theirs["step"]), float(theirs["elapsed_s"])
        self.history = list(theirs["history"])

    def publish(self, path: Path) -> str:
        """Write the teacher file (fp32: network and decoder, no optimizer) and return its SHA-256."""
        decoder = {"decoder.weight": self.decoder.weight.flatten(1), "decoder.bias": self._decoder_bias()}
        metadata = self._metadata("teacher")
        metadata.pop("history")
        return save_checkpoint(path, module_tensors("net", self.net) | decoder, metadata)

    def _decoder_bias(self) -> Tensor:
        if self.decoder.bias is None:
            raise TrainingError("the decoder has a bias")
        return self.decoder.bias

    def _metadata(self, kind: str) -> dict[str, Any]:
        return {
            "kind": kind, "spec": self.config.spec.to_json(), "config": self.config.to_json(),
            "photographs": self.photographs.digest, "backbone": self.backbone.net.name,
            "backbone_sha256": self.backbone.sha256, "step": self.step, "elapsed_s": self.elapsed_s,
            "history": self.history,
        }  # fmt: skip

    def _forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Float pixels (N, h, w, 3) -> descriptors (N, d, g, g) and decoded features (N, C, g, g)."""
        inputs = self.normalization(pixels).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # 2.5 x as fast as fp32 where the CPU has AVX-512 bf16
            descriptors = self.net(inputs)
        descriptors = descriptors.float()
        return descriptors, self.decoder(descriptors)

    def _train_step(self, views: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> dict[str, float]:
        rng = np.random.default_rng((self.config.seed, 2, self.step))
        chosen = np.sort(rng.choice(len(views), self.config.batch_views, replace=False))
        pixels = torch.from_numpy(views[chosen]).float()
        target = torch.from_numpy(targets[chosen].astype(np.float32))
        if self.config.exposure > 0.0:
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            pixels = varied_exposure(pixels, self.config.exposure, generator)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        descriptors, predicted = self._forward(pixels)
        knowledge, correlation = distillation_loss(descriptors, predicted, target)
        loss = self.config.lambda_k * knowledge + self.config.lambda_c * correlation
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return {"loss": float(loss), "knowledge": float(knowledge), "correlation": float(correlation)}

    def _prepare(self, folder: Path, report: Callable[[Progress], None]) -> Any:
        """Views and normalized targets, training ones memory mapped; P runs once for each view."""
        config = self.config
        kept, held = hold_out(self.photographs, config.validation_share)
        side = config.recipe.side_px - 2 * self.target.margin_px
        grid = config.spec.grid(side)
        views = np.lib.format.open_memmap(
            folder / "views.npy", "w+", np.uint8, (config.views, side, side, 3))
        targets = np.lib.format.open_memmap(
            folder / "targets.npy", "w+", np.float16, (config.views, self.target.channels, grid, grid))
        mean, deviation = self._target_statistics(kept)
        self._fill(views, targets, kept, (config.seed, 0), mean, deviation, report)
        validation_views = np.zeros((config.validation_views, side, side, 3), np.uint8)
        validation_targets = np.zeros((config.validation_views, self.target.channels, grid, grid), np.float16)
        self._fill(validation_views, validation_targets, held, (config.seed, 1), mean, deviation, lambda progress: None)
        return views, targets, (validation_views, validation_targets)

    def _target_statistics(self, kept: list[int]) -> tuple[Tensor, Tensor]:
        """Mean and deviation (C, 1, 1) of P's features over the first views: each channel counts alike in L_k."""
        parts = [self._targets_of(kept, (self.config.seed, 0), range(start, start + 16))[1] for start in (0, 16, 32, 48)]
        columns = torch.cat(parts).transpose(0, 1).flatten(1)
        columns = columns[:, torch.isfinite(columns[0])]
        deviation, mean = torch.std_mean(columns, dim=1)
        return mean.view(-1, 1, 1), deviation.clamp_min(1e-6).view(-1, 1, 1)

    def _targets_of(self, chosen: list[int], seed: tuple[int, int], numbers: range) -> tuple[Tensor, Tensor]:
        stacked = np.stack([
            cut_view(self.photographs, chosen, self.config.recipe, 2 * seed[0] + seed[1], number) for number in numbers
        ])
        views = torch.from_numpy(stacked)
        margin = self.target.margin_px
        inner = views[:, margin : views.shape[1] - margin, margin : views.shape[2] - margin]
        return inner, self.target(views)

    def _fill(
        self, views: Any, targets: Any, chosen: list[int], seed: tuple[int, int], mean: Tensor, deviation: Tensor,
        report: Callable[[Progress], None],
    ) -> None:  # fmt: skip
        for start in range(0, len(views), 16):
            numbers = range(start, min(start + 16, len(views)))
            inner, target = self._targets_of(chosen, seed, numbers)
            views[start : numbers.stop] = inner.numpy()
            targets[start : numbers.stop] = ((target - mean) / deviation).clamp(-30, 30).numpy().astype(np.float16)
            report(Progress(self.step, 0.0, self.elapsed_s, {"prepared": numbers.stop / len(views)}))


def _new_decoder(inputs: int, outputs: int, seed: int) -> nn.Conv2d:
    decoder = nn.Conv2d(inputs, outputs, 1)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        decoder.weight.normal_(0.0, 1.0 / math.sqrt(inputs), generator=generator)
        if decoder.bias is not None:
            decoder.bias.zero_()
    return decoder


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """The cache folder: the one given, kept, or a temporary one, removed."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="kizu-distill-") as name:
        yield Path(name)


def _teacher_path(name_or_path: str | Path) -> Path:
    given = Path(name_or_path)
    if given.suffix == ".safetensors":
        return given
    assets = Path(str(resources.files("trainer"))) / "assets"
    shipped = assets / f"{name_or_path}.safetensors"
    if not shipped.is_file():
        names = ", ".join(sorted(path.stem for path in assets.glob("*.safetensors"))) or "none"
        raise TrainingError(f"no teacher named {str(name_or_path)!r}; shipped: {names}; or give a .safetensors file")
    return shipped
