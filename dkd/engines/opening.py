"""From a launch to its engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dkd.config import Recipe
from dkd.engines.accelerated import AcceleratedEngine
from dkd.launch import Launch


def open_engine(
    recipe: Recipe, launch: Launch, run_dir: Path, student_parameters: Callable[[], int] | None = None
) -> AcceleratedEngine:
    """Set up the launch's engine. A collective; the process group is open. Arguments and errors as
    AcceleratedEngine."""
    kind: type[AcceleratedEngine]
    if launch.deepspeed is not None:
        from dkd.engines.deepspeed import ZeroEngine as kind
    elif launch.engine == "fsdp2":
        from dkd.engines.fsdp2 import Fsdp2Engine as kind
    else:
        from dkd.engines.ddp import DdpEngine as kind
    return kind(recipe, launch, run_dir, student_parameters)
