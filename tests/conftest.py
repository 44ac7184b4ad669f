"""Settings that every test needs."""

import os

# Worker processes of the tests share few cores; set before torch is imported for the first time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
