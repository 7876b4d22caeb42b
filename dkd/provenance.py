"""Describe what a result depends on: versions of libraries, the git revision, and the command line."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from datetime import datetime, timezone
from typing import Any

PACKAGES = (
    "dkd",
    "torch",
    "torchvision",
    "accelerate",
    "deepspeed",
    "datasets",
    "numpy",
    "pillow",
    "pydantic",
    "safetensors",
)
"""Names of the packages whose versions a result depends on."""


def packages() -> dict[str, str | None]:
    """Return the installed version of each of PACKAGES; None for a package that is not installed."""
    return {name: _read_version(name) for name in PACKAGES}


def provenance(world_size: int, step: int, total_steps: int | None, jpeg_decoder: str) -> dict[str, Any]:
    """Describe this start of a run: the command line, the time in UTC, the host, and versions.

    Args:
        world_size: number of ranks.
        step: number of steps that earlier starts have done.
        total_steps: of the whole run; None: not known.
        jpeg_decoder: name and version of what decodes JPEG files.
    """
    return {
        "command": [sys.executable, *sys.orig_argv[1:]],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "total_steps": total_steps,
        "host": platform.node(),
        "world_size": world_size,
        "python": platform.python_version(),
        "packages": packages(),
        "jpeg_decoder": jpeg_decoder,
        "git_revision": _read_git_revision(),
    }


def _read_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read_git_revision() -> str | None:
    """Return the commit of the working directory, with `-dirty` when files differ from the commit; None outside of a
    repository."""
    try:
        # With optional locks, git killed in the middle would leave a lock in the user's repository.
        command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
