"""Run what all ranks of a launch do together, and turn how it ends into an exit code."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from dkd import console
from dkd.launch import report_to_launcher
from dkd.preflight.refusals import input_errors_as_recipe_errors

if TYPE_CHECKING:
    from dkd.launch import Launch

T = TypeVar("T")


def run_on_ranks(
    launch: Launch, options: argparse.Namespace, build: Callable[[], T], run: Callable[[T], object]
) -> int:
    """Build something and run it, on all ranks, and leave the process group. Signals ask for a stop meanwhile.

    Args:
        options: of the command; `started` is set once `build` is done.
        build: what it refuses is wrong input.
        run: takes what was built.

    Returns:
        The exit code: 0 finished, or stopped when asked (or DKD_STOP_EXIT_CODE), 1 failed.
    """
    from dkd.distributed import stop_signals

    stop_signals.note_signals(launch)

    from dkd.distributed.process_group import announces_refusals
    from dkd.distributed.rendezvous import RendezvousError
    from dkd.engines.accelerated import leave_process_group
    from dkd.errors import LostRankError, OutOfMemoryError, Stopped, TrainingError

    # All ranks leave the process group together, or this process ends at once: with NCCL, a rank that leaves the group
    # alone would wait for the others.
    code = 0
    try:
        with announces_refusals(launch), input_errors_as_recipe_errors():
            built = build()
        options.started = True
        run(built)
    except (TrainingError, Stopped) as error:
        console.say_on_first_rank(f"dkd: {error}")
        code = stop_signals.exit_code(launch) if isinstance(error, Stopped) else 1
        if code:
            report_to_launcher(console.printable(f"dkd: {error}"))
    except (LostRankError, OutOfMemoryError, RendezvousError) as error:
        reason = f"dkd: rank {launch.rank} cannot continue: {error}"
        console.say(reason)
        report_to_launcher(console.printable(reason))
        # End at once: code that waits for the other ranks at exit would wait for a rank that is gone, or for this one.
        os._exit(1)
    finally:
        stop_signals.stop_noting(launch)
    leave_process_group()
    return code
