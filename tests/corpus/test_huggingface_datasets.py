"""The code that reads a dataset of the hub, on folders in the hub's format; nothing here needs the network."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thunderhead.core import config
from thunderhead.corpus.command import prepare_corpus
from thunderhead.corpus.huggingface_datasets import HuggingFaceDataset
from thunderhead.corpus.prepare import prepare
from thunderhead.corpus.shard_files import verify
from thunderhead.corpus.trained_tokenizers import ByteTokenizer

PRESETS = ["fineweb-edu", "c4", "tinystories", "wikitext"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # datasets' own


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two shards of a split in parquet, as most datasets of the hub have them."""
    folder = tmp_path / "dataset" / "data"
    folder.mkdir(parents=True)
    for i in range(2):
        rows = [f"story {i} {row} of clouds" if row != 3 else None for row in range(50)]
        pq.write_table(pa.table({"text": rows, "id": range(50)}), folder / f"train-0000{i}-of-00002.parquet")
    return folder.parent


def texts(source: HuggingFaceDataset) -> list[str]:
    return [document.text for document in source.documents()]


def test_a_parquet_folder_is_read_in_its_order(dataset: Path) -> None:
    source = HuggingFaceDataset(dataset=str(dataset))
    source.check()
    source.connect()
    expected = [f"story {i} {row} of clouds" for i in range(2) for row in range(50) if row != 3]
    assert texts(source) == texts(source) == expected
    assert next(source.documents()).id == "train:0#0"
    read: list[int] = []
    list(source.documents(read.append))
    assert sum(read) == sum(map(len, expected))


def test_a_dataset_s_own_split_is_held_out(dataset: Path, tmp_path: Path) -> None:
    rows = [f"held out {row}" for row in range(50)]
    pq.write_table(pa.table({"text": rows, "id": range(50)}), dataset / "data" / "test-00000-of-00001.parquet")
    source = HuggingFaceDataset(dataset=str(dataset), split="train+test")
    settings = {"shards_dir": tmp_path / "shards", "validation_fraction": 0.5, "validation": "test"}
    manifest = prepare({"dataset": source}, ByteTokenizer(), processes=1, **settings)
    found = {name: split["dataset"] for name, split in manifest.splits.items()}
    assert (found["train"].documents, found["val"].documents) == (98, 50)
    assert found["val"].bytes == sum(map(len, rows))


def test_a_jsonl_folder_is_read_and_cut_and_ended(tmp_path: Path) -> None:
    lines = ["line of text\n" * 20, "", "naïve 数", "last"]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"content": line}) for line in lines))
    source = HuggingFaceDataset(dataset=str(tmp_path), text_field="content", max_document_bytes=130)
    assert texts(source) == [lines[0][:130], lines[0][130:], "naïve 数", "last"]
    ended = HuggingFaceDataset(dataset=str(tmp_path), text_field="content", max_bytes=261)
    assert texts(ended) == [lines[0], "naïve 数"]
    assert ended.disk_bytes() == 261


def test_rows_that_are_lines_are_joined_to_documents(tmp_path: Path) -> None:
    articles = [" = One = \n\n text \n = = Part = = \n more \n", " = Two = \n\n text \n"]
    rows = ["before any title\n", *"".join(articles).splitlines(keepends=True)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "train.parquet")
    preset = config.plain(config.compose(["data=wikitext"]))["data"]["sources"]["wikitext"]
    source = HuggingFaceDataset(dataset=str(tmp_path), begins=preset["begins"])
    assert texts(source) == [rows[0], *articles]


def test_shards_from_a_dataset(dataset: Path, tmp_path: Path) -> None:
    source = HuggingFaceDataset(dataset=str(dataset))
    manifest = prepare({"a": source}, ByteTokenizer(), shards_dir=tmp_path / "shards", validation_fraction=0.2)
    verify(manifest)
    assert sum(split["a"].documents for split in manifest.splits.values()) == 98


def test_the_fingerprint_tells_what_is_read(dataset: Path) -> None:
    prints = [
        HuggingFaceDataset(dataset=str(dataset)).fingerprint(),
        HuggingFaceDataset(dataset=str(dataset), split="validation").fingerprint(),
        HuggingFaceDataset(dataset=str(dataset), max_bytes=10).fingerprint(),
        HuggingFaceDataset(dataset="owner/name").fingerprint(),
        HuggingFaceDataset(dataset="owner/name", revision="abc").fingerprint(),
    ]
    (dataset / "data" / "more.parquet").touch()
    prints.append(HuggingFaceDataset(dataset=str(dataset)).fingerprint())
    assert len({json.dumps(one) for one in prints}) == len(prints)


def test_what_is_wrong_is_named(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no field text_field=story; there are: text, id"):
        HuggingFaceDataset(dataset=str(dataset), text_field="story").connect()
    with pytest.raises(ValueError, match=r"id is int, not text"):
        texts(HuggingFaceDataset(dataset=str(dataset), text_field="id"))
    with pytest.raises(ValueError, match=r"\(test\) cannot be read: Bad split: test. Available splits: \['train'\]"):
        HuggingFaceDataset(dataset=str(dataset), split="test").connect()
    with pytest.raises(ValueError, match=r"'other' not found. Available"):
        HuggingFaceDataset(dataset=str(dataset), subset="other").connect()
    with pytest.raises(ValueError, match=r"is no folder, and no name of a dataset"):
        HuggingFaceDataset(dataset="./nowhere").check()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty .* cannot be read"):
        HuggingFaceDataset(dataset=str(tmp_path / "empty")).connect()
    with pytest.raises(ValueError, match=r"begins=\( is no regular expression"):
        HuggingFaceDataset(dataset="owner/name", begins="(")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"damaged .* cannot be read"):
        HuggingFaceDataset(dataset=str(tmp_path / "damaged")).connect()


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'datasets>=\S+' 'transformers>=\S+'"):
        HuggingFaceDataset(dataset="owner/name").check()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_that_it_needs_the_network(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    overrides = [f"data={preset}", "tokenizer=byte", f"data.shards_dir={tmp_path}"]
    message = (
        rf"^data\.sources\.{preset}\.dataset=\S+ is read from huggingface\.co, over the network, and HF_HUB_OFFLINE"
    )
    with pytest.raises(config.ConfigError, match=message):
        prepare_corpus(config.compose(overrides, "prepare"))
    assert not list(tmp_path.glob(".*.preparing"))


def test_a_hub_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens on the port of "discard"
    with pytest.raises(ValueError, match=r"over the network, which does not give it \(.*refused.*\): use data=text"):
        HuggingFaceDataset(dataset="owner/name", max_bytes=2_000_000_000).connect()
    assert "Reading owner/name (train) from huggingface.co: this downloads 2 GB of text" in caplog.text


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_reads_a_local_copy(preset: str, dataset: Path, tmp_path: Path) -> None:
    source = f"data.sources.{preset}"
    overrides = [
        f"data={preset}",
        f"{source}.dataset={dataset}",
        f"{source}.subset=null",
        f"{source}.begins=null",
        "tokenizer=byte",
        "data.validation_fraction=0.2",
        f"data.shards_dir={tmp_path / 'shards'}",
    ]
    manifest = prepare_corpus(config.compose(overrides, "prepare"))
    assert sum(split[preset].documents for split in manifest.splits.values()) == 98
