"""Compare the ranks of a launch: engine, device, software, recipe and clock."""

from __future__ import annotations

import hashlib
import platform
import time
from pathlib import Path
from typing import Any

import torch

import dkd
from dkd.checkpoints.facts import recipe_hash
from dkd.commands.launch_check.findings import Facts, Findings, name_ranks
from dkd.config import Recipe
from dkd.launch import Launch, nccl_host, shares_gpus
from dkd.provenance import packages

_MUST_AGREE = ("engine", "device", "nccl", "python", "code", "recipe")
_SHOULD_AGREE = ("device_name", "memory")
_WORDS = {
    "code": "the code of dkd",
    "recipe": "the recipe",
    "device": "the kind of device",
    "device_name": "the devices",
    "memory": "GPU memory (GB)",
}
_PLURAL = ("device_name",)
_CLOCK_SECONDS = 60  # a larger difference between clocks is reported


def collect_facts(recipe: Recipe | None, launch: Launch, device: torch.device) -> dict[str, Any]:
    """Return the facts of this rank: its host, device, versions, recipe and clock."""
    facts: dict[str, Any] = {
        "host": platform.node(),
        "local_rank": launch.local_rank,
        "engine": launch.engine,
        "device": device.type,
        "device_name": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "device_id": None,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "code": _hash_code(),
        **{f"package {name}": version for name, version in packages().items()},
        "clock": time.time(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts["device_id"] = str(getattr(properties, "uuid", torch.cuda.current_device()))
        facts["memory"] = round(properties.total_memory / 2**30)
        facts["shares_gpus"] = shares_gpus() or nccl_host() != platform.node()
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if recipe is not None:
        facts["recipe"] = recipe_hash(recipe)[:12]
    return facts


def _hash_code() -> str:
    """Return a hash of the package that runs: a machine with an older copy would train something else."""
    folder = Path(dkd.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def compare(facts: Facts, found: Findings) -> None:
    """Compare the ranks: report what differs, devices that two ranks share, and what there is.

    Args:
        facts: the facts of every rank (`collect_facts`), in the order of ranks.
        found: receives the lines, problems and warnings.
    """
    _compare_values(facts, found)
    _compare_devices(facts, found)
    _compare_clocks(facts, found)
    _describe_ranks(facts, found)
    _describe_software(facts, found)


def _compare_values(facts: Facts, found: Findings) -> None:
    for key in [*_MUST_AGREE, *_SHOULD_AGREE, *(key for key in facts[0] if key.startswith("package "))]:
        values: dict[Any, list[int]] = {}
        for rank, fact in enumerate(facts):
            values.setdefault(fact.get(key), []).append(rank)
        if len(values) > 1:
            name = _WORDS.get(key, key.removeprefix("package "))
            differences = "; ".join(f"{value} on {name_ranks(ranks, facts)}" for value, ranks in values.items())
            sentences = found.warnings if key in _SHOULD_AGREE else found.problems
            sentences.append(f"{name} differ{'s' if key not in _PLURAL else ''}: {differences}")


def _compare_devices(facts: Facts, found: Findings) -> None:
    seen: dict[tuple[str, Any], int] = {}
    for rank, fact in enumerate(facts):
        if fact["device_id"] is None:
            continue
        other = seen.setdefault((fact["host"], fact["device_id"]), rank)
        if other == rank:
            continue
        both, host = f"rank {other} and rank {rank}", fact["host"]
        if fact.get("shares_gpus"):
            found.warnings.append(
                f"{both} have the same GPU of {host}, as the environment asks NCCL to allow: for tests, not for "
                "training"
            )
        else:
            found.problems.append(f"{both} have the same GPU of {host}: give each process a GPU of its own")


def _compare_clocks(facts: Facts, found: Findings) -> None:
    clocks = [fact["clock"] for fact in facts]
    difference = max(clocks) - min(clocks)
    if difference > _CLOCK_SECONDS:
        slowest = facts[clocks.index(min(clocks))]["host"]
        found.warnings.append(
            f"clocks differ by {difference:.0f} s, or ranks joined that far apart; the clock of {slowest} is late"
        )


def _describe_ranks(facts: Facts, found: Findings) -> None:
    hosts: dict[str, int] = {}
    for fact in facts:
        hosts[fact["host"]] = hosts.get(fact["host"], 0) + 1
    found.lines.append(f"ranks       {len(facts)}: " + ", ".join(f"{count} on {host}" for host, count in hosts.items()))
    if len(set(hosts.values())) > 1:
        found.warnings.append(
            "machines have different numbers of ranks: sp.scope=node and teacher.mesh=node need the same on each"
        )


def _describe_software(facts: Facts, found: Findings) -> None:
    first = facts[0]
    memory = f", {first['memory']} GB" if "memory" in first else ""
    versions = ", ".join(
        f"{key.removeprefix('package ')} {value}"
        for key, value in first.items()
        if key.startswith("package ") and value
    )
    recipe = f", recipe {first['recipe']}" if "recipe" in first else ""
    found.lines += [
        f"devices     {first['device']} ({first['device_name']}{memory}), engine {first['engine']}",
        f"software    Python {first['python']}, {versions}",
        f"code        {first['code']}{recipe}",
    ]
