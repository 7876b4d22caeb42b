"""The folder of a run: claimed by one training, seen by all its ranks, and still the same one while training runs.

RUN/.lock    is locked by the main process; the system takes the lock away when that process ends
RUN/.owner   names the start that has claimed the folder, by a token that no other start has
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import struct
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path
from typing import Any

from dkd import atomic_files
from dkd.config import RecipeError

LOCK_FILE, OWNER_FILE = ".lock", ".owner"

_held: weakref.WeakValueDictionary[tuple[int, int], FileIO] = weakref.WeakValueDictionary()
"""The lock files that this process itself holds, by device and inode. The system drops a process's locks on a file when
that process closes the file anywhere: such a file must not be opened to look at it."""
# The fields of struct flock, which the Python manual leaves to the system; the last item pads to the whole structure.
_QUERY = "hhqqi0q" if sys.platform == "linux" else "qqihh"


def is_locked(run_dir: Path) -> bool | None:
    """Return whether a process holds the lock of a run directory, which is neither taken nor released here.

    Returns:
        None: the file system cannot answer, or there is no lock file. On a network file system, False may mean that the
        lock of another machine is not visible here.
    """
    try:
        found = (run_dir / LOCK_FILE).stat(follow_symlinks=False)
        own = _held.get((found.st_dev, found.st_ino))
        if own is not None and not own.closed:
            return True
        descriptor = os.open(run_dir / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    linux = sys.platform == "linux"
    values = (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0) if linux else (0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)
    try:
        answer = struct.unpack(_QUERY, fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(_QUERY, *values)))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return bool(answer[0 if linux else 3] != fcntl.F_UNLCK)


def read_owner(run_dir: Path) -> dict[str, Any]:
    """Return what the training that claimed a run directory last has written of itself: `token`, `host`, `process`,
    `started`; nothing where that cannot be read."""
    owner, reason = atomic_files.read_json(run_dir / OWNER_FILE)
    return owner if reason is None and isinstance(owner, dict) else {}


class RunPlace:
    """The folder of one run. All ranks hold one; the main process claims it.

    Args:
        path: `run.dir`; it may be a link to a folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token: str | None = None
        """Of the start that has claimed the folder; None before."""
        self._lock: Any = None
        # Kept open: its inode is not given to another folder meanwhile, and a moved one can be found.
        self._folder: int | None = None
        self._close_folder: Callable[[], Any] = lambda: None
        self._claimed: os.stat_result | None = None

    def claim(self) -> list[str]:
        """Make the folder, and keep other trainings out of it. The main process's. Returns warnings.

        Raises:
            OSError: the folder cannot be made, or a file in it not be written.
            RecipeError: another process trains in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._close_folder = weakref.finalize(self, os.close, self._folder)  # also when `close` is never called
        self._claimed = os.fstat(self._folder)
        warnings = self._take_lock()
        self.token = secrets.token_hex(16)
        owner = {"token": self.token, "host": platform.node(), "process": os.getpid(), "started": _now()}
        atomic_files.replace_text(self.path / OWNER_FILE, json.dumps(owner) + "\n")
        return warnings

    def _take_lock(self) -> list[str]:
        path = self.path / LOCK_FILE
        while True:
            self._lock = atomic_files.open_lock(path)
            try:
                # Not flock: worker processes would inherit it, and keep it for a while when this process is killed.
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise RecipeError.at(
                    "run.dir", f"{str(self.path)!r}: another process is training in it{self._holder()}"
                ) from error
            except OSError as error:
                self._lock.close()
                self._lock = None
                return [
                    f"{str(path)!r} cannot be locked ({error.strerror}): nothing keeps a second training from starting "
                    "in run.dir; each checkpoint looks whether one has"
                ]
            with suppress(FileNotFoundError):
                ours = os.fstat(self._lock.fileno())
                if os.path.samestat(ours, path.stat(follow_symlinks=False)):
                    _held[ours.st_dev, ours.st_ino] = self._lock
                    return []
            # The file was removed between opening and locking, and another process may hold a lock on a new one.
            self._lock.close()

    def _holder(self) -> str:
        owner = read_owner(self.path)
        if not owner:
            return ""
        return f" (process {owner.get('process')} on {owner.get('host')}, since {owner.get('started')})"

    def unseen(self, token: str) -> str | None:
        """Return what this rank sees of the folder instead of what the main process has written; None: it sees the
        same."""
        with suppress(OSError):
            os.listdir(self.path)  # a network file system then asks its server for what it remembers as absent
        if not self.path.is_dir():
            return "there is no such folder"
        owner, reason = atomic_files.read_json(self.path / OWNER_FILE)
        if reason is not None:
            return reason
        if not isinstance(owner, dict) or owner.get("token") != token:
            return f"{str(self.path / OWNER_FILE)!r} is of another start"
        return None

    def problem(self) -> str | None:
        """Return why the folder at `path` is no longer the one that was claimed; None: it is. The main process's."""
        if self._claimed is None:
            return None
        named = f"run.dir {str(self.path)!r}"
        try:
            now = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            moved = self.moved_to()
            return f"{named} was {'deleted' if moved is None else f'moved to {str(moved)!r}'} while it was trained in"
        except OSError as error:
            return f"{named} cannot be reached: {error.strerror}"
        if not os.path.samestat(now, self._claimed):
            moved = self.moved_to()
            where = "" if moved is None else f"; it is now {str(moved)!r}"
            return f"{named} was replaced by another folder while it was trained in{where}"
        owner, reason = atomic_files.read_json(self.path / OWNER_FILE)
        if reason is not None:
            return f"{named}: files of the run were deleted while it was trained in: {reason}"
        if not isinstance(owner, dict) or owner.get("token") != self.token:
            return f"{named} was taken by another training{self._holder()}"
        return None

    def moved_to(self) -> Path | None:
        """Return where the claimed folder is now, when it was moved and can be found; the system knows, as long as it
        is open."""
        if self._claimed is None:
            return None
        try:
            found = Path(os.readlink(f"/proc/self/fd/{self._folder}"))
            same = os.path.samestat(found.stat(), self._claimed)
        except OSError:
            return None
        return found if same and os.path.realpath(self.path) != str(found) else None

    def for_rescue(self) -> Path:
        """Return a folder for what must not be lost when `problem` returns one: the claimed one, wherever it is now, or
        a new one beside it.

        Raises:
            OSError: none can be made.
        """
        moved = self.moved_to()
        if moved is not None:
            return moved
        owner, reason = atomic_files.read_json(self.path / OWNER_FILE)
        ours = reason is None and isinstance(owner, dict) and owner.get("token") == self.token
        with suppress(OSError):
            still_there = self._claimed is not None and os.path.samestat(self.path.stat(), self._claimed)
            if still_there and (ours or not (self.path / OWNER_FILE).exists()):
                return self.path
        path = self.path.absolute()
        new = path.with_name(f"{path.name}_rescued_{secrets.token_hex(4)}")
        new.mkdir(parents=True)
        return new

    def close(self) -> None:
        """Let other trainings in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        self._close_folder()
        self._folder = self._claimed = None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
