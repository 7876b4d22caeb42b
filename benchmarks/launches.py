"""Count what a training step asks of torch: operators, waits of the host for the device, and calls of Python.

    python -m benchmarks.launches                          wrn_16_2 → wrn_16_1 with AT, SP and KD, batch 64
    python -m benchmarks.launches --by-operator            which operators, and how often
    python -m benchmarks.launches --precision fp32

An operator that computes is one launch on a GPU, or a few. What only looks at memory in another way (views) or takes
memory is not counted. The counts are those of a CPU: convolutions, norms and products of matrices are single operators
there and on GPUs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique")
"""Operators for which the host waits until the device has computed their argument: `.item()`, `.tolist()` and
`bool(tensor)` are the first of them, once for each number."""
_NO_WORK = (
    "empty", "detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias", "set_", "resize_", "record_stream",
    "_has_compatible_shallow_copy_type", "is_same_size", "_version",
)  # fmt: skip


class OperatorCount(TorchDispatchMode):
    """Counts the operators that run inside, also in backward passes.

    `operators`: how often each ran that computes; `waits`: how often each ran for which the host waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.waits[name] += 1
        elif not _only_looks(func):
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Return the number of operators that compute."""
        return self.operators.total()


def _only_looks(func: Any) -> bool:
    """Return whether an operator returns a view, or takes memory, and computes nothing."""
    if func.overloadpacket.__name__.startswith(_NO_WORK):
        return True
    returns = func._schema.returns
    aliases = [r.alias_info for r in returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)
