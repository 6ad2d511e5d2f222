"""Events for tests that need some event and care about few of its fields; how one is made of a verdict is `events`.

pytest puts this folder on the path (`pythonpath` in pyproject.toml), so a test says `from sample_events import ...`.
"""

from __future__ import annotations

from typing import Any

from edge.events import SCHEMA_VERSION, DefectEvent

CAMERA_EPOCH = 7
LOG_EPOCH = 5


def sample_event(sequence: int = 0, camera: str = "cam1", **changes: Any) -> DefectEvent:
    """An accepted frame of 8 x 6 px as it comes to the log, not yet numbered there; `changes` replace any field.

    The id follows from camera, camera epoch and frame sequence, changed or not, unless `changes` name one.
    """
    fields: dict[str, Any] = {
        "version": SCHEMA_VERSION,
        "line": "line-a",
        "camera": camera,
        "camera_epoch": CAMERA_EPOCH,
        "frame_sequence": sequence,
        "captured_ns": 1,
        "decided_ns": 2,
        "latency_ns": 3,
        "decision": "accept",
        "reason": "score",
        "detail": "",
        "score": 0.5,
        "threshold": 1.0,
        "p_value": 0.5,
        "certified": False,
        "regions": (),
        "frame_height": 6,
        "frame_width": 8,
        "model_id": "m",
        "mask": "none",
    }
    fields |= changes
    fields.setdefault("id", f"{fields['camera']}/{fields['camera_epoch']}/{fields['frame_sequence']}")
    return DefectEvent(**fields)


def published_event(log_sequence: int, camera: str = "cam1", **changes: Any) -> DefectEvent:
    """A rejected frame as it leaves the log for subscribers: numbered, in log epoch 5, and with its mask inline."""
    logged = {"log_epoch": LOG_EPOCH, "log_sequence": log_sequence, "mask": "inline"}
    rejected = {"decision": "reject", "score": 2.0, "p_value": 0.1}
    return sample_event(log_sequence, camera, **(logged | rejected | changes))
