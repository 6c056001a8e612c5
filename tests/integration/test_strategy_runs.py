"""Every strategy trains as one process does: the same weights, tokens and losses, whatever is divided among whom.

All cases of a number of processes run in one group of processes, as starting one takes seconds.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ranks import Case, train_in_processes, train_one
from thunderhead.core import config
from thunderhead.core.config import ConfigError, read_mapping
from thunderhead.training.plan import Plan
from thunderhead.training.record import read_rows
from tiny import OPTIONS, plan_of, tiny

# Dynamo hides this warning of its own look at activations, which does not help where warnings are errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # of a run that was copied
]

FIVE_DIGITS = 1e-5  # relative
SINGLE = ("strategy=single",)
TWO = {  # processes
    "ddp": ("strategy=ddp",),
    "fsdp": ("strategy=fsdp",),
    "zero2": ("strategy=fsdp", "strategy.reshard_after_forward=false"),
    "tensor_parallel": ("strategy=tensor_parallel",),
}
ZERO1 = ("strategy=zero1",)  # compared with ddp bit for bit, and so with one process
FOUR = {
    "fsdp_tp": ("strategy=fsdp_tp", "strategy.tensor_parallel_size=2"),
    "hsdp": ("strategy=hsdp", "strategy.replicate_size=2"),
}
# Eight sequences a step: 4 micro-batches of one process (and of tensor parallelism), 2 of two, 1 of four. Gradients are
# longer than 0.5 here, so that every step is clipped.
BASE = (
    *("batch.global_tokens=256", "budget.steps=4", "trainer.gradient_clip_val=0.5", "callbacks=default"),
    *("callbacks.checkpoint.every_n_train_steps=2", "~callbacks.best", "validation.every=4"),
)
# Everything else that meets a strategy, at once; both kinds of parameter groups, heads that share keys.
RICH = (
    *("batch.global_tokens=256", "budget.steps=4", "trainer.gradient_clip_val=0.5"),
    *("activation_checkpointing=block", "compile=block", "attention.n_kv_heads=2", "attention.qk_norm=true"),
    *("model.tie_embeddings=true", "optimizer=lion", "position=learned", "activation=gelu", "norm=layernorm"),
)


# In 16 bits a sum's rounding depends on what a rank adds up: with tensor parallelism half of a product at a time. The
# weights stay as far apart as their gradients' rounding, 2⁻⁸ of each.
PRECISIONS = {
    name: (*BASE, "activation_checkpointing=block", f"precision={name}") for name in ("bf16-mixed", "bf16-true")
}
SIXTEEN_BITS = 2e-4
# As on real hardware, with the compiler's own view of gradients (aot_eager), which is compile.backend=inductor's too.
COMPILED = {
    "ddp": ("compile=model", "activation_checkpointing=block"),
    "fsdp": ("compile=block", "activation_checkpointing=block"),
    "zero2": ("compile=block", "activation_checkpointing=selective"),
    "tensor_parallel": ("compile=model", "activation_checkpointing=selective"),
}
# The other way of clipping, on gradients that are longer than that in places; the loss in chunks.
CHUNKS = ("loss.chunk_size=24", "trainer.gradient_clip_algorithm=value", "trainer.gradient_clip_val=0.01")
# The first parameter of the optimizer is replicated under tensor parallelism, the others are not: see overflow.py.
OVERFLOW = (
    *("precision=fp16-mixed", "attention=mla", "attention.q_lora_rank=16", "batch.global_tokens=256", "budget.steps=3"),
    "+callbacks.overflow._target_=overflow.OverflowOnRank1",
)


class Ran(NamedTuple):
    """What is left of a run."""

    folder: Path
    said: dict[str, Any]  # by rank 0

    def rows(self, column: str) -> list[tuple[int, float]]:
        """(step, value) of each row that has one; clipping by value logs no norm."""
        rows = read_rows(self.folder / "metrics.csv")[1]
        return [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]


Train = Callable[[int, dict[str, Iterable[str]]], dict[str, Ran]]


@pytest.fixture(scope="module")
def train(text_corpus: Path, shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train(2, {name: overrides}) trains new runs, or goes on with those that an override resume=… names."""

    def train(n: int, runs: dict[str, Iterable[str]]) -> dict[str, Ran]:
        work = tmp_path_factory.mktemp("ranks")
        cases = []
        for name, overrides in runs.items():
            resumed = next((Path(o.partition("=")[2]) for o in overrides if o.startswith("resume=")), None)
            lines = [*overrides, f"trainer.devices={n}"]
            if resumed is None:
                lines = [*tiny(text_corpus, shards_dir, *lines)]
            cases.append(Case(resumed.parents[1] if resumed is not None else work / name, lines))
        said = [train_one(case) for case in cases] if n == 1 else train_in_processes(n, cases, work)
        return {name: Ran(case.folder, one) for name, case, one in zip(runs, cases, said, strict=True)}

    return train


