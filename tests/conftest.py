import os
import sys
from pathlib import Path

# Before torch is imported: tests run in several processes and start ranks of their own. Threads of more than there are
# cores wait for each other, which makes a computation many times slower than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
