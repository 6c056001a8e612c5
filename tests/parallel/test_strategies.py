"""The strategy group: what each option makes of a number of devices; tests/integration/test_strategy_runs.py trains."""

import re
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.core.model_spec import build_decoder, build_optimizer
from thunderhead.parallel import strategies as parallel
from thunderhead.parallel.strategies import MeshStrategy, auto, ddp, fsdp, single, tensor_parallel
from thunderhead.parallel.zero1 import owners
from tiny import plan_of, tiny


def test_auto_is_ddp_over_several() -> None:
    assert auto(1).strategy() == "auto"
    assert isinstance(auto(2).strategy(), DDPStrategy)
    assert auto(2).data_parallel_size == 2


def test_single_is_one() -> None:
    assert single(1).data_parallel_size == 1
    with pytest.raises(ValueError, match=r"strategy=single runs on one device, but .* = 2: use strategy=ddp or"):
        single(2)


@pytest.mark.parametrize(
    ("option", "data_parallel", "tensor_parallel", "parameters", "gradients", "state"),
    [
        (ddp(8), 8, 1, 1, 1, 1),
        (ddp(8, shards_state=True), 8, 1, 1, 1, 8),
        (fsdp(8), 8, 1, 8, 1, 8),
        (fsdp(8, sync_every_micro_batch=True), 8, 1, 8, 8, 8),
        (fsdp(8, replicate_size=2), 8, 1, 4, 1, 4),
        (fsdp(8, replicate_size=4, sync_every_micro_batch=True), 8, 1, 2, 2, 2),
        (tensor_parallel(8), 1, 8, 1, 1, 1),
        (fsdp(8, tensor_parallel_size=2), 4, 2, 4, 1, 4),
        (fsdp(8, tensor_parallel_size=4), 2, 4, 2, 1, 2),
    ],
)
def test_what_is_divided_among_how_many(
    option: parallel.Parallelism, data_parallel: int, tensor_parallel: int, parameters: int, gradients: int, state: int
) -> None:
    assert (option.data_parallel_size, option.tensor_parallel_size) == (data_parallel, tensor_parallel)
    assert (option.parameter_shards, option.gradient_shards, option.state_shards) == (parameters, gradients, state)


@pytest.mark.parametrize(
    ("sizes", "n", "expected"),
    [([1, 5, 3, 3], 2, [0, 0, 1, 1]), ([4, 4, 4, 4], 4, [0, 1, 2, 3]), ([7, 1], 3, [0, 1]), ([], 2, [])],
)
def test_whole_parameters_go_to_the_rank_that_has_least(sizes: list[int], n: int, expected: list[int]) -> None:
    assert owners(sizes, n) == expected


def test_only_fsdp_gathers() -> None:
    assert [o(4).gathers for o in (auto, ddp, tensor_parallel, fsdp)] == [False] * 3 + [True]
    assert not fsdp(4).gathers_all
    assert fsdp(4, reshard_after_forward=False).gathers_all


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fsdp(6, replicate_size=4),
            "strategy=hsdp: replicate_size=4 × shard_size=1 × tensor_parallel_size=1 is not trainer.devices ×"
            " trainer.num_nodes = 6: use sizes of 1, 2, 3, 6, and shard_size=null",
        ),
        (
            lambda: fsdp(4, tensor_parallel_size=2, shard_size=4),
            "strategy=fsdp_tp: replicate_size=1 × shard_size=4 × tensor_parallel_size=2 is not",
        ),
    ],
)
def test_sizes_that_do_not_multiply_are_refused_with_the_nearest(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("strategy=fsdp", "strategy.cpu_offload=true"), "strategy.cpu_offload: needs CUDA"),
        (("strategy=fsdp", "compile=model"), "compile.scope: compile=model cannot trace through strategy=fsdp"),
        (("strategy=tensor_parallel", "attention=mqa"), "attention.n_kv_heads=1 cannot be divided among 2"),
        (("strategy=tensor_parallel", "model.d_ff=33"), "model.d_ff=33 cannot be divided among 2"),
        (("strategy=tensor_parallel", "attention.dropout=0.1"), "attention.dropout=0.1: tensor parallelism divides"),
        (("strategy=single",), "strategy=single runs on one device"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    overrides: tuple[str, ...], message: str, text_corpus: Any, shards_dir: Any
) -> None:
    lines = tiny(text_corpus, shards_dir, "trainer.devices=2", *overrides)
    with pytest.raises(ConfigError) as refused:
        plan_of(config.plain(config.compose(lines)))
    assert message in str(refused.value)


@pytest.fixture
def sharded(text_corpus: Any, shards_dir: Any) -> tuple[MeshStrategy, nn.Module, torch.optim.Optimizer]:
    """A decoder of one process under FSDP2, built as LanguageModel builds it, with its optimizer."""
    settings = config.plain(config.compose(tiny(text_corpus, shards_dir)))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    strategy = fsdp(1).strategy()
    assert isinstance(strategy, MeshStrategy)
    strategy._data_mesh = init_device_mesh("cpu", (1,))
    with torch.device("meta"):
        decoder = build_decoder(settings, 257, 0)
    strategy.parallelize(decoder, None, lambda _: None)
    decoder.to_empty(device="cpu")
    decoder.initialize(3)
    model = nn.ModuleDict({"decoder": decoder})
    strategy._model = model
    return strategy, model, build_optimizer(settings, decoder)


def test_blocks_are_divided_one_by_one_and_the_rest_together(sharded: Any) -> None:
    decoder = sharded[1]["decoder"]
    assert isinstance(decoder, FSDPModule)
    assert all(isinstance(block, FSDPModule) for block in decoder.blocks)
    assert sum(isinstance(module, FSDPModule) for module in decoder.modules()) == 1 + len(decoder.blocks)


def test_the_optimizers_state_is_that_of_one_process(
    sharded: Any, text_corpus: Any, shards_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, model, optimizer = sharded
    monkeypatch.setattr(MeshStrategy, "global_rank", 0)
    settings = config.plain(config.compose(tiny(text_corpus, shards_dir)))
    plain = build_decoder(settings, 257, 0)
    plain.initialize(3)
    plain_optimizer = build_optimizer(settings, plain)
    tokens = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
    for decoder, its in ((model["decoder"], optimizer), (plain, plain_optimizer)):
        decoder(tokens, tokens).loss.backward()
        its.step()
    state, expected = strategy.optimizer_state(optimizer), plain_optimizer.state_dict()
    assert state["state"].keys() == expected["state"].keys()
    assert [group["params"] for group in state["param_groups"]] == [g["params"] for g in expected["param_groups"]]
    for number, values in expected["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(state["state"][number][name], value)