def assert_same(run: Ran, reference: Ran, tolerance: float = FIVE_DIGITS) -> None:
    """Losses of every step to five digits, norms of gradients to four, and the same tokens."""
    assert "error" not in run.said, run.said["error"]
    for column, relative in (("train/loss", tolerance), ("grad_norm", 10 * tolerance)):
        expected = [(step, pytest.approx(value, rel=relative)) for step, value in reference.rows(column)]
        assert run.rows(column) == expected
    assert read_mapping(run.folder / "data.json") == read_mapping(reference.folder / "data.json")
    summaries = [read_mapping(one.folder / "summary.json") for one in (run, reference)]
    assert summaries[0]["val_loss"] == pytest.approx(summaries[1]["val_loss"], rel=tolerance)
    assert summaries[0]["tokens"] == summaries[1]["tokens"]


def cut(run: Ran, folder: Path) -> str:
    """A copy of a run that was stopped after step 2, as resume=… names it."""
    assert "error" not in run.said, run.said["error"]
    shutil.copytree(run.folder, folder)
    (folder / "summary.json").unlink()
    return f"resume={folder}/checkpoints/step-2.ckpt"


@pytest.fixture(scope="module")
def one(train: Train) -> dict[str, Ran]:
    kinds = {"base": BASE, "rich": RICH, "chunks": (*BASE, *CHUNKS), **PRECISIONS}
    return train(1, {name: (*SINGLE, *options) for name, options in kinds.items()})


