import multiprocessing
import shutil
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from object_store import SECRETS, Store
from thunderhead.core.data.manifest import Manifest, MissingFileError, ShardError
from thunderhead.corpus import object_storage as storage
from thunderhead.corpus.chunk_cache import ChunkCache
from thunderhead.corpus.object_storage import Remote, StorageError, fetch_record
from thunderhead.corpus.shard_files import verify_chunk

MakeShards = Callable[..., Manifest]


@pytest.fixture
def remote(store: Store, shards: Manifest) -> Remote:
    return Remote("s3://bucket/some/prefix", attempts=3, timeout=0.5)


@pytest.fixture
def cache(tmp_path: Path) -> ChunkCache:
    return ChunkCache(tmp_path / "cache", 10**9)


def chunks_of(remote: Remote, cache: ChunkCache, manifest: Manifest) -> Callable[[int], Path]:
    return partial(cache.get, remote, "text/train", manifest.splits["train"]["text"])


def content(manifest: Manifest, number: int) -> bytes:
    shard = manifest.splits["train"]["text"]
    return (manifest.shard_folder("train", "text") / shard.chunks[number].filename).read_bytes()


def key(manifest: Manifest, number: int) -> str:
    return f"some/prefix/text/train/{manifest.splits['train']['text'].chunks[number].filename}"


def test_objects_are_fetched_whole(remote: Remote, shards: Manifest, tmp_path: Path) -> None:
    fetch_record(remote, tmp_path)
    assert Manifest.load(tmp_path) == shards
    assert (tmp_path / "tokenizer.json").read_bytes() == (shards.folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("fault", ["503", "429", "stall", "trickle", "cut", "flip"])
def test_what_may_pass_is_tried_again(
    remote: Remote, cache: ChunkCache, shards: Manifest, store: Store, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.fault = lambda key, count: fault if count == 1 else None
    assert chunks_of(remote, cache, shards)(0).read_bytes() == content(shards, 0)
    assert store.requests[key(shards, 0)] == 2
    (logged,) = caplog.messages
    assert f"s3://bucket/{key(shards, 0)} " in logged
    assert "attempt 2 of 3" in logged


@pytest.mark.parametrize("fault", ["503", "stall", "trickle", "cut"])
def test_what_does_not_pass_is_an_error_that_names_the_object(
    remote: Remote, cache: ChunkCache, shards: Manifest, store: Store, fault: str, tmp_path: Path
) -> None:
    store.fault = lambda key, count: fault
    started = time.monotonic()
    with pytest.raises(StorageError, match=f"^s3://bucket/{key(shards, 0)} could not be read after 3 attempts: "):
        chunks_of(remote, cache, shards)(0)
    assert time.monotonic() - started < 10
    assert store.requests[key(shards, 0)] == 3
    assert not [file for file in (tmp_path / "cache").iterdir() if ".bin" in file.name]


@pytest.mark.parametrize(("fault", "error"), [("404", MissingFileError), ("403", StorageError)])
def test_what_cannot_pass_is_not_tried_again(
    remote: Remote, cache: ChunkCache, shards: Manifest, store: Store, fault: str, error: type[ShardError]
) -> None:
    store.fault = lambda key, count: fault
    with pytest.raises(error, match=f"^s3://bucket/{key(shards, 0)} ") as caught:
        chunks_of(remote, cache, shards)(0)
    assert store.requests[key(shards, 0)] == 1
    assert ("AWS_SECRET_ACCESS_KEY" in str(caught.value)) == (fault == "403")


def damage_remote(store: Store, manifest: Manifest, number: int, body: bytes) -> None:
    store.client().put_object(Bucket="bucket", Key=key(manifest, number), Body=body)


DAMAGE = {
    "holds other bytes than were written": lambda store, m: damage_remote(
        store, m, 0, bytes([content(m, 0)[0] ^ 1]) + content(m, 0)[1:]
    ),
    "holds what chunk-0-1.bin should hold": lambda store, m: damage_remote(store, m, 0, content(m, 1)),
    "bytes, .* were written": lambda store, m: damage_remote(store, m, 0, content(m, 0)[:-2]),
}


@pytest.mark.parametrize("error", DAMAGE)
def test_a_chunk_that_lies_there_damaged_is_refused(
    remote: Remote, cache: ChunkCache, shards: Manifest, store: Store, error: str, tmp_path: Path
) -> None:
    DAMAGE[error](store, shards)
    with pytest.raises(ShardError, match=rf"s3://bucket/{key(shards, 0)}.* {error}"):
        chunks_of(remote, cache, shards)(0)
    assert store.requests[key(shards, 0)] == 2  # it may have been damaged on the way
    assert not list((tmp_path / "cache").glob("*.bin*"))


def test_a_prefix_without_a_manifest_is_refused(store: Store, shards: Manifest, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"^s3://bucket/elsewhere/manifest\.json .* data\.path must be"):
        fetch_record(Remote("s3://bucket/elsewhere", attempts=3, timeout=0.5), tmp_path)


PAGE = b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"
RECORD = ["manifest.json", "tokenizer.json", "text/train/index.json", "text/val/index.json"]
WRONG = {
    "page": (PAGE, "is a web page, it begins with '<!DOCTYPE html>': data.path must be the address of the files"),
    "other": (b"[]", "is damaged|was changed|is not the tokenizer"),
    "nothing": (b"", "is damaged|was changed|is not the tokenizer"),
    "missing": (None, "is missing"),
}


SOON = {  # each wrong content in one place, in each file one; all beside all in the slow suite
    *(("s3://bucket", wrong, RECORD[0]) for wrong in WRONG),
    *(("s3://bucket", wrong, name) for wrong, name in zip(WRONG, RECORD, strict=True)),
    *(("http", wrong, RECORD[2]) for wrong in ("page", "missing")),
}
PLACED = [
    pytest.param(*case, marks=[] if case in SOON else pytest.mark.slow)
    for case in product(("s3://bucket", "http"), WRONG, RECORD)
]


@pytest.mark.parametrize(("place", "wrong", "name"), PLACED)
def test_what_lies_there_instead_of_a_file_is_told_by_its_url_and_not_kept(
    store: Store, shards: Manifest, tmp_path: Path, name: str, wrong: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.01)
    bucket = f"{store.endpoint}/bucket" if place == "http" else place
    remote, (body, message) = Remote(f"{bucket}/some/prefix", attempts=3, timeout=0.5), WRONG[wrong]
    key = f"some/prefix/{name}"
    if body is None:
        store.client().delete_object(Bucket="bucket", Key=key)
    else:
        store.client().put_object(Bucket="bucket", Key=key, Body=body, ACL="public-read")
    with pytest.raises(ShardError, match=message) as caught:
        fetch_record(remote, tmp_path / "got")
    assert str(caught.value).startswith(f"{bucket}/{key} ")
    assert str(tmp_path / "got") not in str(caught.value)
    assert not (tmp_path / "got" / name).exists()
    store.client().put_object(Bucket="bucket", Key=key, Body=(shards.folder / name).read_bytes(), ACL="public-read")
    assert fetch_record(remote, tmp_path / "got") == shards


def test_a_page_instead_of_a_chunk_is_told(
    remote: Remote, cache: ChunkCache, shards: Manifest, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.01)
    damage_remote(store, shards, 0, PAGE)
    with pytest.raises(ShardError, match=rf"^s3://bucket/{key(shards, 0)} is a web page"):
        chunks_of(remote, cache, shards)(0)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/shards", r"data\.path=ftp://host/shards is not supported: use s3://, gs://"),
        ("https://user:password@host/shards", "credentials come from the environment"),
        ("https://host/shards?X-Amz-Signature=1", "credentials come from the environment"),
        ("s3:///shards", "and a bucket or host"),
    ],
)
def test_urls_that_cannot_be_are_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Remote(url, attempts=1, timeout=1)
    assert "password@" not in str(caught.value)


