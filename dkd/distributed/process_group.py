"""The process group of a launch: opened so that a restarted launch connects again, and timed."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dkd.config import RecipeError
from dkd.distributed.rendezvous import Refused, meet
from dkd.launch import Launch
from dkd.library_internals.torch import group_timeout, process_groups, set_group_timeout

REFUSAL_SECONDS = 300.0
"""Seconds that a rank which cannot take part waits for the others, to report why: they may still be opening their
data."""


def open_process_group(launch: Launch, on_cpu: bool, timeout: float) -> bool:
    """Join the default process group, if a launcher started this process and there is none yet. All ranks call it,
    before
    anything else that they do together: Accelerate's own way does not connect again when a launcher restarts its
    workers.

    Args:
        on_cpu: gloo; else what torch has for the accelerator, whose device of this local rank is chosen.
        timeout: seconds to wait for all ranks, and for each collective from then on (`set_timeouts` changes that).

    Returns:
        Whether this call opened it.

    Raises:
        RendezvousError: a rank did not arrive.
        Refused: a rank reported why it cannot take part.
    """
    if dist.is_initialized() or launch.address is None:
        return False
    accelerator = None if on_cpu else torch.accelerator.current_accelerator()
    if accelerator is not None:
        torch.accelerator.set_device_index(launch.local_rank)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    name = meet(store, rank, world_size, timeout)
    dist.init_process_group(
        dist.get_default_backend_for_device(accelerator or "cpu"),
        store=dist.PrefixStore(name, store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    return True


@contextmanager
def announces_refusals(launch: Launch) -> Iterator[None]:
    """Inside, before the process group is opened, a RecipeError of this rank is reported to the ranks that would wait
    for this one; a refusal of another rank becomes a RecipeError of this one.

    What is wrong with a recipe is mostly wrong on every rank. What is wrong with one machine, such as a folder that is
    not mounted there, is not, and the other ranks would wait until `run.start_timeout`.
    """
    try:
        yield
    except Refused as refused:
        time.sleep(0.5)  # another rank may still be reading the refusal, from a store that this process holds
        raise RecipeError.at("", refused) from refused
    except RecipeError as error:
        _refuse(launch, "; ".join(map(str, error.problems)))
        raise


def _refuse(launch: Launch, reason: str) -> None:
    """Return when the other ranks know the reason, or after a while."""
    if dist.is_initialized() or launch.address is None or launch.world_size == 1:
        return
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=REFUSAL_SECONDS)))
        meet(store, rank, world_size, REFUSAL_SECONDS, refusal=reason)
    except Refused:
        # A launcher that sees one rank end would end its neighbours before they have reported why.
        time.sleep(0.5)
    except RuntimeError:
        return  # no other rank is there: this rank ends with its own message


def set_timeouts(seconds: float, but: Collection[Any] = ()) -> None:
    """Let collectives of all present groups, except those in `but`, fail after `seconds` from now on."""
    if not dist.is_initialized():
        return
    for group in process_groups():
        if not any(group is other for other in but):
            set_group_timeout(timedelta(seconds=seconds), group)


@contextmanager
def kept_timeouts() -> Iterator[None]:
    """Restore, at the end, the timeouts that all present groups have now."""
    device = torch.device("cpu")
    before = [(group, group_timeout(group, device)) for group in process_groups()] if dist.is_initialized() else []
    try:
        yield
    finally:
        for group, timeout in before:
            if timeout is not None:
                set_group_timeout(timeout, group)


def abandon_process_group() -> None:
    """Give up the process group after an error that this rank may be alone with. With gloo, the collectives of other
    ranks fail now; with other backends, the group is left as it is, since leaving would wait for the others."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
