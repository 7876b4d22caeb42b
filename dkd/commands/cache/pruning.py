"""`dkd cache prune`: remove what is damaged, left over, or no longer wanted."""

from __future__ import annotations

import time
from pathlib import Path

from dkd import console
from dkd.atomic_files import remove
from dkd.errors import InputError
from dkd.teacher_cache.folder import (
    KeySummary,
    half_removed,
    remove_key,
    size_of,
    summaries,
    unfinished,
)
from dkd.text import size_in_bytes

_DAY = 86_400


def prune(root: Path, key: str | None, unused_for: int | None, dry_run: bool) -> int:
    """Remove what is to go, print what that was, and return the exit code 0.

    Args:
        root: the folder of the cache.
        key: the name of a folder that is to go, or the beginning of one.
        unused_for: days; keys that nothing was added to for so long go.
        dry_run: nothing is removed.

    Raises:
        InputError: there is no such key, or several.
        OSError: the file system refuses.
    """
    found = list(summaries(root, contents=key is None and unused_for is None))
    if key is not None:
        doomed = [each for each in found if each.folder.name.startswith(key)]
        if len(doomed) != 1:
            names = ", ".join(each.folder.name for each in found) or "none"
            raise InputError(f"--key {key}: {len(doomed) or 'no'} keys begin so; there are {names}")
        return _remove_keys(doomed, dry_run)
    if unused_for is not None:
        return _remove_keys([each for each in found if time.time() - each.used > unused_for * _DAY], dry_run)
    paths = [path for each in found for path in [*each.damaged, *unfinished(each.folder)]] + half_removed(root)
    freed = 0
    for path in paths:
        freed += size_of(path)
        if not dry_run:
            remove(path)
        console.show(f"{'would remove' if dry_run else 'removed'} {path}")
    console.show(f"{len(paths)} files, {size_in_bytes(freed)}")
    return 0


def _remove_keys(doomed: list[KeySummary], dry_run: bool) -> int:
    for each in doomed:
        if not dry_run:
            remove_key(each.folder)
        console.show(f"{'would remove' if dry_run else 'removed'} {each.folder}: {size_in_bytes(each.bytes)}")
    console.show(f"{len(doomed)} keys, {size_in_bytes(sum(each.bytes for each in doomed))}")
    return 0
