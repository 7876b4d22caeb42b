"""A user's own loop in which rank 1 leaves out its second loss: the other rank says so, and both end."""

from datetime import timedelta

import torch
import torch.distributed as dist
from launched import pause

from dkd import SimilarityPreserving
from dkd.global_batch import AbsentRankError

dist.init_process_group("gloo")
sp = SimilarityPreserving()
feature = torch.ones(3 + dist.get_rank(), 4, 2, 2)
sp(feature, feature)
dist.group.WORLD.set_timeout(timedelta(seconds=pause(4)))
print("ready", flush=True)
if dist.get_rank() == 1:
    raise SystemExit(input())  # waits for ever: standard input stays open
try:
    sp(feature, feature)
except AbsentRankError as error:
    print(f"absent: {error}", flush=True)
    raise SystemExit(3) from error
