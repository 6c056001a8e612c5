"""Runs on prepared shards, in a folder and in object storage: the same losses, and no secrets in their records."""

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import tokenizers
from omegaconf import OmegaConf
from tokenizers import models, pre_tokenizers

import programs
from object_store import SECRETS, Store
from thunderhead import command_line
from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.core.data.manifest import REMEDY
from thunderhead.corpus.command import prepare_corpus
from thunderhead.corpus.prepare import prepare
from thunderhead.corpus.sources import LocalText
from thunderhead.corpus.trained_tokenizers import ByteTokenizer
from thunderhead.release.command import generate_text
from thunderhead.training.record import read_rows
from tiny import prepared, tiny, train_here

URL = "s3://bucket/prefix"


@pytest.fixture
def bucket(store: Store, text_corpus: Path, shards_dir: Path) -> Path:
    """The folder of the shards that lie in the bucket, too."""
    folder = prepared(text_corpus, shards_dir, ["tokenizer=byte"])
    store.upload(folder, "bucket", "prefix")
    return folder


def losses(folder: Path) -> list[str]:
    return [row["train/loss"] for row in read_rows(folder / "metrics.csv")[1] if row["train/loss"]]


def test_a_run_reads_from_a_bucket_and_tells_no_secrets(
    bucket: Path,
    run: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    store: Store,
) -> None:
    caplog.set_level(logging.INFO)
    store.fault = lambda key, count: "503" if count == 1 else None  # so that something is logged
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    everything = ("logger=default", "callbacks=default", "callbacks.checkpoint.every_n_train_steps=1", "budget.steps=3")
    remote = run("data=shards", f"data.path={URL}", cache, *everything)
    assert "trying again" in caplog.text
    assert losses(remote) == losses(run("data=shards", *everything)) == losses(run("data=text", *everything))

    output = capfd.readouterr()
    assert f"data is fetched from {URL} into" in " ".join(output.out.split())
    said = [caplog.text.encode(), output.out.encode(), output.err.encode()]
    written = [
        Path(folder, name) for place in (remote, tmp_path) for folder, _, names in os.walk(place) for name in names
    ]
    names = {file.name for file in written}
    assert {"config.yaml", "environment.json", "data.json", "manifest.json", "last.ckpt"} <= names
    for content in said + [file.read_bytes() for file in written]:
        for secret in SECRETS.values():
            assert secret.encode() not in content

    # what was recorded is enough to go on from
    text = generate_text(config.compose([f"run={remote}", "generation.max_new_tokens=4"], "generate"))
    assert text.startswith(OmegaConf.load(remote / "config.yaml").generation.prompt)
    resumed = [*tiny(tmp_path, tmp_path, "data=shards", f"data.path={URL}"), f"resume={remote}"]
    with pytest.raises(ConfigError, match=r"has made all its 3 steps"):
        train_here(resumed, remote)


@pytest.mark.usefixtures("bucket")
def test_a_run_goes_on_from_a_bucket_as_if_nothing_had_happened(
    run: Callable[..., Path], text_corpus: Path, shards_dir: Path, tmp_path: Path
) -> None:
    settings = ("budget.steps=6", "callbacks=default", "callbacks.checkpoint.every_n_train_steps=2")
    remote = ("data=shards", f"data.path={URL}", f"data.cache_dir={tmp_path / 'cache'}", "data.shuffle_window=50")
    whole = run("data=text", "data.shuffle_window=50", *settings)
    run_dir = tmp_path / "crashed"
    run_dir.mkdir()
    lines = tiny(text_corpus, shards_dir, *remote, *settings)
    with pytest.raises(KeyError, match="pulled the plug"):
        train_here([*lines, "+callbacks.crash={_target_: crash.Crash, after: 3}"], run_dir)
    with patch.object(command_line, "invocation_overrides", lambda: ["callbacks.crash.after=1000"]):
        train_here([f"resume={run_dir}"], tmp_path / "unused")
    assert losses(run_dir) == losses(whole)


