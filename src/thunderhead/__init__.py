"""Thunderhead: pretrain decoder-only language models; every design choice is an option of a config group."""

import os
import sys

from thunderhead.lean import LeanTorchmetrics

__version__ = "0.1.0"

# Huge pages for big CPU tensors: torch reads this before its first tensor, and importing Lightning makes one.
# THP_MEM_ALLOC_ENABLE=0 in the environment leaves them off (docs/performance.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

sys.meta_path.insert(0, LeanTorchmetrics())
