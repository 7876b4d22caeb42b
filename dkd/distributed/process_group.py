"""The process group of a launch: opened so that a restarted launch connects again, and timed."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dkd.config import RecipeError
from dkd.distributed.rendezvous import Refused, meet
from dkd.library_internals.torch import process_groups, set_group_timeout

REFUSAL_SECONDS = 300.0
"""That a rank which cannot take part waits for the others, to tell them: they may still be opening their data."""


def is_launched() -> bool:
    """Whether a launcher started this process as one of a group."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def open_process_group(on_cpu: bool, timeout: float) -> None:
    """Join the default process group, if a launcher started this process and there is none yet. All ranks call it.

    Args:
        on_cpu: gloo; else what torch has for the accelerator, whose device of this local rank is chosen.
        timeout: seconds, to wait for all ranks, and in collectives from then on (`set_timeouts` changes that).

    Raises:
        RendezvousError: a rank did not come.
        Refused: a rank told why it will not.
    """
    if dist.is_initialized() or not is_launched():
        return
    accelerator = None if on_cpu else torch.accelerator.current_accelerator()
    if accelerator is not None:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    name = meet(store, rank, world_size, timeout)
    dist.init_process_group(
        dist.get_default_backend_for_device(accelerator or "cpu"),
        store=dist.PrefixStore(name, store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )


@contextmanager
def tells_refusals() -> Iterator[None]:
    """Inside, before the process group is opened, a RecipeError of this rank is told to the ranks that would wait for
    it; a refusal of another rank becomes a RecipeError of this one.

    What is wrong with a recipe is mostly wrong on every rank. What is wrong with one machine, such as a folder that is
    not mounted there, is not, and the others would wait until `run.start_timeout`.
    """
    try:
        yield
    except Refused as refused:
        time.sleep(0.5)  # another may still be reading it, from a store that this process holds
        raise RecipeError.at("", refused) from refused
    except RecipeError as error:
        _refuse("; ".join(map(str, error.problems)))
        raise


def _refuse(reason: str) -> None:
    """Returns when the other ranks know, or after a while."""
    if dist.is_initialized() or not is_launched() or os.environ["WORLD_SIZE"] == "1":
        return
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=REFUSAL_SECONDS)))
        meet(store, rank, world_size, REFUSAL_SECONDS, refusal=reason)
    except Refused:
        time.sleep(0.5)  # a launcher that sees one rank end would end its neighbours before they have said why
    except RuntimeError:
        return  # nobody there to tell: this rank ends with its own message


def set_timeouts(seconds: float, but: Collection[Any] = ()) -> None:
    """From now on, collectives of all groups that there are, but those, fail after `seconds`."""
    if not dist.is_initialized():
        return
    for group in process_groups():
        if not any(group is other for other in but):
            set_group_timeout(timedelta(seconds=seconds), group)