@pytest.mark.slow
def test_a_vocabulary_of_four_bytes_a_token_is_trained_on_and_resumed(
    run: Callable[..., Path], shards_dir: Path, tmp_path: Path
) -> None:
    words = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i}.txt").write_text(" ".join(f"w{69_999 - (i * 60 + j) * 29}" for j in range(60)))
    big = ("data=text", f"data.path={corpus}", "tokenizer=huggingface", f"tokenizer.path={tmp_path}")
    big = (*big, "data.validation_fraction=0.2", "data.max_validation_tokens=64", "generation.max_new_tokens=2")
    settings = ("budget.steps=4", "callbacks=default", "callbacks.checkpoint.every_n_train_steps=2")
    whole = run(*big, *settings)
    record = json.loads((whole / "data.json").read_text())
    assert (record["dtype"], record["vocab_size"], record["max_token_id"]) == ("uint32", 70_001, 70_000)

    crashed = tmp_path / "crashed"
    crashed.mkdir()
    lines = tiny(corpus, shards_dir, *big, *settings)
    with pytest.raises(KeyError, match="pulled the plug"):
        train_here([*lines, "+callbacks.crash={_target_: crash.Crash, after: 3}"], crashed)
    with patch.object(command_line, "invocation_overrides", lambda: ["callbacks.crash.after=1000"]):
        train_here([f"resume={crashed}"], tmp_path / "unused")
    assert losses(crashed) == losses(whole)

    shards = shards_dir / record["key"]
    assert losses(run("data=shards", f"data.path={shards}", *settings)) == losses(whole)


@pytest.fixture
def many_chunks(store: Store, text_corpus: Path, tmp_path: Path) -> None:
    """The corpus as bytes in chunks of 120 blocks, in the bucket."""
    manifest = prepare(
        {"text": LocalText(path=str(text_corpus))}, ByteTokenizer(),
        shards_dir=tmp_path / "many", validation_fraction=0.05, chunk_bytes=8_000,
    )  # fmt: skip
    store.upload(manifest.folder, "bucket", "prefix")


def train_chunks(store: Store) -> int:
    """How many chunks of the training split were asked for."""
    return sum("/train/chunk" in name for name in store.requests)


FAR = ("data=shards", f"data.path={URL}", "data.shuffle_window=20", "data.attempts=2", "data.timeout=1.0")


@pytest.mark.usefixtures("many_chunks")
@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_store_that_goes_away_ends_the_run_in_one_line(
    num_workers: int, run: Callable[..., Path], text_corpus: Path, shards_dir: Path, tmp_path: Path, store: Store,
    capfd: pytest.CaptureFixture[str], tell: Callable[..., None],
) -> None:  # fmt: skip
    far = (*FAR, f"data.num_workers={num_workers}", "validation.every=100", "trainer.log_every_n_steps=1")
    settings = (*far, "budget.steps=60", "callbacks=default", "callbacks.checkpoint.every_n_train_steps=10")
    run_dir = tmp_path / "cut off"
    run_dir.mkdir()
    store.fault = lambda key, count: "503" if "/train/chunk" in key and train_chunks(store) > 1 else None
    lines = tiny(text_corpus, shards_dir, *settings, f"data.cache_dir={tmp_path / 'cache'}")
    with pytest.raises(SystemExit) as ended:
        train_here(lines, run_dir)
    assert ended.value.code == 1
    output = capfd.readouterr()
    (said,) = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(
        r"error: s3://bucket/prefix/text/train/chunk-\S+ could not be read after 2 attempts: .*as asked;"
        rf" stopped at step \d+ of 60; go on with: python train\.py \"resume='{run_dir}'\"", said
    )  # fmt: skip
    assert "Traceback" not in output.out + output.err
    assert (run_dir / "checkpoints" / "last.ckpt").exists()
    assert not (run_dir / "summary.json").exists()
    tell(saw=said)

    store.fault = lambda key, count: None
    train_here([f"resume={run_dir}"], tmp_path / "unused")
    assert losses(run_dir) == losses(run(*settings, f"data.cache_dir={tmp_path / 'another'}"))


