"""The launch files and the example recipes, which are a part of the installed package.

`launch/` and `configs/` of the repository are their source. In a clone, the folders beside this module are links to
them; in a wheel, copies.
"""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("configs", "launch")
"""Names of the folders."""
_LEFT_OUT = (
    ".jsonl",
    ".json",
)  # logs and results beside the recipes, which pyproject.toml leaves out of the wheel, too


def folder(name: str) -> Path:
    """Return the place of one of FOLDERS on this machine."""
    from importlib import resources  # of a tenth of the time that `dkd --help` takes

    return Path(str(resources.files(__name__) / name)).resolve()


def names(name: str) -> list[str]:
    """Return the paths of all files in one of FOLDERS, relative to the folder, in order."""
    top = folder(name)
    found = [path for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    if name == "configs":
        found = [path for path in found if path.suffix not in _LEFT_OUT]
    return sorted(path.relative_to(top).as_posix() for path in found)
