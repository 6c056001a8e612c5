"""tests/ranks.py with DeepSpeed on CPUs, which Lightning and our plan refuse: `python deepspeed_worker.py FOLDER`."""

import functools
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch.strategies.deepspeed as of_lightning
from lightning.pytorch.accelerators import CPUAccelerator

sys.path.insert(0, str(Path(__file__).parents[1]))
import ranks
from thunderhead.parallel import deepspeed

of_lightning.CUDAAccelerator = CPUAccelerator
of_lightning._validate_device_index_selection = lambda devices: None
of_lightning.argparse = SimpleNamespace(Namespace=lambda device_rank: Namespace(device_rank=-1))
zero, config_of = deepspeed.zero, deepspeed.config_of


@functools.wraps(zero)
def on_cpu(*arguments: Any, **settings: Any) -> Any:
    return replace(zero(*arguments, **settings), needs_cuda=False)


def all_in_shards(stage: int, *arguments: Any) -> dict[str, Any]:
    """Small parameters, too, which stage 3 would leave whole."""
    config = config_of(stage, *arguments)
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


deepspeed.zero, deepspeed.config_of = on_cpu, all_in_shards
ranks.main(Path(sys.argv[1]))
