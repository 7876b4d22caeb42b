"""The process group of a launch: opened so that a restarted launch connects again, and timed."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dkd.config import RecipeError
from dkd.distributed import nccl_settings
from dkd.distributed.rendezvous import Refused, meet
from dkd.global_batch import collectives
from dkd.launch import Launch, nccl_host, number_by_device, shares_gpus
from dkd.library_internals.torch import process_groups, set_group_timeout

REFUSAL_SECONDS = 300.0
"""Seconds that a rank which cannot take part waits for the others, to report why: they may still be opening their
data."""


def open_process_group(launch: Launch, on_cpu: bool, timeout: float, run_dir: Path | None = None) -> bool:
    """Join the default process group, if a launcher started this process and there is none yet. All ranks call it,
    before anything else that they do together: Accelerate's own way does not connect again when a launcher restarts its
    workers.

    The group is bound to this rank's GPU, so that ranks that cannot reach each other by NCCL fail here, and not in the
    first step.

    Args:
        on_cpu: gloo; else what torch has for the accelerator, on the device that `choose_device` chooses.
        timeout: seconds to wait for all ranks, and for each collective from then on (`set_timeouts` changes that).
        run_dir: where torch's flight recorder writes what it remembers when a collective times out; None: elsewhere.

    Returns:
        Whether this call opened it.

    Raises:
        RendezvousError: a rank did not arrive.
        Refused: a rank reported why it cannot take part, or two ranks have one GPU.
        RecipeError: there is no GPU for this rank.
    """
    if dist.is_initialized() or launch.address is None:
        return False
    device = None if on_cpu else choose_device(launch)
    if device is not None:
        nccl_settings.set_defaults(run_dir)
        torch.accelerator.set_device_index(device.index)
        if device.index != launch.local_rank:
            number_by_device(device.index)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    name = meet(store, rank, world_size, timeout, gpu=None if device is None else name_gpu(device))
    dist.init_process_group(
        dist.get_default_backend_for_device(device or "cpu"),
        store=dist.PrefixStore(name, store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
        device_id=device,
    )
    return True


def choose_device(launch: Launch) -> torch.device | None:
    """Return the accelerator that this rank trains on; None where there is none. Raises RecipeError: there is one, and
    not for this rank."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    visible = torch.accelerator.device_count()
    index = device_of(launch.local_rank, visible)
    if index is None:
        raise RecipeError.at(
            "",
            f"process {launch.local_rank} of this machine (LOCAL_RANK) sees {visible} GPUs, numbered from 0: start one "
            "process for each GPU, or let the launcher show each process a GPU of its own",
        )
    return torch.device(accelerator.type, index)


def device_of(local_rank: int, visible: int) -> int | None:
    """Return the number of the GPU that a process uses, among those that it sees; None: there is none for it.

    A launcher may show each process its own GPU alone, as Slurm does with --gpu-bind and --gpus-per-task: its number is
    0 there. That it really is the process's own is found when the ranks meet.

    Args:
        local_rank: number of the process on its machine.
        visible: number of GPUs that the process sees.
    """
    if local_rank < visible:
        return local_rank
    return 0 if visible == 1 else None


def name_gpu(device: torch.device) -> str | None:
    """Return a name that no other GPU of the launch has; None: it is not known, or ranks are allowed to share GPUs."""
    if device.type != "cuda" or shares_gpus():
        return None
    identity = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if identity is None else f"{nccl_host()} {identity}"


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
    before = [(group, collectives.timeout(group)) for group in process_groups()] if dist.is_initialized() else []
    try:
        yield
    finally:
        for group, seconds in before:
            if seconds is not None:
                set_group_timeout(seconds, group)


def abandon_process_group() -> None:
    """Give up the process group after an error that this rank may be alone with. With gloo, the collectives of other
    ranks fail now; with other backends, the group is left as it is, since leaving would wait for the others."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
