"""The settings of NCCL, and of torch's watch over NCCL, that a training has on GPUs.

They are variables of the environment, read by the libraries when the first communicator is made. They are set here and
not in the launch scripts, so that every launcher has them; a variable that the user has set stays as it is, under its
older name too. All names were read in torch 2.14 and NCCL 2.30.

    NCCL_LAUNCH_ORDER_IMPLICIT   1: NCCL (2.26 and later) lets collectives of different communicators run in the order
                                 in which the program has begun them, which must be the same on all ranks. Losses of
                                 relations between samples have communicators of their own beside that of the
                                 gradients; kernels of two communicators that start in different orders on two GPUs can
                                 wait for each other for ever. No two threads of dkd begin collectives of a GPU at once:
                                 the main thread waits while the backward's thread does.
    TORCH_FR_BUFFER_SIZE         number of collectives that torch's flight recorder remembers (before torch 2.9 or so
                                 TORCH_NCCL_TRACE_BUFFER_SIZE). 2000, torch's own number, stated so that a torch whose
                                 default is 0 records, too.
    TORCH_NCCL_DUMP_ON_TIMEOUT   1: when a collective times out, each rank writes what the recorder remembers.
    TORCH_FR_DUMP_TEMP_FILE      the beginning of the path of that file, the rank's number being its end (before, and
                                 beside it, TORCH_NCCL_DEBUG_INFO_TEMP_FILE): RUN/flight_recorder_rank_N. torch's own
                                 place is a cache folder of each machine, which may be gone with the job.

Three others are left alone. TORCH_GLOO_LAZY_INIT=1 connects ranks over gloo when they first need each other, which
starts faster with hundreds of ranks; but a rank that waits for a lost one then notices it after five times the timeout
(measured with torch 2.14.1, two ranks: 20 s where 4 s were asked for). NCCL_DEBUG is for people, and the scripts set
it. TORCH_NCCL_ASYNC_ERROR_HANDLING has the default that ends a process whose collective failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dkd import launch

DUMP_PREFIX = "flight_recorder_rank_"
"""The beginning of the name of a file in the run directory that torch's flight recorder writes."""
_OLDER_NAMES: Mapping[str, tuple[str, ...]] = {
    "TORCH_FR_BUFFER_SIZE": ("TORCH_NCCL_TRACE_BUFFER_SIZE",),
    "TORCH_FR_DUMP_TEMP_FILE": ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE",),
}


def settings(run_dir: Path | None) -> dict[str, str]:
    """Return variable -> value of what this module sets.

    Args:
        run_dir: where the flight recorder's files are to lie; None: at torch's own place.
    """
    found = {"NCCL_LAUNCH_ORDER_IMPLICIT": "1", "TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    if run_dir is not None:
        found["TORCH_FR_DUMP_TEMP_FILE"] = str(run_dir.absolute() / DUMP_PREFIX)
    return found


def set_defaults(run_dir: Path | None) -> None:
    """Set what the user has left open. Call it before the first process group opens. Arguments as `settings`."""
    for name, value in settings(run_dir).items():
        launch.set_variable(name, value, _OLDER_NAMES.get(name, ()))
