"""P -> patch teacher: the distillation loop, and reading a finished teacher.

Owns the loop, resume, and the published form of a teacher's weights.  Leaves pixels to ``photographs``, P to
``backbones``, targets to ``targets``, losses to ``distill_losses``, default values to ``distill_config``, the card
to ``teacher_card`` and the command line to ``distill_command``.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge.errors import TrainingError
from trainer.backbone_teacher import NAMES, BackboneTeacher, load_backbone_teacher
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
from trainer.distill_config import DistillConfig
from trainer.distill_losses import (
    correlation_loss,
    knowledge_loss,
    known_columns,
    shifted_views,
    strangers,
    triplet_loss,
    varied_exposure,
)
from trainer.fdfe import densify
from trainer.patch_nets import PROFILES, InputNormalization, PatchNet, PatchNetSpec, build_patch_net
from trainer.photographs import Photographs, hold_out
from trainer.target_cache import Anew, Batches, Prepared, Supply, prepare, target_statistics
from trainer.targets import make_target, patch_grid


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
    Where the teacher is P itself, ``spec`` is its students' and the decoder the rotation back.
    """

    name: str
    spec: PatchNetSpec
    net: PatchNet | BackboneTeacher
    decoder_weight: Tensor
    decoder_bias: Tensor
    card: dict[str, Any]
    sha256: str


