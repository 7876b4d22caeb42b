"""Several frozen teachers of one student."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from dkd.distillation.lazy_teacher import LazyTeacher
from dkd.distillation.teacher import FrozenTeacher
from dkd.models.compiling import Compiled

OneTeacher = FrozenTeacher | LazyTeacher
"""A teacher, built or not yet."""


class TeacherGroup(nn.Module):
    """Holds several teachers by name, each with an input and a placement of its own; all of them see each micro-batch
    once.

    Args:
        members: at least two.
    """

    def __init__(self, members: Mapping[str, OneTeacher]) -> None:
        super().__init__()
        self._names = list(members)
        self._members = nn.ModuleList(members.values())

    @property
    def members(self) -> dict[str, OneTeacher]:
        """Return the teachers by name."""
        return dict(zip(self._names, self._members, strict=True))  # type: ignore[arg-type]

    @property
    def fingerprint(self) -> str:
        """Return one fingerprint of the weights of all teachers."""
        parts = [f"{name}:{teacher.fingerprint}" for name, teacher in self.members.items()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return what identifies the teachers."""
        members = {name: teacher.facts() for name, teacher in self.members.items()}
        names = " + ".join(f"{name} ({each['name']})" for name, each in members.items())
        return {"name": names, "fingerprint": self.fingerprint, "taps": [], "teachers": members}

    def compile(self, how: Compiled = True) -> None:
        """Compile each teacher's forward in place, as `compile_model`."""
        for teacher in self.members.values():
            teacher.compile(how)

    @contextmanager
    def with_logits(self) -> Iterator[None]:
        """Inside, all teachers yield logits, as FrozenTeacher's."""
        with ExitStack() as inside:
            for teacher in self.members.values():
                inside.enter_context(teacher.with_logits())
            yield


def members_of(teacher: OneTeacher | TeacherGroup | None) -> dict[str, OneTeacher]:
    """Return teachers by name; one alone has no name."""
    if teacher is None:
        return {}
    return teacher.members if isinstance(teacher, TeacherGroup) else {"": teacher}
