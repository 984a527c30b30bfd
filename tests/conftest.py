"""One thread a process and no network: what every test needs, set before torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
