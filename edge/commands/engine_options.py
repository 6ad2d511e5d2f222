"""EngineOptions: by which options a command is told through which engine a bundle is to run.

Owns the options' words and what may go together; opening that engine is `opening`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edge.errors import CommandError

if TYPE_CHECKING:
    from edge.config import EngineConfig

BackendOption = Annotated[
    str, typer.Option("--backend", help="Engine: openvino, onnxruntime, tensorrt or fake; as the line's.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="With tensorrt: cuda:N; cuda:0 if not given.")
]
PrecisionOption = Annotated[
    str | None,
    typer.Option("--precision", metavar="P", help="With tensorrt: fp32, fp16 (default), bf16; int8, fp8 if quantized."),
]


def engine_of(backend: str, device: str | None = None, precision: str | None = None) -> EngineConfig:
    """The engine that the options name, as a line's configuration would.

    Raises:
        CommandError: there is no such backend, device or precision, or they do not go together.
    """
    import msgspec

    from edge.compile import PRECISIONS
    from edge.config import EngineConfig
    from edge.engines.registry import require_backend, require_device

    chosen = require_backend(backend, CommandError)
    where = device or ("cuda:0" if chosen == "tensorrt" else "cpu")
    require_device(chosen, where, CommandError)
    if precision is None:
        return EngineConfig(backend=chosen, device=where)
    if chosen != "tensorrt":
        raise CommandError(f"--precision {precision}: {chosen} computes as the bundle's graph says; leave it out")
    if precision not in PRECISIONS:
        raise CommandError(f"--precision {precision}: expected one of {', '.join(PRECISIONS)}")
    asked = {"backend": chosen, "device": where, "precision": precision}
    return msgspec.convert(asked, EngineConfig)
