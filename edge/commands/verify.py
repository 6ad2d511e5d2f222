"""`kizu verify BUNDLE`: is every byte of the bundle as written, and does this machine give its golden answers?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge.commands.engine_options import BackendOption, DeviceOption, PrecisionOption, engine_of
from edge.errors import ParityError


def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle's directory.")],
    backend: BackendOption = "openvino",
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    signers: Annotated[
        Path | None, typer.Option(help="Require a signature by one of these: a public key file, or a folder of them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check a bundle: hashes of all files, its signature, and its golden frames on this device.

    Raises:
        BundleError: a file is missing, changed or malformed, or with `signers` nobody of them signed it.
        EngineError: the backend is missing or refuses the model.
        ParityError: the golden frames come out beyond the tolerance.
    """
    from edge.bundle import check_golden, open_bundle
    from edge.opening import looseness, open_on
    from edge.signature import TrustStore

    asked = engine_of(backend, device, precision)
    opened = open_bundle(bundle)
    signer = "not asked (--signers)" if opened.signed_by else "nobody"
    if signers is not None:
        signer = TrustStore.load(signers).signer(bundle, opened.signed_by)
    with open_on(opened, asked, max_batch=1) as engine:
        check = check_golden(opened, engine, loose=looseness(asked, engine))
        spec = engine.spec
    facts: dict[str, str | int | float | bool] = {
        "bundle": str(bundle),
        "model_id": opened.model_id,
        "files": len(opened.manifest.files),
        "bytes": sum(digest.size for digest in opened.manifest.files.values()),
        "signer": signer,
        "signed_by": opened.signed_by or "",
        "backend": spec.name,
        "backend_version": spec.version,
        "device": spec.device,
        "golden_frames": check.frames,
        "max_abs": check.max_abs,
        "share_of_tolerance": check.max_rel_of_tolerance,
        "ok": check.ok,
    }
    _show(facts, as_json)
    if not check.ok:
        raise ParityError(
            f"bundle {bundle}: {spec.name} {spec.version} is {check.max_rel_of_tolerance:.3g} times the tolerance away "
            "from the golden frames; compare with `--backend onnxruntime`"
        )


def _show(facts: dict[str, str | int | float | bool], as_json: bool) -> None:
    import msgspec
    from rich.console import Console
    from rich.table import Table

    if as_json:
        typer.echo(msgspec.json.encode(facts).decode())
        return
    table = Table("check", "found", title="bundle as written" if facts["ok"] else "bundle NOT as written")
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), f"{value:.3g}" if isinstance(value, float) else str(value))
    Console().print(table)
