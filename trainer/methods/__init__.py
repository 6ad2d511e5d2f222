"""METHODS: the methods by the name the command line knows them by."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from trainer.methods.student_teacher import StudentTeacher

METHODS: Mapping[str, type[StudentTeacher]] = MappingProxyType({"student-teacher": StudentTeacher})
