"""The teacher: a frozen model that yields features. Knows nothing of losses or the student."""

from dkd.teacher.frozen import FrozenTeacher

__all__ = ["FrozenTeacher"]
