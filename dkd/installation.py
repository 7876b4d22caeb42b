"""Find out how dkd was installed, for messages that name the command which adds an extra."""

from __future__ import annotations

import json
import shlex
from pathlib import Path


def command_for(extra: str, source: Path | None = None, origin: str | None = None) -> str:
    """Return the command that adds an extra to this installation, and leaves the installation what it is: a clone stays
    editable.

    Args:
        extra: a name of [project.optional-dependencies].
        source: the folder that holds the package dkd; default: that of this module.
        origin: the content of the direct_url.json that pip wrote; default: that of this installation.
    """
    source = Path(__file__).resolve().parents[1] if source is None else source
    if (source / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{source}[{extra}]')}"
    address = _address(_read_origin() if origin is None else origin)
    return f"pip install {shlex.quote(f'dkd[{extra}]' + (f' @ {address}' if address else ''))}"


def _read_origin() -> str:
    from importlib import metadata

    try:
        return metadata.distribution("dkd").read_text("direct_url.json") or ""
    except metadata.PackageNotFoundError:
        return ""


def _address(origin: str) -> str | None:
    """Return what pip was given in place of a name (PEP 610), or None: dkd came from an index of packages."""
    try:
        found = json.loads(origin)
        url, version_control = found["url"], found.get("vcs_info")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if version_control is None:
        return str(url)
    revision = version_control.get("requested_revision")
    return f"{version_control.get('vcs')}+{url}" + (f"@{revision}" if revision else "")
