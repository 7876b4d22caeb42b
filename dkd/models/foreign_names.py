"""Translate the names of tensors in files that other projects have written, for architectures that they share with dkd.

RepDistiller and mdistiller use the same names for the tensors of their networks. dkd uses these names too, except for
Wide ResNets, whose blocks the other projects keep one level deeper. Prefixes: DataParallel adds `module.`; mdistiller's
files `latest` and `best` hold student and teacher, of which the student was trained. A wrapper around the model, in
the file (`_orig_mod.` of torch.compile, `model.` of Lightning) or in the user's own callable, is one more prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_WIDE_RESNET = re.compile(r"^(block[123])\.layer\.(\d+\.)")


def our_names(names: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Return, by name in the file, the name in the model, for the tensors that belong to the model. Where the file uses
    the model's names, they stay.

    Args:
        names: names in the file.
        wanted: names of the model's state.
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
    return _fit_prefix({name: _translate_wide_resnet(ours) for name, ours in found.items()}, list(wanted))


def _fit_prefix(found: dict[str, str], wanted: list[str]) -> dict[str, str]:
    """Take away the prefixes that all names of the file have and the model's have not, or add the one that all of the
    model's have and the file's have not."""
    firsts = {name.partition(".")[0] for name in wanted}
    while True:
        heads = {ours.partition(".")[0] for ours in found.values()}
        if len(heads) != 1 or heads <= firsts or not all("." in ours for ours in found.values()):
            break
        (head,) = heads
        found = {name: ours.removeprefix(f"{head}.") for name, ours in found.items()}
    if len(firsts) == 1 and found and not any(ours.startswith(f"{min(firsts)}.") for ours in found.values()):
        found = {name: f"{min(firsts)}.{ours}" for name, ours in found.items()}
    return found


def _holds_student_and_others(names: Iterable[str]) -> bool:
    parts = {name.partition(".")[0] for name in names}
    return {"student", "teacher"} <= parts


def _translate_wide_resnet(name: str) -> str:
    ours = _WIDE_RESNET.sub(r"\1.\2", name)
    return ours.replace(".convShortcut.", ".shortcut.") if ours != name else name
