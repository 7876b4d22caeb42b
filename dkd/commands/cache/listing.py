"""`dkd cache list`: what is stored."""

from __future__ import annotations

import time
from pathlib import Path

from dkd import console
from dkd.teacher_cache.folder import KeySummary, ValueSummary, summaries
from dkd.text import size_in_bytes


def show(root: Path) -> int:
    """Print what a cache holds, and return the exit code 0."""
    found = list(summaries(root))
    if not found:
        console.show(f"{root}: nothing is stored")
    for summary in found:
        console.show(*describe(summary))
    return 0


def describe(summary: KeySummary) -> list[str]:
    """Return lines about the folder of a key."""
    lines = [f"{summary.folder.name}  {size_in_bytes(summary.bytes)} in {summary.parts} parts{_age(summary)}"]
    if summary.key is not None:
        facts = summary.key.facts
        teacher, data, order, numbers = (facts.get(name, {}) for name in ("teacher", "data", "order", "arithmetic"))
        mixing = [f"{name} {value:g}" for name in ("mixup", "cutmix") if (value := facts.get("mixing", {}).get(name))]
        lines.append(
            f"  teacher  {teacher.get('name')}, weights {str(teacher.get('fingerprint'))[:12]}, "
            f"{numbers.get('precision')}"
        )
        lines.append(
            f"  images   {data.get('images')}, labels and places {str(data.get('sha256'))[:12]}, pixels "
            f"{str(data.get('pixels'))[:12]}, {facts.get('input', {}).get('image_size')} px"
        )
        period = order.get("period")
        repeats = "no epoch repeats" if period is None else f"{period} epoch{'s' if period > 1 else ''}, which repeat"
        lines.append(f"  order    seed {order.get('seed')}, {repeats}{''.join(f', {each}' for each in mixing)}")
    lines += [_describe_value(value) for value in summary.values.values()]
    lines += [f"  made by  {each}" for each in sorted(summary.made_by)]
    lines += [f"  damaged  {problem}" for problem in summary.problems]
    return lines


def _describe_value(value: ValueSummary) -> str:
    epochs = sorted(value.rows)
    counts = sorted(set(value.rows.values()))
    images = f"{counts[-1]} images" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} images"
    form = "" if value.form == "exact" else f", {value.form}"
    number = f"{len(epochs)} epoch{'s' if len(epochs) > 1 else ''}"
    return f"  {value.name}: {size_in_bytes(value.row_bytes)} an image{form}; {number} of {images}"


def _age(summary: KeySummary) -> str:
    if not summary.used:
        return ""
    return f", last added to {time.strftime('%Y-%m-%d %H:%M', time.localtime(summary.used))}"
