"""Checkpoints: tensors and JSON metadata in one safetensors file, written whole or not at all.

Owns the file form, the atomic write and the flattening of module and optimizer state.  Leaves what a checkpoint
must contain to its writers (``distill``, ``loop``).  No pickle is ever read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from edge.errors import TrainingError

FORMAT = "kizu-checkpoint/1"


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What a checkpoint file holds: named CPU tensors and JSON metadata, and the SHA-256 of the file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    sha256: str

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with ``prefix.``, without it."""
        head = prefix + "."
        return {name[len(head) :]: tensor for name, tensor in self.tensors.items() if name.startswith(head)}


def save_checkpoint(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Write one file atomically (temporary file, fsync, rename) and return its SHA-256.

    A reader, or a crash at any moment, sees the old file or the new one, never a part of either.

    Raises:
        TrainingError: the folder cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    note = json.dumps(dict(metadata), sort_keys=True, allow_nan=False)
    payload = save(plain, metadata={"format": FORMAT, "kizu": note})
    write_atomically(path, payload)
    return hashlib.sha256(payload).hexdigest()


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read one file that ``save_checkpoint`` wrote.

    Raises:
        TrainingError: the file is absent, truncated, not safetensors, or not one of ours; the message says which.
    """
    target = Path(path)
    try:
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        with safe_open(target, framework="pt") as file:
            note = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except OSError as error:
        raise TrainingError(f"{target}: cannot read the checkpoint ({error.strerror or error})") from error
    except SafetensorError as error:
        raise TrainingError(
            f"{target}: not a whole safetensors file ({error}); it was cut short or is something else, "
            "delete it and train again, or give another file"
        ) from error
    if note.get("format") != FORMAT:
        raise TrainingError(
            f"{target}: a safetensors file, but not a Kizu checkpoint (its format says {note.get('format')!r}, "
            f"expected {FORMAT!r}); give a file written by `kizu distill` or `kizu train`"
        )
    try:
        metadata = json.loads(note.get("kizu", ""))
    except json.JSONDecodeError as error:
        raise TrainingError(f"{target}: the checkpoint's metadata is not JSON ({error})") from error
    return Checkpoint(tensors, metadata, digest)


def write_atomically(path: Path | str, payload: bytes) -> None:
    """Replace ``path`` by ``payload`` in one step, durable before the old content is gone.

    Raises:
        TrainingError: the folder cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise TrainingError(f"{target}: cannot write there ({error.strerror})") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp gives 0600, too narrow for an asset that others read
        os.replace(name, target)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise TrainingError(f"{target}: cannot write there ({error.strerror})") from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """The module's state as flat names ``prefix.NAME``."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def restore_module(checkpoint: Checkpoint, prefix: str, module: nn.Module) -> None:
    """Load ``prefix.*`` into ``module``, exactly its tensors and no others.

    Raises:
        TrainingError: a tensor is missing, unknown, or of another shape.
    """
    try:
        module.load_state_dict(checkpoint.group(prefix), strict=True)
    except RuntimeError as error:
        raise TrainingError(f"checkpoint part {prefix!r} does not fit this network: {error}") from error


def optimizer_tensors(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as flat names ``prefix.INDEX.NAME`` (hyperparameters are configuration)."""
    flat: dict[str, Tensor] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            flat[f"{prefix}.{index}.{name}"] = torch.as_tensor(value)
    return flat


def restore_optimizer(checkpoint: Checkpoint, prefix: str, optimizer: torch.optim.Optimizer) -> None:
    """Load what ``optimizer_tensors`` flattened, keeping the optimizer's own hyperparameters.

    Raises:
        TrainingError: the stored state belongs to another set of parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.group(prefix).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    whole = optimizer.state_dict()
    count = sum(len(group["params"]) for group in whole["param_groups"])
    if state and sorted(state) != list(range(count)):
        raise TrainingError(
            f"checkpoint part {prefix!r} holds optimizer state for {len(state)} parameters, this run has {count}"
        )
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
