"""Names of tensors in files that others have written, for the architectures that are theirs and ours.

RepDistiller and mdistiller name the tensors of their networks alike. Ours are named so, too, but for Wide ResNets,
whose blocks they keep one level deeper. Prefixes: DataParallel's `module.`; mdistiller's `latest` and `best` hold
student and teacher, of which the student is what was trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_WIDE_RESNET = re.compile(r"^(block[123])\.layer\.(\d+\.)")


def our_names(names: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """name in the file -> name in the model, for the tensors that are the model's. Where the file's own names are the
    model's, they stay.

    Args:
        names: in the file.
        wanted: of the model's state.
    """
    found = {name: name for name in names}
    # Old files lack BatchNorm's counters.
    if all(name in found for name in wanted if not name.endswith("num_batches_tracked")):
        return found
    for prefix in ("module.", "student."):
        if all(ours.startswith(prefix) for ours in found.values()):
            found = {name: ours.removeprefix(prefix) for name, ours in found.items()}
        elif prefix == "student." and _holds_student_and_others(found.values()):
            found = {name: ours.removeprefix(prefix) for name, ours in found.items() if ours.startswith(prefix)}
    return {name: _wide_resnet_name(ours) for name, ours in found.items()}


def _holds_student_and_others(names: Iterable[str]) -> bool:
    parts = {name.partition(".")[0] for name in names}
    return {"student", "teacher"} <= parts


def _wide_resnet_name(name: str) -> str:
    ours = _WIDE_RESNET.sub(r"\1.\2", name)
    return ours.replace(".convShortcut.", ".shortcut.") if ours != name else name
