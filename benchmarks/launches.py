"""Count what a training step asks of torch: operators that compute, and operators for which the host waits; and the
calls of Python that ask for them.

    python -m benchmarks.launches                          wrn_16_2 → wrn_16_1 with AT, SP and KD, batch 64
    python -m benchmarks.launches --by-operator            which operators, and how often
    python -m benchmarks.launches --precision fp32

An operator that computes is one launch on a GPU, or a few. What only looks at memory in another way (views) or takes
memory is not counted, and neither is the loading of images. The counts are those of a CPU with what GPUs run by
default: channels_last, one kernel for all updates, and one for the casts of all weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
"""Operators for which the host waits until the device has computed their argument: `.item()`, `.tolist()` and
`bool(tensor)` are the first of them, once for each number."""
_NO_WORK = (
    "empty", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias", "set_", "resize_",
    "record_stream", "_has_compatible_shallow_copy_type", "is_same_size", "_version", "_record_function",
)  # fmt: skip


class _ListCount(TorchFunctionMode):
    """Counts methods that read all numbers of a tensor, which are no operators."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy):
            self._waits[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class OperatorCount(TorchDispatchMode):
    """Counts the operators that run inside, also in backward passes.

    `operators`: how often each ran that computes; `waits`: how often each ran for which the host waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __enter__(self) -> Any:
        self._lists = _ListCount(self.waits)
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.waits[name] += 1
        elif name.startswith("index") and _has_mask(args):
            self.waits["index by a mask"] += 1
        elif not _only_looks(func):
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Return the number of operators that compute."""
        return self.operators.total()


def _has_mask(args: Any) -> bool:
    """Return whether an element of a tensor is looked up by true and false: how many there are is asked of the
    device."""
    places = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(place, torch.Tensor) and place.dtype in (torch.bool, torch.uint8) for place in places)


def _only_looks(func: Any) -> bool:
    """Return whether an operator returns a view, or takes memory, and computes nothing."""
    if func.overloadpacket.__name__.startswith(_NO_WORK):
        return True
    returns = func._schema.returns
    aliases = [r.alias_info for r in returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


@dataclass
class StepCount:
    """Counts of one optimizer step."""

    parts: dict[str, OperatorCount] = field(default_factory=dict)
    """By part: `teacher`, `student`, each loss (its forward), `backward`, `update`, `numbers`, and `other`."""
    python_calls: int = 0
    """Calls of Python functions."""

    @property
    def total(self) -> int:
        """Return the number of operators that compute."""
        return sum(part.total for part in self.parts.values())

    @property
    def waits(self) -> Counter[str]:
        """Return for which operators the host waits, and how often; but for the reading of what the step before has
        sent to the host."""
        every = sum((part.waits for part in self.parts.values()), Counter[str]())
        return every - Counter({"tolist": 1}) if "numbers" in self.parts else every


_IMAGES = "images"


class _Counting:
    """Counts what the parts of a step ask for: each operator belongs to the innermost part."""

    def __init__(self) -> None:
        self.found, self._inside, self._restore = StepCount(), list[OperatorCount](), list[Callable[[], None]]()

    def call(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return what calls and counts."""

        def counting(*args: Any, **kwargs: Any) -> Any:
            with OperatorCount() as count:
                self._inside.append(count)
                try:
                    result = call(*args, **kwargs)
                finally:
                    self._inside.pop()
            for outer in self._inside[-1:]:
                outer.operators.subtract(count.operators)
                outer.waits.subtract(count.waits)
            whole = self.found.parts.setdefault(part, OperatorCount())
            whole.operators.update(count.operators)
            whole.waits.update(count.waits)
            return result

        return counting

    def replace(self, owner: Any, name: str, part: str) -> None:
        """Count the calls of a method until `close`."""
        original = getattr(owner, name)
        object.__setattr__(owner, name, self.call(part, original))
        self._restore.append(lambda: object.__delattr__(owner, name))

    def close(self) -> None:
        for restore in self._restore:
            restore()


def count_step(trainer: Any, warm: int = 21) -> StepCount:
    """Take steps, and count the last one.

    Args:
        trainer: of one process, which has not begun to load images.
        warm: steps before it: the first 20 of a start report more than later ones.
    """
    parts, counting = trainer.parts, _Counting()
    parts.engine.model.cast_together()
    opened = parts.data.train_loader.steps

    def steps(first: int, last: int) -> Iterator[Any]:
        following = counting.call(_IMAGES, partial(next, opened(first, last)))
        return (following() for _ in range((last - first) * parts.step.micro_steps))

    parts.data.train_loader.steps = steps
    trainer.load_images(warm + 2)
    for _ in range(warm):
        trainer.after_step(trainer.train_step())
    counting.found.parts.clear()
    try:
        counting.replace(parts.step.forward, "teacher", "teacher")
        counting.replace(parts.step.forward, "student", "student")
        counting.replace(parts.engine, "backward", "backward")
        counting.replace(parts.engine, "step", "update")
        for term in parts.step.objective.terms:
            counting.replace(term, "value", term.name)
        values = counting.call("other", trainer.train_step)()
        counting.call("numbers", trainer.after_step)(values)
    finally:
        counting.close()
        parts.data.train_loader.steps = opened
    calls = _count_calls(lambda: trainer.after_step(trainer.train_step()))
    return StepCount({part: count for part, count in counting.found.parts.items() if part != _IMAGES}, calls)


def _count_calls(call: Callable[[], Any]) -> int:
    """Return how many functions of Python a call calls."""
    calls = 0

    def note(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls


def main() -> int:
    from benchmarks.step import Row, add_models, write_teacher

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--by-operator", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_teacher(options, Path(folder))
        settings = {"train.precision": options.precision, "train.channels_last": True}
        found = count_step(Row("", options, Path(folder), settings, loads=False).trainer)
    print(f"{options.teacher} → {options.student}, batch {options.batch}, {options.precision}")
    for part, count in found.parts.items():
        print(f"{part:<12}{count.total:>6}")
        if options.by_operator:
            print("\n".join(f"    {number:>4} {name}" for name, number in count.operators.most_common() if number))
    print(f"{'operators':<12}{found.total:>6}")
    print(f"{'waits':<12}{found.waits.total():>6}  {dict(found.waits) or ''}")
    print(f"{'Python calls':<12}{found.python_calls:>6}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
