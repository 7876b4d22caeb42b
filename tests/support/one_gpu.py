"""Several ranks on one GPU, as a machine each: what a person with one GPU can run of NCCL.

Each rank has a launcher of its own, and NCCL is told that they are on different machines (NCCL_HOSTID) and may share
the GPU (NCCL_MULTI_RANK_GPU_ENABLE, NCCL 2.30 and later). DKD_REHEARSE_GPU=1 runs the same on CPUs with gloo.
"""

import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from launched import Launch, limit
from shared_launches import case_words, returned_by_ranks

REHEARSAL = os.environ.get("DKD_REHEARSE_GPU") == "1" and not torch.cuda.is_available()
"""Whether CPUs stand in for the GPU."""


def variables_of(rank):
    """Return the environment of a rank, beside that of any test."""
    if REHEARSAL:
        return {"DS_ACCELERATOR": "cpu"}
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    return {
        "CUDA_VISIBLE_DEVICES": gpu,
        "DS_ACCELERATOR": None,
        "NCCL_HOSTID": f"host{rank}",
        "NCCL_MULTI_RANK_GPU_ENABLE": "1",
        "NCCL_IB_DISABLE": "1",
        "NCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
        # Kernels of all ranks must be on the GPU at once: each takes two of its processors.
        "NCCL_MAX_CTAS": "2",
    }


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Ranks:
    """A launch of W ranks, each with a launcher and a log of its own; nothing of it outlives the `with` block.

    Args:
        world: W.
        folder: where the logs are written.
        words: a script, or -m and a module; then its arguments.
        variables: of the environment of all ranks.
    """

    def __init__(self, world, folder, *words, **variables):
        place = ["--nnodes", world, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", free_port()]
        self._stack, self.launches = ExitStack(), []
        name = f"log_{len(list(Path(folder).iterdir()))}"
        for rank in range(world):
            command = [sys.executable, "-m", "torch.distributed.run", *place, "--node_rank", rank, *words]
            log = Path(folder) / f"{name}_rank{rank}"
            started = Launch(command, log, **{**variables_of(rank), **variables})
            self.launches.append(self._stack.enter_context(started))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stack.close()

    def wait(self, seconds, ranks=None):
        """Return the exit codes of the launchers of these ranks (None: of all), within that time for each."""
        return [self.launches[rank].wait(seconds) for rank in ranks or range(len(self.launches))]

    def said(self, rank):
        """Return what a rank and its launcher have printed so far."""
        return self.launches[rank].said()


def finish(world, folder, *words, seconds=300, **variables):
    """Run a launch to its end, which must be a good one, and return what rank 0 printed."""
    with Ranks(world, folder, *words, **variables) as started:
        codes = started.wait(limit(seconds))
        assert not any(codes), "\n".join(started.said(rank)[-4000:] for rank in range(world))
        return started.said(0)


def launch_cases(world, folder, cases, seconds=900):
    """Run cases of tests/distributed/cases, as `shared_launches.launch` does."""
    finish(world, folder, *case_words(Path(folder), cases), seconds=seconds)
    return returned_by_ranks(Path(folder), world, cases)
