"""Name a cache by what its content depends on: another teacher, other images or another order make another folder.

DIR/
  1f0c.../                  one key: SHA-256 of its facts, 16 hexadecimal digits
    key.json                the facts
    epoch_00003/            of the period
      part_0000000000_9a1b... .safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dkd.atomic_files import link_problem, read_json, replace_text
from dkd.errors import InputError

FACTS = "key.json"
_FORMAT = 1
_NAME = re.compile(r"[0-9a-f]{16}")
_EPOCH = re.compile(r"epoch_([0-9]{5,})")


class CacheError(InputError):
    """A folder cannot be a teacher's cache, or does not hold what was asked for."""


@dataclass(frozen=True)
class CacheKey:
    """Hold what everything in one cache depends on.

    Args:
        facts: sections of plain values: `teacher`, `input`, `data`, `order`, `arithmetic`, `mixing`.
    """

    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the name of the key's folder."""
        return digest_of(self.facts)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Return, as text, the facts of which another key has other values: `teacher.fingerprint (1a2b there, 3c4d
        here)`."""
        mine, theirs = _flat(self.facts), _flat(other)
        return [
            f"{name} ({_shown(theirs.get(name))} there, {_shown(mine.get(name))} here)"
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
        ]


def digest_of(facts: Mapping[str, Any], digits: int = 16) -> str:
    """Return hexadecimal digits of the SHA-256 of plain values."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def open_folder(root: Path, key: CacheKey) -> Path:
    """Return the folder of a key, with its facts in it; both are made where they are missing. Several processes may do
    so at the same time.

    Raises:
        CacheError: a link or a file is in the way.
        OSError: the file system refuses.
    """
    folder = root / key.name
    for path in (root, folder):
        # The cache itself may be a link of the user's; what dkd makes in it is none.
        if path is not root and (problem := link_problem(path)) is not None:
            raise CacheError(problem)
        if path.exists() and not path.is_dir():
            raise CacheError(f"{str(path)!r} is no folder")
    folder.mkdir(parents=True, exist_ok=True)
    if read_key(folder)[0] is None:  # missing or damaged
        replace_text(folder / FACTS, json.dumps({"format": _FORMAT, "key": dict(key.facts)}, indent=1) + "\n")
    return folder


def read_key(folder: Path) -> tuple[CacheKey | None, str | None]:
    """Return the key of a folder and None; or None and the reason why it is no folder of this version of dkd."""
    values, reason = read_json(folder / FACTS)
    if reason is not None:
        return None, reason
    if not isinstance(values, dict) or not isinstance(values.get("key"), dict):
        return None, f"{FACTS} is damaged"
    if values.get("format") != _FORMAT:
        return None, f"it is of format {values.get('format')!r}, and this version of dkd reads format {_FORMAT}"
    key = CacheKey(values["key"])
    if key.name != folder.name:
        return None, f"{FACTS} is not that of {folder.name}"
    return key, None


def key_folders(root: Path) -> list[Path]:
    """Return the folders of all keys in a cache."""
    if not root.is_dir():
        return []
    return [root / name for name in sorted(os.listdir(root)) if _NAME.fullmatch(name)]


def epoch_folder(folder: Path, epoch: int) -> Path:
    """Return the folder of an epoch of the period."""
    return folder / f"epoch_{epoch:05d}"


def epochs_in(folder: Path) -> Iterator[int]:
    """Yield the epochs that the folder of a key has folders of, in order."""
    if folder.is_dir():
        yield from sorted(int(match[1]) for match in map(_EPOCH.fullmatch, os.listdir(folder)) if match)


def nearest(root: Path, key: CacheKey) -> tuple[Path, list[str]] | None:
    """Return, of the other keys in a cache, the folder whose key differs in the fewest facts, and these; None: there is
    no other."""
    found = []
    for folder in key_folders(root):
        other, _ = read_key(folder)
        if other is not None and other.name != key.name:
            found.append((folder, key.differences(other.facts)))
    return min(found, key=lambda each: len(each[1]), default=None)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _shown(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{32,}", text) else text[:60]
