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
    "norm._target_=buffered.BufferedNorm",
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

SOON = {  # by number of processes; the others, which take longer than they show anew, are trained by the slow suite
    2: {
        *("base ddp", "base fsdp", "base zero2", "base tensor_parallel", "base zero1", "rich fsdp"),
        *("bf16-mixed fsdp", "single → ddp", "single → fsdp", "mqa", "overflow fsdp"),
    },
    4: {"base fsdp_tp", "base hsdp", "fsdp → fsdp_tp"},
}


class Runs:
    """Runs by name, in n processes: those that are soon, or all others, are trained once one of them is asked for."""

    def __init__(self, train: Train, n: int, runs: dict[str, Iterable[str]]):
        self._train, self._n, self._runs, self._ran = train, n, runs, dict[str, Ran]()

    def __getitem__(self, name: str) -> Ran:
        if name not in self._ran:
            together = {
                one: run for one, run in self._runs.items() if (one in SOON[self._n]) == (name in SOON[self._n])
            }
            self._ran |= self._train(self._n, together)
        return self._ran[name]


def marks(n: int, *names: str) -> Any:
    """Of a test that needs these runs of n processes."""
    return [] if SOON[n].issuperset(names) else [pytest.mark.slow]


def cases(n: int, names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=marks(n, name)) for name in names]


def of_both(names: Iterable[tuple[int, str]]) -> list[Any]:
    return [pytest.param(n, name, marks=marks(n, name)) for n, name in names]


