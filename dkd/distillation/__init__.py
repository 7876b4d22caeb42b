"""What a distillation step computes: the frozen teacher, the objective, and the passes over a step's images.

Knows tensors, models and losses; knows no recipe, engine or file.
"""

from dkd.distillation.lazy_teacher import LazyTeacher
from dkd.distillation.objective import FeatureTerm, InputGradientTerm, LabelTerm, LogitTerm, Objective, Outputs
from dkd.distillation.sharded_teacher import fill, halve_weights, shard, shard_mesh
from dkd.distillation.step import DistillationStep, MicroLoss
from dkd.distillation.teacher import FrozenTeacher
from dkd.distillation.teacher_group import OneTeacher, TeacherGroup

__all__ = [
    "DistillationStep",
    "FeatureTerm",
    "FrozenTeacher",
    "InputGradientTerm",
    "LabelTerm",
    "LazyTeacher",
    "LogitTerm",
    "MicroLoss",
    "Objective",
    "OneTeacher",
    "Outputs",
    "TeacherGroup",
    "fill",
    "halve_weights",
    "shard",
    "shard_mesh",
]
