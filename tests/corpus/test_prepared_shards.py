import pickle
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from object_store import Store
from thunderhead.core.data.manifest import Manifest, ShardError
from thunderhead.corpus.object_storage import StorageError
from thunderhead.corpus.prepared_shards import PreparedShards
from thunderhead.corpus.sources import Share
from thunderhead.corpus.trained_tokenizers import BpeTokenizer, ByteTokenizer

T = 32
STEP = 8  # sequences
URL = "s3://bucket/some/prefix"
Make = Callable[..., PreparedShards]


@pytest.fixture
def new(tmp_path: Path) -> Make:
    """Build a data module over prepared shards."""

    def new(path: Path | str, **settings: object) -> PreparedShards:
        defaults = {
            "tokenizer": None,
            "filters": {},
            "context_length": T,
            "micro_batch_size": 2,
            "sequences_per_step": STEP,
            "seed": 5,
            "cache_dir": str(tmp_path / "cache"),
            "attempts": 2,
            "timeout": 0.5,
            "shuffle_window": 100,
        }
        return PreparedShards(path=str(path), **{**defaults, **settings})

    return new


@pytest.fixture
def make(new: Make) -> Make:
    """Build one whose shards are looked up and checked, with a stand-in for the trainer."""

    def make(path: Path | str, rank: int = 0, world_size: int = 1, **settings: object) -> PreparedShards:
        module = new(path, **settings)
        strategy = SimpleNamespace(
            root_device=torch.device("cpu"), distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size}
        )
        module.trainer = SimpleNamespace(global_step=0, max_steps=10**6, strategy=strategy)
        module.prepare_data()
        module.setup("fit")
        return module

    return make


def take(module: PreparedShards, count: int) -> Tensor:
    batches = iter(module.train_dataloader())
    return torch.stack([next(batches) for _ in range(count)])


def from_s3(shards: Manifest, store: Store, tmp_path: Path) -> str:
    return URL


def from_a_web_server(shards: Manifest, store: Store, tmp_path: Path) -> str:
    return f"{store.endpoint}/bucket/some/prefix"


def from_a_folder(shards: Manifest, store: Store, tmp_path: Path) -> str:
    shutil.move(shards.folder, tmp_path / "moved")
    return str(tmp_path / "moved")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("place", [from_s3, from_a_web_server, from_a_folder])
def test_tokens_are_the_same_wherever_they_lie(
    make: Make, shards: Manifest, store: Store, tmp_path: Path, place: Callable[..., str], num_workers: int
) -> None:
    here = make(shards.folder)
    expected, validation = take(here, 30), torch.cat(list(here.val_dataloader()[0]))
    there = make(place(shards, store, tmp_path), num_workers=num_workers)
    assert torch.equal(take(there, 30), expected)
    assert torch.equal(torch.cat(list(there.val_dataloader()[0])), validation)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_resume_in_the_middle_of_an_epoch_with_a_small_cache(
    make: Make, shards: Manifest, store: Store, num_workers: int
) -> None:
    expected = take(make(shards.folder, micro_batch_size=STEP, shuffle_window=50), 100)
    settings = {"shuffle_window": 50, "cache_bytes": 90_000, "num_workers": num_workers}
    assert sum(chunk.bytes for chunk in shards.splits["train"]["text"].chunks) > 90_000
    by_rank = []
    for rank in range(2):
        module = make(URL, rank, 2, micro_batch_size=4, **settings)
        module.load_state_dict({"samples": 37 * STEP, "order": {}})
        by_rank.append(take(module, 60))
    assert torch.equal(torch.cat(by_rank, dim=1), expected[37:97])


def test_the_chunks_of_the_next_window_are_there_before_they_are_read(
    make: Make, shards: Manifest, tmp_path: Path
) -> None:
    window = 60
    loader = make(URL, shuffle_window=window, micro_batch_size=1).train_dataloader()
    reader, place, batches = loader.dataset.readers["text"], loader.dataset.place, iter(loader)
    numbers = set()
    for n in range(3 * window):
        next(batches)
        number = reader.chunk_of(place(n + window - 1).block)
        file = tmp_path / "cache" / "chunks" / f"{shards.splits['train']['text'].chunks[number].sha256}.bin"
        deadline = time.monotonic() + 20
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        numbers.add(number)
    assert len(numbers) > 2


