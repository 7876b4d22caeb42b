"""Two ranks whose backend would end them without an exception, as NCCL does: rank 0 hangs where no error reaches it,
while rank 1 ends, is suspended, or finishes.

    heartbeat_alone.py ends|stops|leaves
"""

import os
import signal
import sys
import time

import torch.distributed as dist

from dkd.distributed.heartbeat import BEAT, Heartbeat
from dkd.launch import Launch

dist.init_process_group("gloo")
heartbeat = Heartbeat(Launch.read_ranks(), warn_after=3600)
heartbeat.reach((1,), "step 1, forward")
dist.barrier()
time.sleep(3 * BEAT)  # the place above is part of a heartbeat now
print(f"ready: rank {dist.get_rank()}\n", end="", flush=True)
if dist.get_rank() == 1:
    if sys.argv[1] == "ends":
        heartbeat.report_end("the GPU's memory is full")
    elif sys.argv[1] == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        heartbeat.close()
time.sleep(3600)
