"""The frozen teacher, whole on every rank or in shards."""

from dkd.teacher.frozen import FrozenTeacher
from dkd.teacher.sharding import fill, halve_weights, shard, shard_mesh

__all__ = ["FrozenTeacher", "fill", "halve_weights", "shard", "shard_mesh"]
