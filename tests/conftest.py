import logging
import multiprocessing
import os

# Before numpy and torch are there, and for all programs that tests start: on busy cores, threads wait for each other a
# hundred times as long as they work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import requests
import torch
from hypothesis import settings
from moto.server import ThreadedMotoServer

import tiny as tiny_runs
from object_store import SECRETS, Store
from thunderhead.composing import groups_composed_once
from thunderhead.core import config
from thunderhead.corpus import object_storage as storage
from thunderhead.lab import execution, job_server
from thunderhead.lab.job_server import JobServer
from thunderhead.training import memory
from tiny import tiny, train_here

pytest_plugins = ("model_fixtures", "shard_fixtures", "browser")

settings.register_profile("busy", deadline=None)  # a machine that is busy fails no test
settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write tests/integration/golden_losses.json anew")


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(1)  # tiny models: threads cost more than they do, and pytest-xdist has the cores


@pytest.fixture(autouse=True, scope="session")
def _groups_composed_once() -> Iterator[None]:
    """Composing took most of the time of a tiny run."""
    with groups_composed_once():
        yield


@pytest.fixture(autouse=True, scope="session")
def _job_servers_started_once() -> Iterator[None]:
    """Sweeps in this process have one for each environment: what it imports takes longer than most of them."""
    servers: dict[str, JobServer] = {}

    def start(environment: Mapping[str, str], imports: Sequence[str] = job_server.IMPORTS) -> JobServer:
        known = {name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"}
        key = repr((sorted(known.items()), imports))
        if key not in servers or servers[key].has_ended():
            servers[key] = JobServer(known, imports)
        return servers[key]

    with patch.object(execution, "JobServer", start):
        yield


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """tell(seconds=…, saw=…, tokens_lost=…, tries=…): what benchmarks/chaos.py puts into its table of faults."""

    def record(**told: object) -> None:
        for name, value in told.items():
            record_property(name, value)

    return record


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what torch.compile traced before: Dynamo gives up on code that it saw in too many variants."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _no_process_group() -> Iterator[None]:
    """A run of one process with strategy=ddp or fsdp leaves its process group and ranks to those that follow."""
    with patch.dict(os.environ):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of about 200 KB of text: made-up prose, the same everywhere, in 300 files."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgk", k=draw.randint(1, 9))) for _ in range(500)]
    frequency = [1 / rank for rank in range(1, len(words) + 1)]  # Zipf
    for index in range(300):
        lines = [" ".join(draw.choices(words, frequency, k=10)).capitalize() + "." for _ in range(15)]
        (folder / f"{index:03}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def shards_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all tests of this session prepare shards, each corpus and tokenizer once."""
    return tmp_path_factory.mktemp("shards")


@pytest.fixture
def run(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """run("attention=gqa", …) trains two tiny steps in this process and returns the run's folder."""
    count = iter(range(100))

    def train(*overrides: str) -> Path:
        run_dir = tmp_path / "runs" / str(next(count))
        run_dir.mkdir(parents=True)
        train_here(tiny(text_corpus, shards_dir, *overrides), run_dir)
        return run_dir

    return train


@pytest.fixture
def memory_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process plan their memory; others are spared it."""
    monkeypatch.setattr(tiny_runs, "estimate", memory.estimate)


@pytest.fixture(scope="session")
def exported(text_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that export.py makes of a tiny run, in the run's folder; not to be changed."""
    from thunderhead.release.export import export  # transformers takes seconds

    run_dir = tmp_path_factory.mktemp("exported")
    settings = ("callbacks=default", "tokenizer=bpe", "tokenizer.vocab_size=300", "logger=csv")
    train_here(tiny(text_corpus, run_dir / "shards", *settings), run_dir)
    return export(config.compose([f"run={run_dir}"], "export"))


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """An S3-compatible server on loopback, for the whole session."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty object store that the environment names, with credentials; pauses before retries are short."""
    store = Store(moto_server)
    for name, value in {**SECRETS, "AWS_ENDPOINT_URL": store.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.01)
    storage.client.cache_clear()  # clients of another test's store
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)  # Python 3.14's would have the environment of its first use
    yield store
    multiprocessing.set_start_method(method, force=True)
    store.close()
    requests.post(f"{moto_server}/moto-api/reset", timeout=10)
