"""What each engine can do, known before a process group opens: the one place where engines are compared by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dkd.launch import EngineName, Launch


@dataclass(frozen=True)
class EngineRules:
    """What one engine can do.

    Args:
        name: as the launch names it.
        launch_file: Accelerate's configuration file that starts it.
        shards_weights: each rank keeps a shard of the student's weights.
        shards_training: each rank keeps a shard of something: weights, gradients or the optimizer's state.
        syncs_batch_norm: SyncBatchNorm works under it.
        uses_deepspeed: DeepSpeed runs it, and can cut the teacher into shards, too.
    """

    name: EngineName
    launch_file: str
    shards_weights: bool = False
    shards_training: bool = False
    syncs_batch_norm: bool = False
    uses_deepspeed: bool = False

    @property
    def scales_losses(self) -> bool:
        """Return whether it trains in fp16, with a scaled loss."""
        return not self.shards_training

    @property
    def compiles_student(self) -> bool:
        """Return whether the student can be compiled under it."""
        return not self.shards_training

    @property
    def differentiates_twice(self) -> bool:
        """Return whether a loss may be a function of a gradient."""
        return not self.shards_training

    @property
    def trains_in_float64(self) -> bool:
        """Return whether weights may be float64. DeepSpeed keeps its own in float32."""
        return not self.uses_deepspeed

    @property
    def updates_whole_tensors(self) -> bool:
        """Return whether the optimizer knows which numbers are one weight tensor. DeepSpeed lays many end to end."""
        return not self.uses_deepspeed


_FILES = "launch/accelerate"
_RULES: Mapping[EngineName, EngineRules] = {
    rules.name: rules
    for rules in (
        EngineRules("single", f"{_FILES}/cpu.yaml"),
        EngineRules("ddp", f"{_FILES}/cpu.yaml (or ddp.yaml)", syncs_batch_norm=True),
        EngineRules("fsdp2", f"{_FILES}/fsdp2.yaml", shards_weights=True, shards_training=True),
        EngineRules("zero1", f"{_FILES}/zero1.yaml", shards_training=True, uses_deepspeed=True),
        EngineRules("zero2", f"{_FILES}/zero2.yaml", shards_training=True, uses_deepspeed=True),
        EngineRules("zero3", f"{_FILES}/zero3.yaml", shards_weights=True, shards_training=True, uses_deepspeed=True),
    )
}


def rules_of(launch: Launch) -> EngineRules:
    """Return what the launch's engine can do."""
    return _RULES[launch.engine]