def test_without_credentials_the_error_says_where_to_put_them(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"look at the credentials \(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"):
        fetch_record(Remote("s3://bucket/some/prefix", attempts=3, timeout=0.5), tmp_path)


def test_no_secret_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a/secret+key")
    said = storage._say(OSError("https://user:pw@host/x?Signature=abc and a/secret+key\n failed"))
    assert said == "https://…@host/x?… and … failed"


# --- other stores ----------------------------------------------------------------------------------------------------


def test_a_slow_server_is_waited_for(tmp_path: Path) -> None:
    blocks = iter([bytes(4000)] * 3 + [b""])

    def read1(_: int) -> bytes:
        time.sleep(0.15)
        return next(blocks)

    with open(tmp_path / "file", "wb") as file:
        storage._copy(read1, file, 0.1)  # 27 kB a second
    assert (tmp_path / "file").stat().st_size == 12_000


def test_a_web_server_will_do(store: Store, shards: Manifest, tmp_path: Path) -> None:
    remote = Remote(f"{store.endpoint}/bucket/some/prefix", attempts=2, timeout=0.5)
    store.fault = lambda key, count: "stall" if count == 1 else None
    fetch_record(remote, tmp_path)
    assert Manifest.load(tmp_path) == shards
    store.fault = lambda key, count: "trickle"
    with pytest.raises(StorageError, match=r"after 2 attempts: only \d+ bytes came in 0\.\d s$"):
        remote.fetch("text/train/index.json", tmp_path / "index.json")
    store.fault = lambda key, count: "cut"
    with pytest.raises(StorageError, match=r"index\.json could not be read after 2 attempts"):
        remote.fetch("text/train/index.json", tmp_path / "index.json")


