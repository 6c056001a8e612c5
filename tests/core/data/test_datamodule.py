import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data._utils import signal_handling

from shard_fixtures import files, find_manifest
from thunderhead.core.data.datamodule import FilledUp, MicroBatches
from thunderhead.core.data.manifest import ShardError
from thunderhead.core.data.shards import ShardReader
from thunderhead.corpus.mixture import Mixture, plan_turns, trained_blocks
from thunderhead.corpus.sources import LocalText
from thunderhead.corpus.text_data import TextData
from thunderhead.corpus.trained_tokenizers import ByteTokenizer

T = 32
SEQUENCES_PER_STEP = 8
STEPS = 20
Make = Callable[..., TextData]
Mixed = dict[str, object]


@pytest.fixture
def make(corpus: Path, tmp_path: Path) -> Make:
    """Build a data module over the corpus, with its shards prepared and checked, and a stand-in for the trainer."""

    def make(rank: int = 0, world_size: int = 1, **settings: object) -> TextData:
        defaults = {
            "tokenizer": ByteTokenizer(),
            "filters": {},
            "context_length": T,
            "micro_batch_size": 2,
            "sequences_per_step": SEQUENCES_PER_STEP,
            "seed": 5,
            "sources": {"text": LocalText(path=str(corpus))},
            "shards_dir": str(tmp_path / "shards"),
            "validation_fraction": 0.2,
            "shuffle_window": 100,
        }
        module = TextData(**{**defaults, **settings})
        strategy = SimpleNamespace(
            root_device=torch.device("cpu"), distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size}
        )
        module.trainer = SimpleNamespace(global_step=0, max_steps=STEPS, strategy=strategy)
        module.prepare_data()
        module.setup("fit")
        return module

    return make


def in_capitals(blocks: Tensor) -> Tensor:
    """Tell the source `few` from `many` by its bytes."""
    return ~((blocks >= ord("a")) & (blocks <= ord("z"))).any(dim=1)


def take(batches: Iterator[Tensor], count: int) -> Tensor:
    return torch.stack([next(batches) for _ in range(count)])


@pytest.fixture
def mixture(tmp_path: Path, corpus: Path) -> Mixed:
    """Two sources whose weights change in step 10, one of which is used up in step 12."""
    few = tmp_path / "few"
    few.mkdir(exist_ok=True)
    for file in sorted(corpus.iterdir())[:12]:
        (few / file.name).write_text(file.read_text().upper())
    many = LocalText(path=str(corpus), weight={0: 3.0, 0.5: 1.0})
    return {"sources": {"many": many, "few": LocalText(path=str(few), weight=1.0, max_epochs=0.075)}}


