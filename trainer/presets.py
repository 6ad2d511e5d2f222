"""PRESETS: every method's named settings, and the choice among them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from edge.errors import CommandError
from trainer.config import STUDENT_TEACHER, MethodConfig
from trainer.configs import conad, drocc, fcdd, lrdan

PRESETS: Mapping[str, Mapping[str, MethodConfig]] = MappingProxyType(
    {
        "student-teacher": STUDENT_TEACHER,
        "drocc": drocc.PRESETS,
        "drocc-lf": drocc.PRESETS,
        "fcdd": fcdd.PRESETS,
        "conad": conad.PRESETS,
        "lrdan": lrdan.PRESETS,
    }
)
"""Method name -> preset name -> configuration; the first preset of a method is its recommended one."""


def choose_preset(method: str, preset: str | None) -> MethodConfig:
    """The configuration of ``preset`` (None: the method's recommended one).

    Raises:
        CommandError: no such method or preset; the message lists those there are.
    """
    if method not in PRESETS:
        raise CommandError(f"unknown method {method!r}; choose one of {', '.join(PRESETS)}")
    presets = PRESETS[method]
    name = next(iter(presets)) if preset is None else preset
    if name not in presets:
        raise CommandError(f"{method} has no preset {name!r}; choose one of {', '.join(presets)}")
    return presets[name]
