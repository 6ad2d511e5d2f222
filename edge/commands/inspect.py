"""What a bundle is, what its thresholds stand on, and what made it: `kizu inspect BUNDLE` without images."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge.bundle import ModelBundle


def show_bundle(bundle: ModelBundle, *, as_json: bool) -> None:
    """Print manifest, score calibration and provenance as tables, or all of it as one JSON object."""
    import msgspec

    if as_json:
        print(msgspec.json.encode(_facts(bundle)).decode())
        return
    _print_tables(bundle)


def _facts(bundle: ModelBundle) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path),
        "model_id": bundle.model_id,
        "manifest": bundle.manifest,
        "calibration": bundle.calibration,
        "provenance": bundle.provenance,
    }


def _print_tables(bundle: ModelBundle) -> None:
    import msgspec
    from rich.console import Console

    console = Console()
    manifest: dict[str, Any] = msgspec.to_builtins(bundle.manifest)
    files = manifest.pop("files")
    manifest["created"] = datetime.fromtimestamp(manifest.pop("created_ns") / 1e9, UTC).isoformat(timespec="seconds")
    console.print(_table("manifest", {"model_id": bundle.model_id, **manifest}))
    calibration: dict[str, Any] = msgspec.to_builtins(bundle.calibration)
    scores = calibration.pop("scores")
    calibration["good scores"] = f"{len(scores)}, {scores[0]:.4g} to {scores[-1]:.4g}" if scores else "none"
    console.print(_table("calibration (certified)" if bundle.calibration.certified else "calibration", calibration))
    console.print(_table("provenance", bundle.provenance))
    console.print(_table("files", {name: f"{entry['size']:>12,} bytes" for name, entry in files.items()}))


def _table(title: str, rows: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table("key", "value", title=title, title_justify="left", show_header=False)
    for key, value in _flat(rows):
        table.add_row(escape(key), escape(value))
    return table


def _flat(rows: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested keys joined by dots; a long list by its length, for a training curve fills the screen."""
    flat: list[tuple[str, str]] = []
    for key, value in rows.items():
        if isinstance(value, dict) and value:
            flat += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and len(value) > 8:
            flat.append((prefix + key, f"{len(value)} values (see --json)"))
        else:
            flat.append((prefix + key, f"{value:.6g}" if isinstance(value, float) else str(value)))
    return flat
