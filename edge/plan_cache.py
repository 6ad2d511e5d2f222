"""The private cache of compiled engines: one folder an engine, named by everything that decides its bytes.

Owns the key, the folder's form and its checks. Engines are code: they are built on this machine from a verified bundle,
never taken from elsewhere; an entry whose description or digest is not exactly as wanted is built anew, never loaded.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from edge.bundle_files import sha256_hex
from edge.errors import ConfigError, EngineError

CompilePrecision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
_DESCRIPTION, _ENGINE = "plan.json", "plan.engine"
_MAX_DESCRIPTION_BYTES: Final = 64 * 1024
_MAX_ENGINE_BYTES: Final = 4 << 30
_ATTEMPT_PREFIX: Final = ".building-"
_ABANDONED_S: Final = 3600.0
"""An attempt this old was killed: a build takes seconds."""


class PlanKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that decides an engine. `model_sha256` is that of the bundle's ONNX file, `shape` is (h, w, C)."""

    library: str
    version: str
    model_sha256: str
    graph: Literal["model", "coarse"]
    precision: CompilePrecision
    targets: tuple[str, ...]
    max_batch: int
    shape: tuple[int, int, int]

    @property
    def digest(self) -> str:
        """The name of its folder in the cache."""
        return sha256_hex(msgspec.json.encode(self, order="deterministic"))


class _Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """plan.json."""

    key: PlanKey
    sha256: str
    size: int
    build_s: float
    map_share: float | None = None


@dataclass(frozen=True, slots=True)
class CompiledPlan:
    """An engine in the cache: `path` of its bytes, their `sha256` and size, and how long building took.

    `map_share` is how far its graph's maps are from the golden ones, as a share of their largest value; None where no
    CPU here can say. `fresh` says that it was built just now, and not found.
    """

    key: PlanKey
    path: Path
    sha256: str
    size: int
    build_s: float
    map_share: float | None
    fresh: bool

    def read(self) -> bytes:
        """The engine's bytes, read once and checked.

        Raises:
            EngineError: they are not the ones that were built.
        """
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise EngineError(f"{self.path}: {error.strerror}; run `kizu compile` again") from None
        if sha256_hex(data) != self.sha256:
            raise EngineError(f"{self.path} was changed after it was built; run `kizu compile` again")
        return data


def cache_folder(chosen: Path | None = None) -> Path:
    """The private folder of compiled engines; made if need be.

    Raises:
        ConfigError: it is not this user's alone, or cannot be made.
    """
    home = Path(os.environ.get("CACHE_DIRECTORY") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = chosen or home / "kizu" / "engines"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; give another folder for engines: --cache DIR") from None
    # Who can write here can have the line run code of his own.
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{folder} can be written by others; run `chmod 700 {folder}`, or give another: --cache DIR")
    return folder


def find_plan(key: PlanKey, folder: Path) -> CompiledPlan | None:
    """The engine of `key` in its `folder`, or None when there is none or it is not exactly as it was written."""
    try:
        text = (folder / _DESCRIPTION).read_bytes()[: _MAX_DESCRIPTION_BYTES + 1]
        described = msgspec.json.decode(text, type=_Description)
        data = (folder / _ENGINE).read_bytes() if (folder / _ENGINE).stat().st_size <= _MAX_ENGINE_BYTES else b""
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    if described.key != key or len(data) != described.size or sha256_hex(data) != described.sha256:
        return None
    return _compiled(described, folder, fresh=False)


def keep_plan(folder: Path, key: PlanKey, engine: bytes, build_s: float, map_share: float | None) -> CompiledPlan:
    """Put the engine into the cache in one step; what was there is replaced.

    Raises:
        ConfigError: it cannot be written.
    """
    _sweep(folder.parent)
    described = _Description(key, sha256_hex(engine), len(engine), round(build_s, 3), map_share)
    aside = Path(tempfile.mkdtemp(prefix=_ATTEMPT_PREFIX, dir=folder.parent))
    try:
        (aside / _ENGINE).write_bytes(engine)
        (aside / _DESCRIPTION).write_bytes(msgspec.json.format(msgspec.json.encode(described)))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise ConfigError(f"{folder}: {error.strerror}; free some space, or give another folder: --cache DIR") from None
    except KeyboardInterrupt:  # between the bytes and the rename: a cancelled build leaves nothing
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return _compiled(described, folder, fresh=True)


def _compiled(described: _Description, folder: Path, *, fresh: bool) -> CompiledPlan:
    return CompiledPlan(
        described.key, folder / _ENGINE, described.sha256, described.size, described.build_s, described.map_share, fresh
    )


def _sweep(folder: Path) -> None:
    """Remove what builds that were killed left behind."""
    for attempt in folder.glob(f"{_ATTEMPT_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - attempt.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(attempt, ignore_errors=True)