def expected(module: TextData, samples: range) -> Tensor:
    """Look each sample up on its own, with an order and readers of its own."""
    train = module.manifest.splits["train"]
    sizes = {s: shard.blocks(T) for s, shard in train.items()}
    trained = trained_blocks({s: sum(n) for s, n in sizes.items()}, T, module.max_training_tokens)
    turns = plan_turns(
        module.sources, trained, temperature=1.0, at_max_epochs="redistribute",
        steps=STEPS, sequences_per_step=SEQUENCES_PER_STEP,
    )  # fmt: skip
    place = Mixture(turns, sizes, seed=5, window=100, trained=trained)
    readers = {
        s: ShardReader(files(module.manifest.shard_folder("train", s), shard), shard, T, "uint16")
        for s, shard in train.items()
    }
    found = [place(n) for n in samples]
    return torch.stack([torch.from_numpy(readers[s].view(block).astype("int64")) for s, _, block in found])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize(
    ("world_size", "micro", "num_workers"),
    [(1, 1, 0), (1, 8, 1), (2, 2, 2), (4, 2, 0), (4, 1, 1), (2, 4, 4), (1, 2, 3)],
)
def test_a_step_has_the_same_samples_whatever_the_ranks(
    make: Make, world_size: int, micro: int, num_workers: int, mixture: Mixed
) -> None:
    steps, first = 4, 9
    accumulation = SEQUENCES_PER_STEP // (world_size * micro)
    by_rank = []
    for rank in range(world_size):
        settings = {"micro_batch_size": micro, "num_workers": num_workers}
        module = make(rank, world_size, **settings, **mixture)
        module.load_state_dict({"samples": first * SEQUENCES_PER_STEP, "order": {}})  # saved by a run of other sizes
        batches = take(iter(module.train_dataloader()), steps * accumulation)
        assert batches.dtype == torch.int64
        assert batches.shape[1:] == (micro, T + 1)
        by_rank.append(batches.unflatten(0, (steps, accumulation)))
    found = torch.stack(by_rank, dim=2)  # step, accumulation, rank, sequence, token: the order of the samples
    samples = range(first * SEQUENCES_PER_STEP, (first + steps) * SEQUENCES_PER_STEP)
    assert torch.equal(found.flatten(0, 3), expected(module, samples))
    ledgers = [module.ledger(STEPS)(n) for n in (samples.start, samples.stop)]
    drawn = {s: (ledgers[1][s].tokens - ledgers[0][s].tokens) // T for s in ("many", "few")}
    upper = in_capitals(found.flatten(0, 3))
    assert drawn == {"many": int((~upper).sum()), "few": int(upper.sum())}
    assert 0 < drawn["few"] < len(samples) // 2
    assert module._drawn.used_up["few"] in samples


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_part_of_the_data_is_trained_on_and_all_validated_on(make: Make) -> None:
    """10 blocks in steps of 8, on two ranks of which one has workers: the samples of one rank, 0.8 epochs a step."""
    settings = {"max_training_tokens": 10 * T + 5, "max_validation_bytes": 8 * T}
    steps = 5
    by_rank = []
    for rank, num_workers in enumerate((0, 2)):
        module = make(rank, 2, num_workers=num_workers, **settings)
        by_rank.append(take(iter(module.train_dataloader()), 2 * steps).unflatten(0, (steps, 2)))
    found = torch.stack(by_rank, dim=2).flatten(0, 3)
    module = make(**settings)
    assert torch.equal(found, expected(module, range(8 * steps)))
    assert len({tuple(block.tolist()) for block in found}) == 10
    assert torch.equal(found[:10].sort(dim=0).values, found[10:20].sort(dim=0).values)
    assert module.ledger(steps)(8 * steps)["text"].epochs == 4.0
    (validation,), (whole,) = (make(**s).val_dataloader() for s in (settings, {"max_validation_bytes": 8 * T}))
    assert torch.equal(next(iter(validation)), next(iter(whole)))


def test_a_signal_to_the_group_spares_a_worker_that_starts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    listen = signal_handling._set_worker_signal_handlers

    def signalled() -> None:
        """The moment in which it does what a signal does by default, and is of its parent's group still."""
        listen()
        assert os.getpgrp() != os.getpid()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", signalled)
    batches = iter(make(num_workers=1).train_dataloader())
    assert next(batches).shape == (2, T + 1)
    monkeypatch.undo()
    (worker,) = batches._workers  # type: ignore[attr-defined]
    assert os.getpgid(worker.pid) == worker.pid
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    worker.terminate()  # which it hears again
    worker.join(10)
    assert not worker.is_alive()


def test_a_dataset_is_filled_up_with_what_is_read_and_not_predicted() -> None:
    class Numbers:
        def __getitems__(self, samples: list[int]) -> Tensor:
            return torch.tensor([[n, ~n] for n in samples])

    filled = FilledUp(Numbers(), 3)
    assert filled.__getitems__([1, 2]).tolist() == [[1, ~1], [2, ~2]]
    assert filled.__getitems__([2, 3, 9]).tolist() == [[2, ~2], [~2, ~2], [~2, ~2]]


def test_micro_batches_come_in_order() -> None:
    ranks = [list(MicroBatches(100, 2, 3, rank, 2)) for rank in range(2)]
    assert ranks == [[[100, 101, 102], [106, 107, 108]], [[103, 104, 105], [109, 110, 111]]]


def test_a_micro_batch_that_does_not_divide_the_step_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"8 sequences a step are no multiple of 2 ranks × batch\.micro_size=3"):
        make(0, 2, micro_batch_size=3).train_dataloader()


def test_loading_leaves_the_global_random_state_alone(make: Make) -> None:
    module = make()
    before = torch.get_rng_state()
    next(iter(module.train_dataloader()))
    next(iter(module.val_dataloader()[0]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("verify", ["full", "first_use"])
def test_a_damaged_chunk_is_found_before_it_is_used(make: Make, verify: str) -> None:
    module = make()
    file = module.manifest.shard_folder("train", "text") / "chunk-0-0.bin"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    if verify == "full":
        with pytest.raises(ShardError, match="other bytes than were written"):
            make(verify="full")
    else:
        loader = make(verify="first_use").train_dataloader()
        with pytest.raises(ShardError, match="other bytes than were written"):
            next(iter(loader))


def test_settings_that_cannot_be_are_refused(make: Make, corpus: Path) -> None:
    (problem,) = make(path="elsewhere").problems(None)
    assert problem.message.startswith("data.path=elsewhere is used by no source")
    assert make(path=str(corpus)).problems(None) == []


def test_each_source_is_validated_on_its_own(make: Make, mixture: Mixed) -> None:
    module = make(max_validation_bytes=10_000, **mixture)
    many, few = (torch.cat(list(loader)) for loader in module.val_dataloader())
    sizes = [module.selection(source).bytes for source in ("many", "few")]
    assert all(0 < size <= 5_000 for size in sizes)
    assert not in_capitals(many).any()
    assert in_capitals(few).all()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 6}, "seed"),
        ({"shuffle_window": 50}, "data.shuffle_window"),
        ({"temperature": 2.0}, "the weights and max_epochs of data.sources"),
        ({"validation_fraction": 0.3}, "the training data"),
        ({"max_training_tokens": 100 * T}, "the weights and max_epochs of data.sources and data.max_training_tokens"),
    ],
)
def test_a_resume_in_another_order_is_refused(
    make: Make, changed: dict[str, object], named: str, mixture: Mixed
) -> None:
    settings = mixture
    module = make(**settings)
    module.load_state_dict({"samples": 9 * SEQUENCES_PER_STEP, "order": {}})
    module.train_dataloader()
    state = module.state_dict()
    same = make(micro_batch_size=8, **settings)
    same.load_state_dict(state)
    same.train_dataloader()
    later = make(**settings)
    later.sources["many"].weight = {0: 3.0, 0.5: 2.0}  # from step 10 on: none of it was drawn yet
    later.load_state_dict(state)
    later.train_dataloader()
    other = make(**settings | changed)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=f"resume: {named} changed since the checkpoint"):
        other.train_dataloader()