def test_a_start_fetches_no_chunks(make: Make, shards: Manifest, store: Store) -> None:
    module = make(URL)
    assert not [name for name in store.requests if name.endswith(".bin")]
    assert module.manifest == shards
    assert module.manifest.load_tokenizer().sha256 == shards.tokenizer.sha256


def test_verify_full_looks_at_every_chunk(make: Make, shards: Manifest, store: Store) -> None:
    make(URL, verify="full")
    count = sum(len(shard.chunks) for by_source in shards.splits.values() for shard in by_source.values())
    assert len([name for name in store.requests if name.endswith(".bin")]) == count
    body = bytearray((shards.folder / "text/val/chunk-0-1.bin").read_bytes())
    body[-1] ^= 1
    store.client().put_object(Bucket="bucket", Key="some/prefix/text/val/chunk-0-1.bin", Body=bytes(body))
    with pytest.raises(ShardError, match=f"{URL}/text/val/chunk-0-1.bin"):
        make(URL, verify="full", cache_dir=str(shards.folder / "another"))


def flip(folder: Path) -> None:
    for file in (folder / "text/train").glob("*.bin"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)


def rotate(folder: Path) -> None:
    files = sorted((folder / "text/train").glob("*.bin"))
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)


def truncate(folder: Path) -> None:
    for file in (folder / "text/train").glob("*.bin"):
        file.write_bytes(file.read_bytes()[:-2])


def change_dtype(folder: Path) -> None:
    file = folder / "text/train/index.json"
    file.write_text(file.read_text().replace("no_header_numpy:5", "no_header_numpy:3"))


def change_index(folder: Path) -> None:
    file = folder / "text/train/index.json"
    file.write_text(file.read_text().replace('"dim": ', '"dim": 1'))


def change_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(BpeTokenizer(vocab_size=260).train(["a"]).to_json())


DAMAGE = {
    flip: "holds other bytes",
    rotate: "holds what chunk",
    truncate: "bytes, .* were written",
    change_dtype: "was changed",
    change_index: "was changed",
    change_tokenizer: "is not the tokenizer",
}


@pytest.mark.parametrize(
    ("damage", "where", "num_workers"),
    [
        *((damage, where, 0) for damage in DAMAGE for where in ("local", "remote")),
        *((damage, "local", 1) for damage in (flip, rotate)),
        (flip, "remote", 1),
    ],
)
def test_each_kind_of_damage_is_found_before_a_token_is_used(
    make: Make,
    make_shards: Callable[..., Manifest],
    store: Store,
    damage: Callable[[Path], None],
    where: str,
    num_workers: int,
) -> None:
    shards = make_shards(chunk_bytes=30_000)
    damage(shards.folder)
    if where == "remote":
        store.upload(shards.folder, "damaged", "prefix")
    with pytest.raises(ShardError, match=DAMAGE[damage]):  # noqa: PT012  # at the start, or with the first batch
        module = make("s3://damaged/prefix" if where == "remote" else shards.folder, num_workers=num_workers)
        next(iter(module.train_dataloader()))


def test_storage_that_fails_later_is_an_error_that_names_the_object(make: Make, shards: Manifest, store: Store) -> None:
    module = make(URL, shuffle_window=20)
    store.fault = lambda key, count: "503" if key.endswith(".bin") and sum(store.requests.values()) > 6 else None
    with pytest.raises(StorageError, match=rf"^{URL}/text/train/chunk-0-\d+\.bin could not be read after 2 attempts"):
        take(module, 400)


