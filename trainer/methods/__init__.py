"""METHODS: the methods by the name the command line knows them by, each with what makes one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from trainer.method import Maker
from trainer.methods.conad import Conad
from trainer.methods.drocc import Drocc, DroccLf
from trainer.methods.fcdd import Fcdd
from trainer.methods.lrdan import Lrdan
from trainer.methods.student_teacher import StudentTeacher, with_its_teachers

METHODS: Mapping[str, Maker] = MappingProxyType(
    {
        StudentTeacher.name: with_its_teachers,
        Drocc.name: Drocc,
        DroccLf.name: DroccLf,
        Fcdd.name: Fcdd,
        Conad.name: Conad,
        Lrdan.name: Lrdan,
    }
)
