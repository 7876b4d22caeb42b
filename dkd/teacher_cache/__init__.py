"""What a teacher has computed, stored on a disk: keys, files, and who reads and writes which of them.

This room knows positions and tensors. What the tensors mean to a loss is known to `distillation/`.
"""

from dkd.teacher_cache.key import CacheKey
from dkd.teacher_cache.steps import Need, StepCache, Turn
from dkd.teacher_cache.value import Value

__all__ = ["CacheKey", "Need", "StepCache", "Turn", "Value"]
