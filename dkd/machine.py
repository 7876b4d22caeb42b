"""Tells what this process may use of its machine: a container or a batch system may allow a part of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
"""The folder where the system shows all cgroups."""
OWN_CGROUPS = Path("/proc/self/cgroup")
"""The file that lists the cgroups of this process."""


def cores() -> int:
    """Count the CPU cores that this process may run on: those it is bound to, and no more than the quota of its cgroup
    (version 2)."""
    found = [len(os.sched_getaffinity(0))]
    for text in _settings("cpu.max"):
        quota, period = text.split()
        if quota != "max":
            found.append(max(1, int(quota) // int(period)))
    return min(found)


def memory() -> int:
    """Return the bytes of memory of the machine, or the least limit of the cgroups that this process is in."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [*_settings("memory.max"), *_settings("memory.limit_in_bytes", "memory")]
    return min([installed, *(int(limit) for limit in limits if limit.strip() != "max")])


def _settings(name: str, controller: str = "") -> Iterator[str]:
    """Read the files of that name in this process's cgroup and those above it. Cgroups of version 1 have a tree for
    each controller."""
    for _, controllers, path in (line.split(":", 2) for line in _read(OWN_CGROUPS).splitlines()):
        if controller not in controllers.split(","):
            continue
        top = CGROUPS / controller
        folder = top / path.lstrip("/")
        while True:
            # A container sees its own cgroup as the top, whatever path it has outside.
            if text := _read(folder / name):
                yield text
            if folder in (top, folder.parent):
                break
            folder = folder.parent


def _read(path: Path) -> str:
    """Read a file. Returns an empty text where it is not there, or not for this user."""
    try:
        return path.read_text()
    except OSError:
        return ""