def test_a_cache_that_cannot_hold_the_window_is_refused(make: Make, shards: Manifest) -> None:
    with pytest.raises(ValueError, match=r"data\.cache_bytes=30000 is too small .* use at least \d+") as caught:
        make(URL, cache_bytes=30_000)
    enough = int(str(caught.value).split("at least ")[1].split(",")[0])
    make(URL, cache_bytes=enough)
    with pytest.raises(ValueError, match=r"too small"):
        make(URL, cache_bytes=enough - 1)


def test_a_part_of_the_blocks_lies_in_all_chunks(make: Make, shards: Manifest) -> None:
    part = {"max_training_tokens": 100 * T, "shuffle_window": 50}
    here = take(make(shards.folder, **part), 30)
    assert torch.equal(take(make(URL, **part), 30), here)
    assert len({tuple(block.tolist()) for block in here.flatten(0, 1)}) == min(100, here.flatten(0, 1).shape[0])
    make(URL, shuffle_window=50, cache_bytes=90_000)
    with pytest.raises(ValueError, match=r"too small to shuffle data\.shuffle_window=50"):
        make(URL, cache_bytes=90_000, **part)


def test_the_tokenizer_is_that_of_the_shards(new: Make, shards: Manifest) -> None:
    for tokenizer in (None, ByteTokenizer()):
        module = new(shards.folder, tokenizer=tokenizer)
        assert (module.manifest, module.problems(None)) == (shards, [])
        assert module.tokenizer.sha256 == shards.tokenizer.sha256
    (problem,) = new(shards.folder, tokenizer=BpeTokenizer(vocab_size=300)).problems(None)
    assert "was made with byte {}, not with bpe " in problem.message
    assert problem.message.endswith("leave tokenizer= out, the shards bring theirs")


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("corpse", {}, r"corpse has no manifest\.json: did you mean .*/corpus\?"),
        ("file", {}, r"file has no manifest\.json: give the folder"),
        (URL, {"cache_dir": "file"}, r"data\.cache_dir=.*file cannot be written"),
        ("ftp://host/prefix", {}, r"data\.path=ftp://host/prefix is not supported"),
    ],
)
def test_a_place_without_shards_is_refused(
    new: Make, shards: Manifest, tmp_path: Path, path: str, settings: dict[str, str], message: str
) -> None:
    (tmp_path / "file").touch()
    settings = {name: str(tmp_path / value) for name, value in settings.items()}
    module = new(path if "://" in path else tmp_path / path, **settings)
    (problem,) = module.problems(None)
    assert re.search(message, problem.message)
    assert not module.is_prepared
    with pytest.raises(ValueError, match=message):
        module.setup("fit")


def test_blocks_can_be_sent_to_a_worker_that_is_not_forked(make: Make, shards: Manifest) -> None:
    module = make(URL)
    expected = take(module, 3)
    blocks = pickle.loads(pickle.dumps(module.train_dataloader().dataset))
    assert torch.equal(torch.stack([blocks.__getitems__([n, n + 1]) for n in (0, 2, 4)]), expected)


def test_a_run_fetches_nothing_that_it_does_not_need(make: Make, shards: Manifest, store: Store) -> None:
    module = make(URL, shuffle_window=10_000, micro_batch_size=1)
    module.trainer.max_steps = 1
    loader = module.train_dataloader()
    places = [loader.dataset.place(n) for n in range(STEP)]
    needed = {loader.dataset.readers["text"].chunk_of(block) for _, _, block in places}
    batches = iter(loader)
    for _ in range(STEP):
        next(batches)
    time.sleep(0.5)
    assert {name for name in store.requests if name.endswith(".bin")} == {
        f"some/prefix/text/train/{shards.splits['train']['text'].chunks[number].filename}" for number in needed
    }


def test_weights_are_for_the_sources_of_the_shards(make: Make, shards: Manifest) -> None:
    assert make(shards.folder, sources={"text": Share(weight=0.5)}).shares()["text"].weight == 0.5
    assert make(shards.folder).shares()["text"].weight == 1
    (problem,) = make(shards.folder, sources={"code": Share()}).problems(None)
    assert problem.message.startswith("data.sources has code, the shards have text")
