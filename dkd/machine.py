"""Find how much of its machine this process may use: a container or a batch system may allow only a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
"""The folder where the system shows all cgroups."""
OWN_CGROUPS = Path("/proc/self/cgroup")
"""The file that lists the cgroups of this process."""


def cores() -> int:
    """Count the CPU cores that this process may run on: the cores that the process is bound to, and no more than the
    quota of its cgroup (version 2)."""
    # macOS binds no process to cores.
    found = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for text in _read_settings("cpu.max"):
        quota, period = text.split()
        if quota != "max":
            found.append(max(1, int(quota) // int(period)))
    return min(found)


def memory() -> int:
    """Return the bytes of memory of the machine, or the smallest limit of the cgroups that this process is in."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [*_read_settings("memory.max"), *_read_settings("memory.limit_in_bytes", "memory")]
    return min([installed, *(int(limit) for limit in limits if limit.strip() != "max")])


def _read_settings(name: str, controller: str = "") -> Iterator[str]:
    """Yield the content of the files of a name in this process's cgroup and the cgroups above it. Cgroups of version 1
    have a tree for each controller."""
    for _, controllers, path in (line.split(":", 2) for line in _read(OWN_CGROUPS).splitlines()):
        if controller not in controllers.split(","):
            continue
        top = CGROUPS / controller
        folder = top / path.lstrip("/")
        while True:
            # A container sees its own cgroup as the top, whatever path the cgroup has outside.
            if text := _read(folder / name):
                yield text
            if folder in (top, folder.parent):
                break
            folder = folder.parent


def _read(path: Path) -> str:
    """Return the text of a file; an empty text where the file is missing, or not readable for this user."""
    try:
        return path.read_text()
    except OSError:
        return ""