@pytest.fixture(scope="module")
def two(train: Train, one: dict[str, Ran], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    folder = tmp_path_factory.mktemp("stopped")
    runs = {f"base {name}": (*options, *BASE) for name, options in TWO.items()}
    runs |= {f"rich {name}": (*TWO[name], *RICH) for name in ("ddp", "fsdp")}
    runs |= {f"{kind} zero1": (*ZERO1, *options) for kind, options in {"base": BASE, "rich": RICH}.items()}
    runs["bf16-mixed fsdp"] = (*TWO["fsdp"], *PRECISIONS["bf16-mixed"])
    # From one process to two; what two leave behind is gone on with by others below.
    runs |= {f"single → {name}": (cut(one["base"], folder / name), *TWO[name]) for name in ("ddp", "fsdp")}
    runs["mqa"] = (*TWO["tensor_parallel"], *BASE, "attention=mqa")
    runs["overflow fsdp"] = (*TWO["fsdp"], *OVERFLOW)
    return train(2, runs)


@pytest.fixture(scope="module")
def two_more(train: Train) -> dict[str, Ran]:
    """What takes longer than it shows anew, but in the slow suite."""
    kinds = {"chunks": (*BASE, *CHUNKS), **PRECISIONS}
    runs = {f"{kind} {name}": (*options, *kinds[kind]) for kind, (name, options) in product(kinds, TWO.items())}
    runs |= {f"rich {name}": (*TWO[name], *RICH) for name in ("zero2", "tensor_parallel")}
    runs["overflow tensor_parallel"] = (*TWO["tensor_parallel"], *OVERFLOW)
    runs["bf16-true zero1"] = (*ZERO1, *kinds["bf16-true"])
    runs |= {f"compiled {s}": (*TWO[s], *BASE, *COMPILED[s], "compile.backend=aot_eager") for s in TWO}
    return train(2, runs)


@pytest.fixture(scope="module")
def four(train: Train, two: dict[str, Ran], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    runs = {f"base {name}": (*options, *BASE) for name, options in FOUR.items()}
    runs["fsdp → fsdp_tp"] = (cut(two["base fsdp"], tmp_path_factory.mktemp("stopped") / "fsdp"), *FOUR["fsdp_tp"])
    return train(4, runs)


@pytest.fixture(scope="module")
def four_more(train: Train, two: dict[str, Ran], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    folder = tmp_path_factory.mktemp("stopped")
    runs = {"base fsdp": (*TWO["fsdp"], *BASE), "base zero1": (*ZERO1, *BASE)}
    runs["overflow fsdp_tp"] = (*FOUR["fsdp_tp"], *OVERFLOW)
    runs["zero1 → hsdp"] = (cut(two["base zero1"], folder / "zero1"), *FOUR["hsdp"])
    runs["tensor_parallel → hsdp"] = (cut(two["base tensor_parallel"], folder / "tp"), *FOUR["hsdp"])
    return train(4, runs)


@pytest.mark.parametrize("name", [*(f"base {strategy}" for strategy in TWO), "rich ddp", "rich fsdp"])
def test_two_processes_train_as_one(name: str, one: dict[str, Ran], two: dict[str, Ran]) -> None:
    reference = one[name.partition(" ")[0]]
    assert_same(two[name], reference)
    assert two[name].said["initial_weights"] == reference.said["initial_weights"]
    assert one["base"].said["initial_weights"] != one["rich"].said["initial_weights"]


def test_two_processes_train_as_one_in_16_bits(one: dict[str, Ran], two: dict[str, Ran]) -> None:
    assert_same(two["bf16-mixed fsdp"], one["bf16-mixed"], SIXTEEN_BITS)
    assert one["bf16-mixed"].rows("train/loss") != one["base"].rows("train/loss")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", TWO)
def test_more_of_two_processes_trains_as_one(strategy: str, one: dict[str, Ran], two_more: dict[str, Ran]) -> None:
    assert_same(two_more[f"chunks {strategy}"], one["chunks"])
    assert_same(two_more[f"compiled {strategy}"], one["base"])
    for precision in PRECISIONS:
        assert_same(two_more[f"{precision} {strategy}"], one[precision], SIXTEEN_BITS)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "tensor_parallel"])
def test_more_of_two_processes_trains_as_one_with_all_else(
    strategy: str, one: dict[str, Ran], two_more: dict[str, Ran]
) -> None:
    assert_same(two_more[f"rich {strategy}"], one["rich"])
    assert two_more[f"rich {strategy}"].said["initial_weights"] == one["rich"].said["initial_weights"]


@pytest.mark.parametrize("name", FOUR)
def test_four_processes_train_as_one(name: str, one: dict[str, Ran], four: dict[str, Ran]) -> None:
    assert_same(four[f"base {name}"], one["base"])
    assert four[f"base {name}"].said["initial_weights"] == one["base"].said["initial_weights"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base zero1", "base fsdp"])
def test_four_processes_train_as_one_by_strategies_of_two(
    name: str, one: dict[str, Ran], four_more: dict[str, Ran]
) -> None:
    assert_same(four_more[name], one["base"])
    assert four_more[name].said["initial_weights"] == one["base"].said["initial_weights"]


def assert_stored(ran: dict[str, Ran], one: dict[str, Ran], expected: dict[str, tuple[float, ...]]) -> None:
    """Parts of one process' bytes of parameters, gradients and optimizer state: what is divided, among whom."""
    for name, shares in expected.items():
        for part, share in zip(("parameters", "gradients", "optimizer_state"), shares, strict=True):
            # a little more: norms are whole under tensor parallelism
            assert ran[f"base {name}"].said[part] / one["base"].said[part] == pytest.approx(share, rel=0.02)


def test_what_a_rank_stores_falls_with_their_number(
    one: dict[str, Ran], two: dict[str, Ran], four: dict[str, Ran]
) -> None:
    expected = {
        "ddp": (1, 1, 1),
        "zero1": (1, 1, 1 / 2),
        "zero2": (1, 1 / 2, 1 / 2),  # it keeps parameters gathered
        "fsdp": (1 / 2, 1 / 2, 1 / 2),
        "tensor_parallel": (1 / 2, 1 / 2, 1 / 2),
    }
    assert_stored(two, one, expected)
    assert_stored(four, one, {"hsdp": (1 / 2, 1 / 2, 1 / 2), "fsdp_tp": (1 / 4, 1 / 4, 1 / 4)})


@pytest.mark.slow
def test_what_one_of_four_ranks_stores(one: dict[str, Ran], four_more: dict[str, Ran]) -> None:
    # of zero1 its largest parameter
    assert_stored(four_more, one, {"zero1": (1, 1, 0.346), "fsdp": (1 / 4, 1 / 4, 1 / 4)})


def assert_planned(run: Ran) -> None:
    planned = read_mapping(run.folder / "plan.json")["memory"]
    steps_of_each_parameter = 500  # bytes
    for part in ("parameters", "gradients", "optimizer_state"):
        assert planned[part] == pytest.approx(run.said[part], abs=steps_of_each_parameter)


def test_the_plan_knows_what_a_rank_of_zero1_stores(two: dict[str, Ran]) -> None:
    assert_planned(two["base zero1"])


@pytest.mark.slow
def test_the_plan_knows_what_one_of_four_ranks_of_zero1_stores(four_more: dict[str, Ran]) -> None:
    assert_planned(four_more["base zero1"])


def test_zero1_is_ddp_bit_for_bit(two: dict[str, Ran]) -> None:
    for kind in ("base", "rich"):
        first, second = two[f"{kind} ddp"], two[f"{kind} zero1"]
        for column in ("train/loss", "grad_norm", "val/loss"):
            assert first.rows(column) == second.rows(column)
    files = [two[f"base {name}"].folder / "checkpoints" / "last.ckpt" for name in ("ddp", "zero1")]
    states = [torch.load(file, weights_only=True)["optimizer_states"] for file in files]
    for ddp, zero1 in zip(*states, strict=True):
        assert ddp["param_groups"] == zero1["param_groups"]
        torch.testing.assert_close(ddp["state"], zero1["state"], rtol=0, atol=0)


@pytest.mark.slow
def test_zero1_is_ddp_bit_for_bit_in_16_bits(two_more: dict[str, Ran]) -> None:
    first, second = two_more["bf16-true ddp"], two_more["bf16-true zero1"]
    for column in ("train/loss", "grad_norm", "val/loss"):
        assert first.rows(column) == second.rows(column)


@pytest.mark.parametrize("name", ["single → ddp", "single → fsdp"])
def test_one_process_is_gone_on_with_by_two(name: str, one: dict[str, Ran], two: dict[str, Ran]) -> None:
    assert_same(two[name], one["base"])


def test_two_processes_are_gone_on_with_by_four(one: dict[str, Ran], four: dict[str, Ran]) -> None:
    assert_same(four["fsdp → fsdp_tp"], one["base"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1 → hsdp", "tensor_parallel → hsdp"])
def test_other_two_processes_are_gone_on_with_by_four(
    name: str, one: dict[str, Ran], four_more: dict[str, Ran]
) -> None:
    assert_same(four_more[name], one["base"])


@pytest.mark.slow
def test_layouts_take_over_from_one_another(
    train: Train,
    one: dict[str, Ran],
    two: dict[str, Ran],
    four: dict[str, Ran],
    four_more: dict[str, Ran],
    tmp_path: Path,
) -> None:
    """On two processes, from two and from four."""
    stopped = {
        "fsdp": two["base tensor_parallel"], "tensor_parallel": two["base fsdp"], "zero2": four["base hsdp"],
        "ddp": four["base fsdp_tp"], "zero1": four_more["base fsdp"],
    }  # fmt: skip
    runs = {to: (cut(run, tmp_path / to), *(TWO | {"zero1": ZERO1})[to]) for to, run in stopped.items()}
    runs["single → tensor_parallel"] = (cut(one["base"], tmp_path / "single"), *TWO["tensor_parallel"])
    for run in train(2, runs).values():
        assert_same(run, one["base"])


def test_two_and_four_processes_are_gone_on_with_by_one(
    train: Train, one: dict[str, Ran], two: dict[str, Ran], four: dict[str, Ran], tmp_path: Path
) -> None:
    stopped = {"zero1": two["base zero1"], "fsdp": two["base fsdp"], "hsdp": four["base hsdp"]}
    stopped["tensor_parallel"] = two["base tensor_parallel"]
    for run in train(1, {name: (cut(run, tmp_path / name), *SINGLE) for name, run in stopped.items()}).values():
        assert_same(run, one["base"])


def assert_left_out(run: Ran, n: int) -> None:
    """Of a step that overflows on one rank: the same scale and steps on all."""
    assert "error" not in run.said, run.said["error"]
    first, *others = [json.loads((run.folder / f"overflow-{rank}.json").read_text()) for rank in range(n)]
    assert all(
        [(at["scale"], at["steps"]) for at in other] == [(at["scale"], at["steps"]) for at in first] for other in others
    )
    ends = [first[0], first[-1]]
    assert [at["scale"] for at in ends] == [65536, 32768]
    assert ends[1]["steps"] == [2]  # of three
    if n == 2:  # else data-parallel ranks hold different parts of what tensor-parallel ranks have alike
        assert all([at["alike"] for at in other] == [at["alike"] for at in first] for other in others)


def test_a_step_that_overflows_on_one_rank_is_left_out_on_all(two: dict[str, Ran]) -> None:
    assert_left_out(two["overflow fsdp"], 2)


@pytest.mark.slow
def test_it_is_so_where_tensors_are_divided(two_more: dict[str, Ran], four_more: dict[str, Ran]) -> None:
    assert_left_out(two_more["overflow tensor_parallel"], 2)
    assert_left_out(four_more["overflow fsdp_tp"], 4)


def test_what_torch_cannot_compile_is_refused_by_name_and_not_chosen(text_corpus: Path, tmp_path: Path) -> None:
    overrides = ("trainer.devices=2", "strategy=tensor_parallel", "attention=mha", "activation_checkpointing=block")

    def plan(*more: str) -> Plan:
        return plan_of(config.plain(config.compose([*tiny(text_corpus, tmp_path, *overrides, *more)])))

    for scope in ("block", "model"):
        with pytest.raises(ConfigError, match=r"^compile\.scope: torch cannot compile whole checkpointed blocks under"):
            plan(f"compile={scope}", "compile.backend=inductor")
    for more, chosen in (((), "none"), (("activation_checkpointing=selective",), "model")):
        assert plan("compile=auto", "budget.steps=10000000", *more).compile == chosen


def test_what_cannot_be_divided_is_refused_by_name(two: dict[str, Ran]) -> None:
    assert "attention.n_kv_heads=1 cannot be divided among 2 tensor-parallel ranks" in two["mqa"].said["error"]


# --- every option, which takes minutes

SHORT = ("batch.global_tokens=256", "budget.steps=3", "trainer.gradient_clip_val=0.5")
# Learning rates of the tiny model are high, and Muon's iteration, whose matrix products are in bfloat16, amplifies what
# differs by rounding; so does Adafactor's first step, where a gradient of 1e-9 counts as much as one of 1.
LOOSER = {"optimizer=muon": 1e-3, "optimizer=adafactor": 1e-4}
CHOICES = {
    **{f"attention={name}": (f"attention={name}",) for name in OPTIONS["attention"]},
    **{f"optimizer={name}": (f"optimizer={name}",) for name in OPTIONS["optimizer"]},
    **{f"position={name}": (f"position={name}",) for name in OPTIONS["position"]},
    **{f"activation={name}": (f"activation={name}",) for name in OPTIONS["activation"]},
    **{f"block={name}": (f"block={name}",) for name in OPTIONS["block"]},
    "document_mask": ("attention.document_mask=true",),
    "parametrization=mup": ("parametrization=mup", "parametrization.base_d_model=16"),
    **{
        f"{name} attention={attention}": (*options, f"attention={attention}")
        for (name, options), attention in product(
            {
                "compile": ("compile=block",),
                "checkpointing": ("activation_checkpointing=block",),
                "compile and checkpointing": ("compile=block", "activation_checkpointing=block"),
            }.items(),
            OPTIONS["attention"],
        )
    },
}
REFUSED = {
    (strategy, name): "attention.n_kv_heads=1 cannot be divided among"
    for strategy, name in product(("tensor_parallel", "fsdp_tp"), CHOICES)
    if "attention=mqa" in name
}


@pytest.fixture(scope="module")
def every(train: Train) -> dict[str, Ran]:
    """All choices in one process, and under every strategy."""
    ran = train(1, {name: (*SINGLE, *SHORT, *choice) for name, choice in CHOICES.items()})
    for n, strategies in ((2, TWO | {"zero1": ZERO1}), (4, FOUR)):
        ran |= train(
            n,
            {
                f"{strategy} {name}": (*options, *SHORT, *choice)
                for (strategy, options), (name, choice) in product(strategies.items(), CHOICES.items())
            },
        )
    return ran


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*TWO, "zero1", *FOUR])
@pytest.mark.parametrize("name", CHOICES)
def test_every_option_trains_as_one_process(name: str, strategy: str, every: dict[str, Ran]) -> None:
    run = every[f"{strategy} {name}"]
    if (strategy, name) in REFUSED:
        assert REFUSED[strategy, name] in run.said["error"]
        return
    assert_same(run, every[name], LOOSER.get(name, FIVE_DIGITS))
    assert run.said["initial_weights"] == every[name].said["initial_weights"]