def beside(kinds: Iterable[str], strategies: Iterable[str]) -> list[str]:
    return [f"{kind} {strategy}" for kind, strategy in product(kinds, strategies)]


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
    (found,), (expected,) = (
        read_mapping(one.folder / "document_losses.json")["sources"].values() for one in (run, reference)
    )
    assert found["targets"] == expected["targets"]
    assert found["nats"] == pytest.approx(expected["nats"], rel=tolerance, abs=1e-3)  # four decimals in the file


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
def two(train: Train, one: dict[str, Ran], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("stopped")
    kinds = {"base": BASE, "rich": RICH, "chunks": (*BASE, *CHUNKS), **PRECISIONS}
    runs: dict[str, Iterable[str]] = {
        f"{kind} {name}": (*options, *kinds[kind]) for kind, (name, options) in product(kinds, TWO.items())
    }
    runs |= {f"{kind} zero1": (*ZERO1, *kinds[kind]) for kind in ("base", "rich", "bf16-true")}
    # From one process to two; what two leave behind is gone on with by others below.
    runs |= {f"single → {name}": (cut(one["base"], folder / name), *TWO[name]) for name in ("ddp", "fsdp")}
    runs |= {f"compiled {s}": (*TWO[s], *BASE, *COMPILED[s], "compile.backend=aot_eager") for s in TWO}
    runs["mqa"] = (*TWO["tensor_parallel"], *BASE, "attention=mqa")
    runs |= {f"overflow {name}": (*TWO[name], *OVERFLOW) for name in ("fsdp", "tensor_parallel")}
    return Runs(train, 2, runs)


@pytest.fixture(scope="module")
def four(train: Train, two: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("stopped")
    kinds = {"base": BASE, "rich": RICH}
    runs: dict[str, Iterable[str]] = {
        f"{kind} {name}": (*options, *kinds[kind]) for kind, (name, options) in product(kinds, FOUR.items())
    }
    runs |= {f"base {name}": (*TWO[name], *BASE) for name in ("ddp", "fsdp", "zero2")}
    runs["base zero1"] = (*ZERO1, *BASE)
    runs["fsdp → fsdp_tp"] = (cut(two["base fsdp"], folder / "fsdp"), *FOUR["fsdp_tp"])
    runs["overflow fsdp_tp"] = (*FOUR["fsdp_tp"], *OVERFLOW)
    runs["zero1 → hsdp"] = (cut(two["base zero1"], folder / "zero1"), *FOUR["hsdp"])
    runs["tensor_parallel → hsdp"] = (cut(two["base tensor_parallel"], folder / "tp"), *FOUR["hsdp"])
    return Runs(train, 4, runs)


@pytest.mark.parametrize("name", cases(2, beside(("base", "rich", "chunks"), TWO)))
def test_two_processes_train_as_one(name: str, one: dict[str, Ran], two: Runs) -> None:
    assert_same(two[name], one[name.partition(" ")[0]])


@pytest.mark.parametrize("name", cases(2, beside(["compiled"], TWO)))
def test_two_processes_train_as_one_when_compiled(name: str, one: dict[str, Ran], two: Runs) -> None:
    assert_same(two[name], one["base"])


@pytest.mark.parametrize("name", cases(2, beside(PRECISIONS, TWO)))
def test_two_processes_train_as_one_in_16_bits(name: str, one: dict[str, Ran], two: Runs) -> None:
    reference = one[name.partition(" ")[0]]
    assert_same(two[name], reference, SIXTEEN_BITS)
    assert reference.rows("train/loss") != one["base"].rows("train/loss")


@pytest.mark.parametrize("name", cases(2, beside(("base", "rich"), TWO)))
def test_initial_weights_are_the_same_bit_for_bit(name: str, one: dict[str, Ran], two: Runs) -> None:
    assert two[name].said["initial_weights"] == one[name.partition(" ")[0]].said["initial_weights"]
    assert one["base"].said["initial_weights"] != one["rich"].said["initial_weights"]


OF_FOUR = [*beside(["base"], ("ddp", "zero1", "fsdp", "zero2", "fsdp_tp", "hsdp")), *beside(["rich"], FOUR)]


@pytest.mark.parametrize("name", cases(4, OF_FOUR))
def test_four_processes_train_as_one(name: str, one: dict[str, Ran], four: Runs) -> None:
    reference = one[name.partition(" ")[0]]
    assert_same(four[name], reference)
    assert four[name].said["initial_weights"] == reference.said["initial_weights"]


STORED = {  # parts of one process' bytes of parameters, gradients and optimizer state: what is divided, among whom
    (2, "base ddp"): (1, 1, 1), (4, "base ddp"): (1, 1, 1),
    (2, "base zero1"): (1, 1, 1 / 2), (4, "base zero1"): (1, 1, 0.346),  # its largest parameter
    (2, "base zero2"): (1, 1 / 2, 1 / 2), (4, "base zero2"): (1, 1 / 4, 1 / 4),  # it keeps parameters gathered
    (2, "base fsdp"): (1 / 2, 1 / 2, 1 / 2), (4, "base fsdp"): (1 / 4, 1 / 4, 1 / 4),
    (4, "base hsdp"): (1 / 2, 1 / 2, 1 / 2),
    (2, "base tensor_parallel"): (1 / 2, 1 / 2, 1 / 2), (4, "base fsdp_tp"): (1 / 4, 1 / 4, 1 / 4),
}  # fmt: skip


@pytest.mark.parametrize(("n", "name"), of_both(STORED))
def test_what_a_rank_stores_falls_with_their_number(
    n: int, name: str, one: dict[str, Ran], two: Runs, four: Runs
) -> None:
    run = {2: two, 4: four}[n][name]
    for part, share in zip(("parameters", "gradients", "optimizer_state"), STORED[n, name], strict=True):
        # a little more: norms are whole under tensor parallelism
        assert run.said[part] / one["base"].said[part] == pytest.approx(share, rel=0.02)


@pytest.mark.parametrize("n", [pytest.param(n, marks=marks(n, "base zero1")) for n in (2, 4)])
def test_the_plan_knows_what_a_rank_of_zero1_stores(n: int, two: Runs, four: Runs) -> None:
    run = {2: two, 4: four}[n]["base zero1"]
    planned = read_mapping(run.folder / "plan.json")["memory"]
    steps_of_each_parameter = 500  # bytes
    for part in ("parameters", "gradients", "optimizer_state"):
        assert planned[part] == pytest.approx(run.said[part], abs=steps_of_each_parameter)


ALIKE = [(2, "base"), (2, "rich"), (2, "bf16-true"), (4, "base")]


@pytest.mark.parametrize(
    ("n", "kind"), [pytest.param(n, kind, marks=marks(n, *beside([kind], ("ddp", "zero1")))) for n, kind in ALIKE]
)
def test_zero1_is_ddp_bit_for_bit(n: int, kind: str, two: Runs, four: Runs) -> None:
    first, second = ({2: two, 4: four}[n][f"{kind} {strategy}"] for strategy in ("ddp", "zero1"))
    for column in ("train/loss", "grad_norm", "val/loss"):
        assert first.rows(column) == second.rows(column)


def test_the_state_of_zero1_is_that_of_ddp_bit_for_bit(two: Runs) -> None:
    files = [two[f"base {name}"].folder / "checkpoints" / "last.ckpt" for name in ("ddp", "zero1")]
    states = [torch.load(file, weights_only=True)["optimizer_states"] for file in files]
    for ddp, zero1 in zip(*states, strict=True):
        assert ddp["param_groups"] == zero1["param_groups"]
        torch.testing.assert_close(ddp["state"], zero1["state"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["single → ddp", "single → fsdp"])
def test_one_process_is_gone_on_with_by_two(name: str, one: dict[str, Ran], two: Runs) -> None:
    assert_same(two[name], one["base"])


@pytest.mark.parametrize("name", cases(4, ["fsdp → fsdp_tp", "zero1 → hsdp", "tensor_parallel → hsdp"]))
def test_two_processes_are_gone_on_with_by_four(name: str, one: dict[str, Ran], four: Runs) -> None:
    assert_same(four[name], one["base"])


@pytest.mark.slow
def test_layouts_take_over_from_one_another(
    train: Train, one: dict[str, Ran], two: Runs, four: Runs, tmp_path: Path
) -> None:
    """On two processes, from two and from four."""
    stopped = {
        "fsdp": two["base tensor_parallel"], "tensor_parallel": two["base fsdp"], "zero2": four["base hsdp"],
        "ddp": four["base fsdp_tp"], "zero1": four["base fsdp"],
    }  # fmt: skip
    runs = {to: (cut(run, tmp_path / to), *(TWO | {"zero1": ZERO1})[to]) for to, run in stopped.items()}
    runs["single → tensor_parallel"] = (cut(one["base"], tmp_path / "single"), *TWO["tensor_parallel"])
    for run in train(2, runs).values():
        assert_same(run, one["base"])


LEFT_BEHIND = [(4, "base zero1"), (2, "base fsdp"), (4, "base hsdp"), (2, "base tensor_parallel")]


@pytest.mark.parametrize(("n", "name"), of_both(LEFT_BEHIND))
def test_two_and_four_processes_are_gone_on_with_by_one(
    n: int, name: str, train: Train, one: dict[str, Ran], two: Runs, four: Runs, tmp_path: Path
) -> None:
    stopped = cut({2: two, 4: four}[n][name], tmp_path / "stopped")
    assert_same(train(1, {name: (stopped, *SINGLE)})[name], one["base"])


OVERFLOWING = [(2, "overflow fsdp"), (2, "overflow tensor_parallel"), (4, "overflow fsdp_tp")]


@pytest.mark.parametrize(("n", "name"), of_both(OVERFLOWING))
def test_a_step_that_overflows_on_one_rank_is_left_out_on_all(n: int, name: str, two: Runs, four: Runs) -> None:
    run = {2: two, 4: four}[n][name]
    assert "error" not in run.said, run.said["error"]
    first, *others = [json.loads((run.folder / f"overflow-{rank}.json").read_text()) for rank in range(n)]
    assert all(
        [(at["scale"], at["steps"]) for at in other] == [(at["scale"], at["steps"]) for at in first] for other in others
    )
    ends = [first[0], first[-1]]
    assert [at["scale"] for at in ends] == [65536, 32768]
    assert ends[1]["steps"] == [2]  # of three
    if n == 2:  # where data-parallel ranks hold different parts of what tensor-parallel ranks have alike
        assert all([at["alike"] for at in other] == [at["alike"] for at in first] for other in others)


def test_what_torch_cannot_compile_is_refused_by_name_and_not_chosen(text_corpus: Path, tmp_path: Path) -> None:
    overrides = ("trainer.devices=2", "strategy=tensor_parallel", "attention=mha", "activation_checkpointing=block")

    def plan(*more: str) -> Plan:
        return plan_of(config.plain(config.compose([*tiny(text_corpus, tmp_path, *overrides, *more)])))

    for scope in ("block", "model"):
        with pytest.raises(ConfigError, match=r"^compile\.scope: torch cannot compile whole checkpointed blocks under"):
            plan(f"compile={scope}", "compile.backend=inductor")
    for more, chosen in (((), "none"), (("activation_checkpointing=selective",), "model")):
        assert plan("compile=auto", "budget.steps=10000000", *more).compile == chosen


def test_what_cannot_be_divided_is_refused_by_name(two: Runs) -> None:
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
