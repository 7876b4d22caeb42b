"""Check that a launch can train: every rank joins, all are alike, and each reaches every other. Takes less than a
minute, before a long job begins."""

from __future__ import annotations

import os
import platform
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from dkd import console
from dkd.commands.launch_check.facts import collect_facts, compare
from dkd.commands.launch_check.findings import Findings
from dkd.commands.launch_check.trials import compare_speed, measure_links, try_collectives, try_run_dir
from dkd.config import Recipe, RecipeError
from dkd.distributed import process_group
from dkd.distributed.rendezvous import Refused, RendezvousError
from dkd.engines.arithmetic import device_type
from dkd.engines.rules import rules_of
from dkd.global_batch.collectives import all_gather_objects
from dkd.launch import Launch
from dkd.preflight import hardware
from dkd.preflight.check import check
from dkd.preflight.completion import complete
from dkd.text import first_line


def check_launch(
    recipe: Recipe | None, launch: Launch, seconds: float = 50.0, measures_links: bool = False
) -> Findings:
    """Open the process group and try it. A collective.

    Args:
        launch: of this process.
        recipe: the recipe to train; its hash, the files of its data and the place of its run are compared. None: none
            of these is compared.
        seconds: after this time, the process prints what it was doing and ends with exit code 1.
        measures_links: whether the speeds of links are measured, too.

    Raises:
        RecipeError: something is wrong with the recipe or the engine, on this rank or another.
        RuntimeError: a rank did not join, or cannot be reached; the message names it.
    """
    with _TimeLimit(launch.rank, seconds) as limit:
        with process_group.announces_refusals(launch):
            if recipe is not None:
                recipe, _ = complete(recipe)
                check(recipe, launch, allow_recipe_change=True)
        on_cpu = device_type(launch.asks_for_cpu) == "cpu"
        limit.phase = "waiting for all ranks"
        if not on_cpu:
            with process_group.announces_refusals(launch):
                process_group.choose_device(launch)
        _open_process_group(launch, on_cpu, seconds - 5)
        limit.phase = "comparing ranks"
        rank, world_size = launch.rank, launch.world_size
        device = torch.device("cpu" if on_cpu else torch.accelerator.current_accelerator() or "cpu")
        found = Findings()
        facts = all_gather_objects(collect_facts(recipe, launch, device))
        compare(facts, found)
        found.lines += _describe_precision(device, recipe, launch)
        if recipe is not None:
            try_run_dir(Path(recipe.run.dir), rank, facts, found)
        if world_size > 1 and not found.problems:
            limit.phase = "trying all-reduce and all-to-all"
            try_collectives(rank, world_size, device, found)
            if measures_links and not found.problems:
                limit.phase = "measuring the speeds of links"
                found.links = measure_links(launch.local_world_size, device, found)
        limit.phase = "comparing how fast ranks compute"
        compare_speed(device, facts, found)
        return found


def _open_process_group(launch: Launch, on_cpu: bool, timeout: float) -> None:
    """Join the process group, and explain the errors of torch. Raises RecipeError and RuntimeError."""
    host, address = platform.node(), launch.address[0] if launch.address else None
    try:
        process_group.open_process_group(launch, on_cpu, timeout)
    except Refused as refused:
        raise RecipeError.at("", refused) from refused
    except RendezvousError:
        raise
    except dist.DistError as error:
        raise RuntimeError(
            f"{host}: nothing answers at {launch.named_address}, where rank 0's launcher should be "
            f"({first_line(error)}); check the address that the launcher was given, and that its port is open"
        ) from error
    except RuntimeError as error:
        raise RuntimeError(
            f"{host}: the ranks reach {address}, but cannot connect to each other ({first_line(error)}); is a firewall "
            "between them? Name the network that joins them in GLOO_SOCKET_IFNAME, and with GPUs in NCCL_SOCKET_IFNAME"
        ) from error


def _describe_precision(device: torch.device, recipe: Recipe | None, launch: Launch) -> list[str]:
    """Return lines that state what train.precision=auto chooses on these ranks, or what is wrong with the precision
    that the recipe names. A collective."""
    ranks = all_gather_objects(hardware.probe(device.type))
    if recipe is not None and recipe.train.precision != "auto":
        _, lines = hardware.settled(recipe, ranks)
        return [f"precision   {recipe.train.precision}, as in the recipe", *(f"precision   {line}" for line in lines)]
    choice = hardware.choose(ranks, rules_of(launch).scales_losses)
    return [f"precision   auto is {choice.precision} here: {choice.reason}"]


class _TimeLimit:
    """End this process when its time is over: some calls of libraries wait without any timeout."""

    def __init__(self, rank: int, seconds: float) -> None:
        self._rank = rank
        self.phase, self._seconds = "checking the recipe", seconds
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> _TimeLimit:
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        console.say(
            f"dkd: launch-check: rank {self._rank} on {platform.node()} was still {self.phase} after {self._seconds:g} "
            "s"
        )
        os._exit(1)
