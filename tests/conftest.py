"""Settings of the test process that must hold before torch is imported."""

import os

# Tests run in several processes and start ranks of their own. Threads of more than there are cores wait for each other,
# which makes a computation many times slower than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
