import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from thunderhead.core.data.manifest import REMEDY, Chunk, Manifest, ShardError
from thunderhead.core.tokenizer import Tokens
from thunderhead.corpus.shard_files import verify
from thunderhead.corpus.trained_tokenizers import BpeTokenizer

MakeShards = Callable[..., Manifest]
ChunkTokens = Callable[[Path, Chunk], Tokens]


def edit(file: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)


def flip(file: Path) -> None:
    def change(content: bytearray) -> None:
        content[len(content) // 2] ^= 1

    edit(file, change)


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def edit_json(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def damage_dtype(index: dict) -> None:
    index["config"]["data_format"] = ["no_header_numpy:3"]


DAMAGE = {
    "flipped byte": (lambda folder: flip(folder / "text/train/chunk-0-1.bin"), "holds other bytes than were written"),
    "flipped byte in validation": (
        lambda folder: flip(folder / "text/val/chunk-0-0.bin"),
        "holds other bytes than were written",
    ),
    "swapped chunks": (
        lambda folder: swap(folder / "text/train/chunk-0-0.bin", folder / "text/train/chunk-0-1.bin"),
        "holds what chunk-0-1.bin should hold",
    ),
    "truncated": (
        lambda folder: edit(folder / "text/train/chunk-0-0.bin", lambda content: content.__delitem__(slice(-2, None))),
        "bytes, .* were written",
    ),
    "missing chunk": (
        lambda folder: (folder / "text/train/chunk-0-0.bin").unlink(),
        "is missing, the shards are incomplete",
    ),
    "wrong dtype in the index": (
        lambda folder: edit_json(folder / "text/train/index.json", damage_dtype),
        "was changed",
    ),
    "changed index": (
        lambda folder: edit_json(folder / "text/train/index.json", lambda index: index["chunks"].pop()),
        "index.json was changed",
    ),
    "index no JSON": (
        lambda folder: (folder / "text/train/index.json").write_text("{"),
        "index.json was changed",
    ),
    "missing index": (
        lambda folder: (folder / "text/train/index.json").unlink(),
        "index.json is missing",
    ),
    "changed list of documents": (
        lambda folder: flip(folder / "text/val/documents.npy"),
        "documents.npy was changed",
    ),
    "missing list of documents": (
        lambda folder: (folder / "text/val/documents.npy").unlink(),
        "documents.npy is missing",
    ),
    "manifest without the list of documents": (
        lambda folder: edit_json(
            folder / "manifest.json", lambda m: m["splits"]["val"]["text"].pop("documents_sha256")
        ),
        "manifest.json (is damaged|has format 99|contradicts itself)",
    ),
    "foreign tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text(BpeTokenizer(vocab_size=260).train(["a"]).to_json()),
        "tokenizer.json is (missing|not the tokenizer that made these shards)",
    ),
    "missing tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "tokenizer.json is (missing|not the tokenizer that made these shards)",
    ),
    "missing manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    "manifest no JSON": (
        lambda folder: (folder / "manifest.json").write_text("{"),
        "manifest.json (is damaged|has format 99|contradicts itself)",
    ),
    "a page in the manifest's place": (
        lambda folder: (folder / "manifest.json").write_text("<!DOCTYPE html>"),
        r"manifest.json is damaged \(it begins with '<!DOCTYPE html>', not with '{'\)",
    ),
    "manifest of a depth that no reader takes": (
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
        "manifest.json (is damaged|has format 99|contradicts itself)",
    ),
    "manifest without a field": (
        lambda folder: edit_json(folder / "manifest.json", lambda manifest: manifest.pop("eos_id")),
        "manifest.json (is damaged|has format 99|contradicts itself)",
    ),
    "manifest of another format": (
        lambda folder: edit_json(folder / "manifest.json", lambda manifest: manifest.update(format=99)),
        "manifest.json (is damaged|has format 99|contradicts itself)",
    ),
    "manifest that does not add up": (
        lambda folder: edit_json(folder / "manifest.json", lambda m: m["splits"]["train"]["text"].update(tokens=1)),
        "manifest.json (is damaged|has format 99|contradicts itself)",
    ),
    "manifest with ids beyond the vocabulary": (
        lambda folder: edit_json(folder / "manifest.json", lambda manifest: manifest.update(vocab_size=100)),
        "manifest.json (is damaged|has format 99|contradicts itself)",
    ),
    "unknown dtype in the manifest": (
        lambda folder: edit_json(folder / "manifest.json", lambda manifest: manifest.update(dtype="int32")),
        "says dtype",
    ),
    "dtype too wide for the vocabulary": (
        lambda folder: edit_json(folder / "manifest.json", lambda manifest: manifest.update(dtype="uint32")),
        "says dtype",
    ),
    "dtype too narrow for the vocabulary": (
        lambda folder: edit_json(folder / "manifest.json", lambda manifest: manifest.update(vocab_size=70_000)),
        "says dtype",
    ),
    "dtype of a larger vocabulary": (
        lambda folder: edit_json(folder / "manifest.json", lambda m: m.update(vocab_size=70_000, dtype="uint32")),
        "manifest.json (is damaged|has format 99|contradicts itself)",
    ),
    "vocabulary that no dtype holds": (
        lambda folder: edit_json(folder / "manifest.json", lambda m: m.update(vocab_size=2**33, dtype="uint32")),
        "manifest.json (is damaged|has format 99|contradicts itself)",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_each_kind_of_damage_has_its_error(make_shards: MakeShards, case: str) -> None:
    damage, error = DAMAGE[case]
    folder = make_shards().folder
    verify(Manifest.load(folder))
    damage(folder)
    with pytest.raises(ShardError) as caught:
        verify(Manifest.load(folder))
    assert re.search(error, str(caught.value))
    assert isinstance(caught.value, ValueError)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(f": {'prepare anew' if 'another format' in case else REMEDY}")  # what to do next


def test_sizes_find_what_is_missing_but_not_flipped_bytes(make_shards: MakeShards) -> None:
    manifest = make_shards()
    flip(manifest.folder / "text/train/chunk-0-0.bin")
    verify(manifest, "sizes")
    edit(manifest.folder / "text/train/chunk-0-0.bin", lambda content: content.pop())
    with pytest.raises(ShardError, match=r"bytes, \d+ were written"):
        verify(manifest, "sizes")


def test_a_manifest_is_read_back_as_it_was_written(make_shards: MakeShards) -> None:
    manifest = make_shards()
    assert Manifest.load(manifest.folder) == manifest
    assert json.loads((manifest.folder / "manifest.json").read_text()).keys() == {
        field.name for field in dataclasses.fields(Manifest)
    } - {"folder"}
    assert manifest.load_tokenizer().sha256 == manifest.tokenizer.sha256


def test_the_manifest_describes_the_tokens(make_shards: MakeShards, chunk_tokens: ChunkTokens) -> None:
    manifest = make_shards()
    for split in ("train", "val"):
        shard = manifest.splits[split]["text"]
        tokens = np.concatenate([chunk_tokens(manifest.shard_folder(split, "text"), chunk) for chunk in shard.chunks])
        assert len(shard.chunks) > 1
        assert len(tokens) == shard.tokens == shard.bytes + shard.documents  # bytes, and an EOS per document
        assert (tokens == manifest.eos_id).sum() == shard.documents
        assert tokens.max() == shard.max_token_id
        share = np.bincount(tokens)[np.unique(tokens)] / len(tokens)
        assert shard.unigram_entropy == pytest.approx(-(share * np.log(share)).sum())
    assert manifest.max_token_id == manifest.eos_id == 256


def test_shards_can_be_moved(make_shards: MakeShards, tmp_path: Path) -> None:
    manifest = make_shards()
    shutil.move(manifest.folder, tmp_path / "elsewhere")
    verify(Manifest.load(tmp_path / "elsewhere"))
