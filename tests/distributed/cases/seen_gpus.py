"""`dkd launch-check` on ranks that each see some GPUs, the first of which is one for all ranks; nothing of CUDA is
called before the ranks are refused.

    seen_gpus.py COUNT
"""

import sys
from types import SimpleNamespace

import torch

torch.accelerator.is_available = lambda: True
torch.accelerator.current_accelerator = lambda: torch.device("cuda")
torch.accelerator.device_count = lambda: int(sys.argv[1])
torch.accelerator.set_device_index = lambda index: None
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=f"GPU-{device.index}")

if __name__ == "__main__":
    from dkd.cli import main

    sys.exit(main(["launch-check"]))
