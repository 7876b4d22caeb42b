"""The findings of `dkd launch-check`, and the facts of the ranks that they are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dkd.global_batch import Link

Facts = Sequence[Mapping[str, Any]]
"""One mapping for each rank, in the order of ranks."""


@dataclass
class Findings:
    """What a check found, the same on every rank.

    Args:
        lines: what is there: ranks, devices, software, speeds.
        problems: one sentence for each thing that keeps this launch from training.
        warnings: one sentence for each thing that only slows it down or may be an oversight.
    """

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    links: dict[str, Link] = field(default_factory=dict)
    """The speeds between ranks that were measured, `inside` a machine and `between` machines."""


def name_ranks(ranks: Sequence[int], facts: Facts) -> str:
    """Return the names of ranks and their hosts, such as `rank 0, 1 (node1)`."""
    hosts = list(dict.fromkeys(facts[rank]["host"] for rank in ranks))
    numbers = ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
    return f"rank {numbers} ({', '.join(hosts[:4])}{' …' if len(hosts) > 4 else ''})"
