"""P -> patch teacher: the distillation loop, its two losses, and reading a finished teacher.

Owns the schedule, the losses L_k and L_c, resume, and the published form of a teacher (weights and card).  Leaves
pixels to ``photographs``, P to ``backbones``, targets to ``targets``, and the command line to ``distill_command``.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge.errors import TrainingError
from trainer.backbones import LoadedBackbone
from trainer.checkpoint import (
    Checkpoint,
    load_checkpoint,
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
    save_checkpoint,
)  # fmt: skip
from trainer.distill_losses import correlation_loss, knowledge_loss, known_columns, varied_exposure
from trainer.patch_nets import PROFILES, InputNormalization, PatchNet, PatchNetSpec, build_patch_net
from trainer.photographs import Photographs, ViewRecipe, hold_out
from trainer.target_cache import Prepared, Supply, prepare, target_statistics
from trainer.targets import make_target


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """Everything that decides the result besides photographs and P; goes into checkpoint and card.

    Paper's values where it states them: lambda 1 and 1, Adam, weight decay 1e-5, d, architecture.  Ours: the
    learning rate is 10x the paper's and falls to zero along a cosine, because a batch here holds 7,500 patches
    where the paper's holds 64.
    """

    spec: PatchNetSpec = PROFILES["line"]
    target: str = "map"
    layers: tuple[str, ...] = ("layer1", "layer2")
    magnify: int = 1
    seed: int = 1
    steps: int | None = 20_000
    minutes: float | None = None
    views: int = 8_000
    validation_views: int = 256
    validation_share: float = 0.06
    batch_views: int = 12
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


class Distillation:
    """One run: prepares views and targets once (on disk), then trains until the plan is done or it is interrupted.

    ``working`` is the resumable checkpoint, ``out`` the teacher written at the end (``publish`` may be called at any
    time).  All randomness comes from the seed and the step number, so a resumed run repeats what the killed one
    would have done (to the last bit with ``steps`` on the same machine and thread count).
    """

    def __init__(
        self,
        config: DistillConfig,
        photographs: Photographs,
        backbone: LoadedBackbone,
        *,
        cache: Path | None = None,
        device: str = "cpu",
    ) -> None:
        if (config.steps is None) == (config.minutes is None):
            raise TrainingError("give either a number of steps or of minutes")
        self.config, self.photographs, self.backbone = config, photographs, backbone
        self.target = make_target(config.target, backbone.net, config.spec, config.layers, config.magnify)
        self.device = torch.device(device)
        backbone.net.to(self.device)
        self.net = build_patch_net(config.spec, config.seed).to(self.device)
        self.decoder = _new_decoder(config.spec.descriptor_dim, self.target.channels).to(self.device)
        self.normalization = InputNormalization().to(self.device)
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
        saved_hook: Callable[[], None] = lambda: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the end of the plan, saving now and then and at the end; False if ``stopped`` ended it early.

        ``report`` is called and ``stopped`` asked after every step, ``saved_hook`` after every save but the last.

        Raises:
            TrainingError: the loss is no longer finite; the last checkpoint is kept.
        """
        with _folder(self._cache) as folder:
            training, validation = self._prepare(folder, report, stopped)
            started, saved = time.monotonic() - self.elapsed_s, time.monotonic()
            while self.share() < 1.0 and not stopped():
                figures = self._train_step(training)
                self.step += 1
                self.elapsed_s = time.monotonic() - started
                if not math.isfinite(figures["loss"]):
                    raise TrainingError(f"distillation diverged at step {self.step}; lower --learning-rate")
                if self.step % validate_every == 0 or self.share() >= 1.0:
                    figures |= {"validation": self.validate(validation)}
                    self.history.append({"step": self.step, "seconds": round(self.elapsed_s, 1)} | figures)
                report(Progress(self.step, min(self.share(), 1.0), self.elapsed_s, figures))
                if time.monotonic() - saved > save_every_s:
                    self.save(working)
                    saved_hook()
                    saved = time.monotonic()
            self.save(working)
        return self.share() >= 1.0

    def share(self) -> float:
        """Share of the plan that is done; drives the cosine."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        return self.elapsed_s / (60.0 * (self.config.minutes or 1.0))

    def learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to zero at the end of the plan."""
        warm = min(1.0, (self.step + 1) / self.config.warmup_steps)
        return self.config.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * min(self.share(), 1.0)))

    def validate(self, prepared: Prepared) -> float:
        """L_k on held-out photographs as a share of what the training mean as the only prediction would cost."""
        error = total = 0.0
        with torch.inference_mode():
            for start in range(0, len(prepared.views), 16):
                pixels, target = self._batch(prepared, np.arange(start, min(start + 16, len(prepared.views))))
                descriptors = self._describe(pixels)
                descriptors, target = known_columns(descriptors, target)
                error += knowledge_loss(descriptors, self.decoder, target).item() * target.numel()
                total += target.float().square().sum().item()
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

    def _describe(self, pixels: Tensor) -> Tensor:
        """Float pixels (N, h, w, 3) -> descriptors (N, d, g, g) float32."""
        inputs = self.normalization(pixels).contiguous(memory_format=torch.channels_last)
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16
        ):  # 2.5 x as fast as fp32 where the CPU has AVX-512 bf16
            descriptors: Tensor = self.net(inputs)
        return descriptors.float()

    def _batch(self, prepared: Prepared, chosen: NDArray[np.integer[Any]]) -> tuple[Tensor, Tensor]:
        """Float pixels (n, s, s, 3) and bfloat16 targets (n, C, g, g); fancy indexing copies out of the map."""
        pixels = torch.from_numpy(prepared.views[chosen]).to(self.device).float()
        return pixels, torch.from_numpy(prepared.targets[chosen]).to(self.device).bfloat16()

    def _train_step(self, prepared: Prepared) -> dict[str, float]:
        rng = np.random.default_rng((self.config.seed, 2, self.step))
        chosen = np.sort(rng.choice(len(prepared.views), self.config.batch_views, replace=False))
        pixels, target = self._batch(prepared, chosen)
        if self.config.exposure > 0.0:
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            pixels = varied_exposure(pixels, self.config.exposure, generator)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        descriptors, target = known_columns(self._describe(pixels), target)
        knowledge, correlation = knowledge_loss(descriptors, self.decoder, target), correlation_loss(descriptors)
        loss = self.config.lambda_k * knowledge + self.config.lambda_c * correlation
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return {"loss": loss.item(), "knowledge": knowledge.item(), "correlation": correlation.item()}

    def _prepare(
        self, folder: Path, report: Callable[[Progress], None], stopped: Callable[[], bool]
    ) -> tuple[Prepared, Prepared]:
        """Training and validation views with their targets; P runs once for each view."""
        config, target = self.config, self.target
        kept, held = hold_out(self.photographs, config.validation_share)
        training = Supply(self.photographs, kept, config.recipe, 2 * config.seed)
        validation = Supply(self.photographs, held, config.recipe, 2 * config.seed + 1)
        grid = config.spec.grid(config.recipe.side_px - 2 * target.margin_px)
        identity = {
            "photographs": self.photographs.digest,
            "backbone": self.backbone.sha256,
            "target": [config.target, list(config.layers), config.magnify, config.spec.to_json()],
            "recipe": asdict(config.recipe),
            "held": config.validation_share,
        }
        statistics = target_statistics(training, target)

        def tell(share: float) -> None:
            report(Progress(self.step, 0.0, self.elapsed_s, {"prepared": share}))
            if stopped():
                raise KeyboardInterrupt  # nothing is trained yet, nothing to save

        count = config.validation_views
        return (
            prepare(folder, "train", training, config.views, target, grid, statistics, identity, tell),
            prepare(folder, "validation", validation, count, target, grid, statistics, identity),
        )


def _new_decoder(inputs: int, outputs: int) -> nn.Conv2d:
    """The linear decoder, from zero: a random one first crushes the descriptors and then has to regrow them."""
    decoder = nn.Conv2d(inputs, outputs, 1)
    nn.init.zeros_(decoder.weight)
    if decoder.bias is not None:
        nn.init.zeros_(decoder.bias)
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