def load_teacher(name_or_path: str | Path) -> Teacher:
    """Read a teacher by the name of a shipped one (``line``; ``resnet18``, which is P) or from a file, in float32.

    Raises:
        TrainingError: no such teacher, or the file is damaged or not a teacher.
    """
    if name_or_path in NAMES:
        whole, card, sha256 = load_backbone_teacher(str(name_or_path))
        back = whole.rotation.T
        return Teacher(str(name_or_path), whole.spec, whole, back, torch.zeros(len(back)), card, sha256)
    path = _teacher_path(name_or_path)
    checkpoint = load_checkpoint(path)
    if checkpoint.metadata.get("kind") != "teacher":
        raise TrainingError(
            f"{path}: a checkpoint of kind {checkpoint.metadata.get('kind')!r}, not a teacher; "
            "give the --out file of `kizu distill`"
        )
    spec = PatchNetSpec.from_json(checkpoint.metadata["spec"])
    net = PatchNet(spec)
    full = Checkpoint({k: v.float() for k, v in checkpoint.tensors.items()}, checkpoint.metadata, checkpoint.sha256)
    restore_module(full, "net", net)
    decoder = full.group("decoder")
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

    Raises:
        TrainingError: no length or two of them, an unknown target or layer, or views that hold no patch.
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
        self.target = make_target(
            config.target, backbone.net, config.spec, config.layers, config.magnify,
            sampling_px=config.stride_px, room_px=config.room_px,
        )  # fmt: skip
        inner_px = config.recipe.side_px - 2 * self.target.margin_px
        if patch_grid(config.spec, config.stride_px, inner_px) < 1:
            raise TrainingError(
                f"a view of {config.recipe.side_px} px less a margin of {self.target.margin_px} px on every side holds "
                f"no patch of {config.spec.patch} px; cut larger views"
            )
        self.device = torch.device(device)
        backbone.net.to(self.device)
        self.net = build_patch_net(config.spec, config.seed).to(self.device)
        self._net_at_stride = _at_stride(self.net, config.stride_px)
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
        """Share of the plan that is done."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        return self.elapsed_s / (60.0 * (self.config.minutes or 1.0))

    def learning_rate(self) -> float:
        """Linear warm-up, then constant, or half a cosine down to zero at the end of the plan."""
        highest = self.config.learning_rate * min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        if self.config.rate == "constant":
            return highest
        return highest * 0.5 * (1.0 + math.cos(math.pi * min(self.share(), 1.0)))

    def validate(self, prepared: Prepared) -> float:
        """L_k on held-out photographs as a share of what the training mean as the only prediction would cost."""
        error = total = 0.0
        room, chunk = self.config.room_px, max(16, self.config.batch_views)
        with torch.inference_mode():
            for start in range(0, len(prepared.views), chunk):
                views, target = prepared.take(np.arange(start, min(start + chunk, len(prepared.views))))
                pixels, target = self._on_device(views, target)
                descriptors, target = known_columns(self._describe(_inner(pixels, room)), target)
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
        """Write the teacher file (network and decoder, no optimizer; fp16 or fp32) and return its SHA-256."""
        tensors = module_tensors("net", self.net)
        tensors |= {"decoder.weight": self.decoder.weight.flatten(1), "decoder.bias": self._decoder_bias()}
        if self.config.half:
            tensors = {name: tensor.half() for name, tensor in tensors.items()}
        metadata = self._metadata("teacher")
        metadata.pop("history")
        return save_checkpoint(path, tensors, metadata)

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
        """Float pixels (N, h, w, 3) -> descriptors (N, d, g, g) float32, ``stride_px`` apart."""
        inputs = self.normalization(pixels).contiguous(memory_format=torch.channels_last)
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16
        ):  # 2.5 x as fast as fp32 where the CPU has AVX-512 bf16
            descriptors: Tensor = self._net_at_stride(inputs)
        return descriptors.float()

    def _on_device(self, views: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Float pixels (n, s, s, 3) and bfloat16 targets (n, C, g, g)."""
        return views.to(self.device).float(), target.to(self.device).bfloat16()

    def _train_step(self, batches: Batches) -> dict[str, float]:
        config = self.config
        rng = np.random.default_rng((config.seed, 2, self.step))
        pixels, target = self._on_device(*batches.draw(self.step, config.batch_views, rng))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        if config.exposure > 0.0:
            pixels = varied_exposure(pixels, config.exposure, generator)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        described = self._describe(_inner(pixels, config.room_px))  # (N, d, g, g)
        figures = self._losses(described, pixels, target, generator)
        loss: Tensor = figures["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return {name: value.item() for name, value in figures.items()}

    def _losses(
        self, described: Tensor, pixels: Tensor, target: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """``loss`` and the terms that have a weight; ``knowledge`` is always among them."""
        config = self.config
        descriptors, target = known_columns(described, target)
        # Without L_k the decoder learns all the same, but says nothing to the network: validation then tells how
        # much of P there is in the descriptors.
        known = descriptors if config.lambda_k > 0.0 else descriptors.detach()
        figures = {"knowledge": knowledge_loss(known, self.decoder, target)}
        loss = (config.lambda_k or 1.0) * figures["knowledge"]
        if config.lambda_m > 0.0:
            anchor = described.flatten(2)  # all positions: L_m asks nothing of P
            positive = self._describe(shifted_views(pixels, config.room_px, generator)).flatten(2)
            figures["triplet"] = triplet_loss(anchor, positive, strangers(anchor, generator), config.margin)
            loss = loss + config.lambda_m * figures["triplet"]
        if config.lambda_c > 0.0:
            figures["correlation"] = correlation_loss(descriptors)
            loss = loss + config.lambda_c * figures["correlation"]
        return {"loss": loss} | figures

    def _prepare(
        self, folder: Path, report: Callable[[Progress], None], stopped: Callable[[], bool]
    ) -> tuple[Batches, Prepared]:
        """Where batches come from, and validation views; P runs once for each view that is prepared."""
        config, target = self.config, self.target
        kept, held = hold_out(self.photographs, config.validation_share)
        training = Supply(self.photographs, kept, config.recipe, 2 * config.seed)
        validation = Supply(self.photographs, held, config.recipe, 2 * config.seed + 1)
        identity = {
            "photographs": self.photographs.digest,
            "backbone": self.backbone.sha256,
            "target": [config.target, list(config.layers), config.magnify],
            # What of the network matters to P: profiles of one patch size may share a folder.
            "patches": [config.spec.patch, config.spec.footprint, config.stride_px, target.margin_px, config.room_px],
            "recipe": asdict(config.recipe),
            "held": config.validation_share,
        }
        statistics = target_statistics(training, target)

        def tell(share: float) -> None:
            report(Progress(self.step, 0.0, self.elapsed_s, {"prepared": share}))
            if stopped():
                raise KeyboardInterrupt  # nothing is trained yet, nothing to save

        room = config.room_px
        batches: Batches = (
            prepare(folder, "train", training, config.views, target, room, statistics, identity, tell)
            if config.views
            else Anew(training, target, statistics, room)
        )
        count = config.validation_views
        return batches, prepare(folder, "validation", validation, count, target, room, statistics, identity)


def _at_stride(net: PatchNet, stride_px: int) -> nn.Module:
    """``net`` itself at its own stride, else its exact dense form on the same parameters (``fdfe``)."""
    if stride_px == net.spec.stride:
        return net
    # Strides that the network has anyway need no dilation, and cost no more than the answers that are kept.
    whole = stride_px % net.spec.stride == 0
    return densify(net, net.spec.patch, stride_px, "dilated" if whole else "multipool")


def _inner(pixels: Tensor, room_px: int) -> Tensor:
    """Pixels (N, h, w, C) without the ``room_px`` on every side that only L_m looks at."""
    return pixels[:, room_px : pixels.shape[1] - room_px, room_px : pixels.shape[2] - room_px]


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
        names = ", ".join(sorted([*(path.stem for path in assets.glob("*.safetensors")), *NAMES]))
        how = f"`kizu distill --profile {name_or_path}` makes it" if name_or_path in PROFILES else "check the name"
        raise TrainingError(
            f"no teacher named {str(name_or_path)!r}; shipped: {names}; {how}, or give a .safetensors file"
        )
    return shipped