def test_shards_found_beforehand_are_used(make: Make, corpus: Path, tmp_path: Path) -> None:
    manifest = make().manifest
    settings = {"shards_dir": tmp_path / "shards", "validation_fraction": 0.2}
    assert find_manifest({"text": LocalText(path=str(corpus))}, ByteTokenizer(), **settings) == manifest
    gone = {"sources": {"text": LocalText(path="gone")}, "shards_dir": str(tmp_path / "shards")}
    sizes = {"context_length": T, "micro_batch_size": 2, "sequences_per_step": 8, "seed": 0}
    module = TextData(tokenizer=ByteTokenizer(), filters={}, **sizes, **gone)
    assert not module.is_prepared
    module.use(manifest)
    module.prepare_data()
    module.setup("fit")
    assert module.manifest is manifest


class Recorder(lightning.LightningModule):
    """A model of one parameter that keeps the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []
        self.validated: list[Tensor] = []

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        self.seen.append(batch.clone())
        return self.weight * batch.float().mean()

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.validated.append(batch.clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(steps: int, **settings: object) -> lightning.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    schedule = {"max_epochs": -1, "max_steps": steps, "val_check_interval": 8, "check_val_every_n_epoch": None}
    defaults = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False}
    return lightning.Trainer(**{**defaults, **quiet, **schedule, **settings})


def test_lightning_resumes_at_the_sample_after_the_last_step(make: Make, tmp_path: Path) -> None:
    whole = Recorder()
    module = make(micro_batch_size=2)
    trainer(6, accumulate_grad_batches=4).fit(whole, datamodule=module)
    assert module.samples_seen == 6 * SEQUENCES_PER_STEP
    samples = range(6 * SEQUENCES_PER_STEP)
    assert torch.equal(torch.cat(whole.seen), expected(module, samples))

    first = Recorder()
    interrupted = trainer(2, accumulate_grad_batches=4)
    interrupted.fit(first, datamodule=make(micro_batch_size=2))
    interrupted.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt")["TextData"]["samples"] == 2 * SEQUENCES_PER_STEP

    second, other_size = Recorder(), make(micro_batch_size=4)
    continued = trainer(4, accumulate_grad_batches=2)
    continued.fit(second, datamodule=other_size, ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(torch.cat(second.seen), expected(module, samples[2 * 8 : 4 * 8]))
    continued.save_checkpoint(tmp_path / "b.ckpt")
    assert torch.load(tmp_path / "b.ckpt")["TextData"]["samples"] == 4 * SEQUENCES_PER_STEP

    third = Recorder()
    trainer(6, accumulate_grad_batches=4).fit(third, datamodule=make(micro_batch_size=2), ckpt_path=tmp_path / "b.ckpt")
    assert torch.equal(torch.cat(third.seen), expected(module, samples[4 * 8 :]))


def test_lightning_trains_beyond_the_first_epoch_and_validates_on_the_same_blocks(make: Make) -> None:
    module, model = make(micro_batch_size=8, max_validation_bytes=16 * T), Recorder()
    count = sum(module.manifest.splits["train"]["text"].blocks(T))
    steps = count // 8 + 4
    trainer(steps, val_check_interval=steps // 2, num_sanity_val_steps=0).fit(model, datamodule=module)
    assert torch.equal(torch.cat(model.seen), expected(module, range(steps * 8)))
    first, second = model.validated[: len(model.validated) // 2], model.validated[len(model.validated) // 2 :]
    assert torch.equal(torch.cat(first), torch.cat(second))
    assert (torch.cat(first)[:, 1:] >= 0).sum() == module.selection("text").tokens.sum()


def test_lightning_may_not_replace_the_sampler(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    connector = "lightning.pytorch.trainer.connectors.accelerator_connector._AcceleratorConnector.is_distributed"
    monkeypatch.setattr(connector, property(lambda self: True))
    kwargs = property(lambda self: {"num_replicas": 2, "rank": 0})
    monkeypatch.setattr(lightning.Trainer, "distributed_sampler_kwargs", kwargs)
    with pytest.raises(TypeError, match="use_distributed_sampler=False"):
        trainer(1, use_distributed_sampler=True).fit(Recorder(), datamodule=make())
