"""The environment variables that hold numbers and switches, checked before anything reads them.

Launchers and batch scripts set these variables. Several places of dkd, torch and Accelerate convert them, each with an
error of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

# Variable: (smallest, largest or None) whole number that it may hold.
_NUMBERS: Mapping[str, tuple[int, int | None]] = {
    "WORLD_SIZE": (1, None),
    "RANK": (0, None),
    "LOCAL_WORLD_SIZE": (1, None),
    "LOCAL_RANK": (0, None),
    "MASTER_PORT": (0, 65535),
    "TORCHELASTIC_MAX_RESTARTS": (0, None),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (1, None),
    "DKD_STOP_EXIT_CODE": (0, 255),
}
_SWITCHES = ("ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
_SWITCH_VALUES = ("true", "false", "1", "0")
_BOUNDS = (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
_MEETING = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")


def problems() -> list[str]:
    """Return a sentence for each variable whose value is wrong. Variables that are not set are not wrong."""
    found = []
    numbers: dict[str, int] = {}
    for name, (smallest, largest) in _NUMBERS.items():
        if name not in os.environ:
            continue
        number = _whole_number(os.environ[name])
        if number is None or number < smallest or (largest is not None and number > largest):
            bounds = f"from {smallest} to {largest}" if largest is not None else f"from {smallest}"
            found.append(
                f"the environment variable {name} must be a whole number {bounds}, not {os.environ[name][:80]!r}"
            )
        else:
            numbers[name] = number
    for rank, size in _BOUNDS:
        if rank in numbers and size in numbers and numbers[rank] >= numbers[size]:
            found.append(
                f"the environment variable {rank} must be less than {size}={numbers[size]}, not {numbers[rank]}"
            )
    for name in _SWITCHES:
        value = os.environ.get(name, "false")
        if value.lower() not in _SWITCH_VALUES:
            found.append(f"the environment variable {name} must be true or false, not {value[:80]!r}")
    return found


def ranks_can_meet() -> bool:
    """Whether the variables by which the ranks of a launch find each other are right."""
    return not any(name in problem for problem in problems() for name in _MEETING)


def speaks_for_machine() -> bool:
    """Whether this process is the one that prints what is the same for all processes of its machine."""
    return _whole_number(os.environ.get("LOCAL_RANK", "0")) in (0, None)


def _whole_number(text: str) -> int | None:
    text = text.strip()
    # At most 18 digits: int() itself refuses thousands of them.
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None