def test_the_hub_is_asked_for_a_data_set(shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, filename: str, *, cache_dir: str, repo_type: str, revision: str | None) -> str:
        asked.append((repo_id, filename, repo_type, revision))
        return shutil.copy(shards.folder / Path(filename).relative_to("shards"), cache_dir)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    (tmp_path / "got").mkdir()
    fetch_record(Remote("hf://datasets/owner/name@v1/shards", attempts=1, timeout=1), tmp_path / "got")
    assert Manifest.load(tmp_path / "got") == shards
    assert asked[0] == ("owner/name", "shards/manifest.json", "dataset", "v1")
    assert {file.name for file in (tmp_path / "got").iterdir()} == {"manifest.json", "text", "tokenizer.json"}


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litdata.streaming.downloader._GOOGLE_STORAGE_AVAILABLE", False)
    with pytest.raises(StorageError, match=r"pip install 'google-cloud-storage>=\S+'"):
        fetch_record(Remote("gs://bucket/shards", attempts=3, timeout=1), tmp_path)


# --- the cache -------------------------------------------------------------------------------------------------------


def cached(folder: Path) -> set[str]:
    return {file.stem for file in folder.glob("*.bin")}


def test_the_cache_is_bounded_and_forgets_what_is_longest_unused(
    remote: Remote, shards: Manifest, store: Store, tmp_path: Path
) -> None:
    all_chunks = shards.splits["train"]["text"].chunks
    largest = max(chunk.bytes for chunk in all_chunks)
    cache = ChunkCache(tmp_path / "cache", 4 * largest)
    chunks = chunks_of(remote, cache, shards)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "notes.bin").write_bytes(bytes(10 * largest))  # not ours
    for number in (0, 1, 2, 3, 0, 4, 5):
        chunks(number)
        assert sum(file.stat().st_size for file in (tmp_path / "cache").glob("?" * 64 + ".bin")) <= 4 * largest
        time.sleep(0.01)  # times of files have a grain
    assert {all_chunks[number].sha256 for number in (0, 3, 4, 5)} == cached(tmp_path / "cache") - {"notes"}
    cache.keep("a test", [all_chunks[0].sha256, all_chunks[3].sha256])
    for number in (1, 2, 4, 5):
        chunks(number)
    assert {all_chunks[number].sha256 for number in (0, 3)} < cached(tmp_path / "cache")
    assert (tmp_path / "cache" / "notes.bin").exists()
    assert store.requests[key(shards, 0)] == 1


def test_a_damaged_chunk_of_the_cache_is_fetched_again(
    remote: Remote, cache: ChunkCache, shards: Manifest, store: Store, flip: Callable[[Path], None], tmp_path: Path
) -> None:
    file = chunks_of(remote, cache, shards)(0)
    flip(file)
    later = ChunkCache(tmp_path / "cache", 10**9)  # another process
    assert chunks_of(remote, later, shards)(0).read_bytes() == content(shards, 0)
    assert store.requests[key(shards, 0)] == 2


def test_what_a_killed_process_left_is_removed_when_room_is_needed(
    remote: Remote, shards: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{'0' * 64}.bin.part").write_bytes(bytes(1000))
    chunks_of(remote, ChunkCache(tmp_path / "cache", 10**9), shards)(0)
    assert list((tmp_path / "cache").glob("*.part"))
    chunks_of(remote, ChunkCache(tmp_path / "cache", 12_000), shards)(2)
    assert not list((tmp_path / "cache").glob("*.part"))


def get_all(remote: Remote, cache: ChunkCache, manifest: Manifest, start: float) -> None:
    chunks = chunks_of(remote, cache, manifest)
    time.sleep(max(0, start - time.time()))
    for number, chunk in enumerate(manifest.splits["train"]["text"].chunks):
        verify_chunk(chunks(number), manifest.splits["train"]["text"], chunk)


def test_processes_share_what_one_of_them_fetched(
    remote: Remote, cache: ChunkCache, shards: Manifest, store: Store
) -> None:
    context = multiprocessing.get_context("fork")
    remote.fetch("manifest.json", shards.folder / "again.json")  # a client of before the fork
    processes = [context.Process(target=get_all, args=(remote, cache, shards, time.time() + 0.5)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    count = len(shards.splits["train"]["text"].chunks)
    assert {name: n for name, n in store.requests.items() if name.endswith(".bin")} == {
        key(shards, number): 1 for number in range(count)
    }