@pytest.mark.slow
@pytest.mark.usefixtures("many_chunks")
def test_a_store_that_goes_away_ends_all_ranks(text_corpus: Path, tmp_path: Path, store: Store) -> None:
    store.fault = lambda key, count: "503" if "/train/chunk" in key and train_chunks(store) > 1 else None
    settings = (*FAR, "budget.steps=60", "callbacks=default", "callbacks.checkpoint.every_n_train_steps=10")
    lines = tiny(text_corpus, tmp_path, *settings, "trainer.devices=2", "strategy=ddp", "batch.micro_size=1")
    lines += [f"data.cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'run'}"]
    done = programs.run("train.py", *lines)
    assert done.returncode == 1, done.stderr
    assert f"of 60; go on with: python train.py resume={tmp_path / 'run'}" in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_two_processes_share_the_cache(bucket: Path, run: Callable[..., Path], tmp_path: Path, store: Store) -> None:
    alone = run("data=shards", "budget.steps=4", "batch.micro_size=1")
    overrides = tiny(bucket, tmp_path, "data=shards", f"data.path={URL}", "trainer.devices=2", "strategy=ddp")
    overrides += ["budget.steps=4", f"data.cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'ddp'}"]
    done = programs.run("train.py", *overrides)
    assert done.returncode == 0, done.stderr
    found, expected = ([float(loss) for loss in losses(folder)] for folder in (tmp_path / "ddp", alone))
    assert found == pytest.approx(expected, rel=1e-5)  # gradients are summed in another order
    assert {count for name, count in store.requests.items() if name.endswith(".bin")} == {1}


def test_another_tokenizer_is_refused(run: Callable[..., Path], bucket: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer: .* was made with byte .* leave tokenizer= out"):
        run("data=shards", "tokenizer=bpe", f"data.path={bucket}")
    run("data=shards", "tokenizer=byte", f"data.path={bucket}")


def test_what_is_wrong_is_said_before_anything_starts(
    run: Callable[..., Path], tmp_path: Path, text_corpus: Path, bucket: Path, store: Store
) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    with pytest.raises(ConfigError, match=r"^s3://bucket/none/manifest.json is missing .* data\.path must be"):
        run("data=shards", "data.path=s3://bucket/none", cache)
    with pytest.raises(ConfigError, match=r"data\.path=nowhere has no manifest\.json"):
        run("data=shards", "data.path=nowhere")
    with pytest.raises(ConfigError, match=r"data\.cache_bytes=1000 is too small"):
        run("data=shards", f"data.path={URL}", cache, "data.cache_bytes=1000")
    assert not (tmp_path / "runs").exists()
    text = [line for line in tiny(text_corpus, tmp_path) if not line.startswith("tokenizer")]
    with pytest.raises(ConfigError, match=r"^tokenizer: needs an option: tokenizer=bpe$"):
        train_here([*text, "~tokenizer"], tmp_path / "run")
    store.fault = lambda key, count: "503" if key.endswith(".bin") else None
    with pytest.raises(ConfigError, match=r"^s3://bucket/prefix/.*chunk-0-0.bin could not be read after 2 attempts"):
        run("data=shards", f"data.path={URL}", cache, "data.attempts=2")
    assert not (tmp_path / "runs").exists()


def test_damage_met_by_a_worker_is_told_in_one_line(
    run: Callable[..., Path], text_corpus: Path, tmp_path: Path
) -> None:
    folder = prepared(text_corpus, tmp_path / "shards", ["tokenizer=byte"])
    file = folder / "text" / "train" / "chunk-0-0.bin"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        run("data=shards", f"data.path={folder}", "data.num_workers=1")
    assert str(caught.value) == f"{file} holds other bytes than were written (its hash differs): {REMEDY}"
    assert not (tmp_path / "runs").exists()  # refused: nothing is left of it


def test_prepared_shards_are_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data: there is nothing to prepare: give text"):
        prepare_corpus(config.compose(["data=shards", f"data.path={tmp_path}"], "prepare"))
