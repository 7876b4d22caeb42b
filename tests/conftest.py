"""Settings of the test process that must hold before torch is imported."""

import os

# Tests run in several processes and start ranks of their own. Threads of more than there are cores wait for each other,
# which makes a computation many times slower than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    """Hide GPUs from all tests but those marked `gpu`: the others are about CPUs, wherever they run."""
    chosen = config.option.markexpr or ""
    if "gpu" not in chosen.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
