"""Tokenizers from files that are made here, in the formats of others."""

import base64
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext import openai_public
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from thunderhead.core.components import check
from thunderhead.core.tokenizer import EOS, Tokenizer, load_tokenizer
from thunderhead.corpus.prepare import prepare
from thunderhead.corpus.published_tokenizers import HuggingFaceTokenizer, TiktokenTokenizer
from thunderhead.corpus.shard_files import verify
from thunderhead.corpus.sources import LocalText
from thunderhead.corpus.trained_tokenizers import BpeTokenizer

TEXTS = [f"def cloud_{i}(x):\n    return x + {i}  # naïve 数据\n" for i in range(50)]
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))


def save(tokenizer: tokenizers.Tokenizer, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def byte_level(
    special: list[str], *, texts: list[str] = TEXTS, use_regex: bool = True, ignore_merges: bool = False
) -> tokenizers.Tokenizer:
    """Like GPT-2's and Llama 3's."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def word_pieces() -> tokenizers.Tokenizer:
    """Like BERT's, but that words are what lies between spaces, special tokens included."""
    pieces = ["[PAD]", "[UNK]", "[EOS]", "[MASK]", *"[]ab(", "##E", "##OS", "##]", "##a", "##b", "##)", "ab", "##ab"]
    model = models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(pieces[:4])
    return tokenizer


def words(eos: str = "</s>") -> tokenizers.Tokenizer:
    model = models.WordLevel({"a": 0, "<unk>": 1, "ab": 2, eos: 3, "<pad>": 4, ".": 5}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", eos, "<pad>"])
    return tokenizer


def unigram(special: list[str], **settings: bool) -> tokenizers.Tokenizer:
    """Like T5's and XLM-R's: special tokens are pieces of the model, and no piece scores higher."""
    alphabet = sorted({*"ab</s>unkpd ▁", *"".join(TEXTS).replace(" ", "▁")} - {"数"})
    scores = dict.fromkeys(special, 0.0) | dict.fromkeys(alphabet, -5.0) | {"ab": -6.0, "▁def": -6.5}
    tokenizer = tokenizers.Tokenizer(models.Unigram(list(scores.items()), unk_id=special.index("<unk>"), **settings))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", special.index("</s>"))]
    )
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    """Like Llama 2's: ▁ for a space, one before the first word, and bytes for what is in no token."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, "▁", "a", "b", "n", "▁a", "ab", "▁ab", "naï", "▁▁"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "▁")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def tiktoken_file(folder: Path, name: str = "r50k_base", n_merges: int = 20) -> Path:
    """Write all bytes and some pairs of them, in tiktoken's format."""
    pairs = [b"th", b"he", b" t", b"in", b"er", b"  ", b"re", b"an", b" a", b"on", b"\xc3\xaf", b"na", b"de", b"ef"]
    tokens = [bytes([i]) for i in range(256)] + pairs[:n_merges]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.tiktoken"
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return file


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte_level": HuggingFaceTokenizer(path=str(save(byte_level(["<|endoftext|>"]), folder / "byte_level"))),
        "sentencepiece": HuggingFaceTokenizer(path=str(save(sentencepiece(), folder / "sentencepiece"))),
        "tiktoken": TiktokenTokenizer(path=str(tiktoken_file(folder))),
    }


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "tiktoken"])
@given(text=st.lists(unicode_text | st.sampled_from([EOS, "</s>", "<s>", "<0x41>", "▁", " ", "\n", "ab"])).map("".join))
def test_round_trip_of_any_text_even_one_that_spells_eos(
    name: str, text: str, pretrained: dict[str, Tokenizer]
) -> None:
    tokenizer = pretrained[name]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.eos_id not in ids
    # SentencePiece's ▁ is a space, and it puts one before the first word.
    kept = text.replace("▁", " ") if name == "sentencepiece" else text
    assert tokenizer.decode(ids) == kept


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "tiktoken"])
@given(text=st.lists(unicode_text | st.sampled_from([EOS, "</s>", "<0x41>", "▁", "the 1,234's", "\n \t"])).map("".join))
def test_the_same_ids_by_the_librarys_own(name: str, text: str, fast: dict[str, Any], pretrained: Any) -> None:
    """As export.py hands it out."""
    ids = [int(token) for token in pretrained[name].encode(text)]
    assert fast[name].encode(text, add_special_tokens=False).ids == ids
    assert fast[name].decode(ids, skip_special_tokens=False) == pretrained[name].decode(ids)
    spelled = {"byte_level": EOS, "sentencepiece": "</s>", "tiktoken": EOS}[name]
    assert fast[name].token_to_id(spelled) == pretrained[name].eos_id


@pytest.fixture(scope="module")
def fast(pretrained: dict[str, Tokenizer]) -> dict[str, Any]:
    found = {name: tokenizer.as_fast() for name, tokenizer in pretrained.items()}
    for each in found.values():
        each.encode_special_tokens = True  # `split_special_tokens` of transformers
    return found


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "tiktoken"])
def test_reading_back_gives_the_same_tokenizer(name: str, pretrained: dict[str, Tokenizer]) -> None:
    tokenizer = pretrained[name]
    assert tokenizer.train(TEXTS) is tokenizer
    again = load_tokenizer(tokenizer.name, tokenizer.to_json())
    assert again.sha256 == tokenizer.sha256
    assert (again.vocab_size, again.eos_id, again.settings) == (
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.settings,
    )
    for one, many in zip([again.encode(text) for text in TEXTS], tokenizer.encode_batch(TEXTS), strict=True):
        assert np.array_equal(one, many)
    other = load_tokenizer("byte", '{"type": "byte"}')
    with pytest.raises(ValueError, match="not a "):
        type(tokenizer).from_json(other.to_json())


@pytest.mark.parametrize(("name", "eos"), [("byte_level", EOS), ("sentencepiece", "</s>"), ("tiktoken", EOS)])
def test_eos_and_ids_without_a_token_can_be_decoded(name: str, eos: str, pretrained: dict[str, Tokenizer]) -> None:
    tokenizer = pretrained[name]
    a, b = tokenizer.encode("a").tolist(), tokenizer.encode("b").tolist()
    assert tokenizer.decode([*a, tokenizer.eos_id, tokenizer.vocab_size + 5, *b]) == f"a{eos}b"


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_ids_are_those_of_the_library(name: str, pretrained: dict[str, Tokenizer]) -> None:
    oracle = byte_level([EOS]) if name == "byte_level" else sentencepiece()
    for text in (*TEXTS, "ab a  b", ""):
        assert pretrained[name].encode(text).tolist() == oracle.encode(text, add_special_tokens=False).ids


def test_ids_are_those_of_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # the oracle's reader keeps a copy otherwise
    tokenizer = TiktokenTokenizer(path=str(tiktoken_file(tmp_path)))
    ranks = load_tiktoken_bpe(str(tiktoken_file(tmp_path)))
    oracle = tiktoken.Encoding(
        "oracle",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={EOS: 50256},
    )
    for text in (*TEXTS, "the other's  in 123\n\n", ""):
        assert tokenizer.encode(text).tolist() == oracle.encode(text, disallowed_special=())
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (50256, 50257)


@pytest.mark.parametrize("name", ["r50k_base", "p50k_base", "cl100k_base", "o200k_base"])
def test_encodings_are_known_by_their_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiktoken_file(tmp_path, name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = load_tiktoken_bpe(str(file))
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: ranks)  # instead of a download
    published = getattr(openai_public, name)()
    tokenizer, oracle = TiktokenTokenizer(path=str(file)), tiktoken.Encoding(**published | {"explicit_n_vocab": None})
    assert tokenizer.eos_id == oracle.eot_token
    for text in (*TEXTS, "the OTHER'S  in 1234\n\n /// It'LL \r\n  x", ""):
        assert tokenizer.encode(text).tolist() == oracle.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_eos_is_found_or_named(tmp_path: Path) -> None:
    several = save(byte_level(["<s>", "</s>", "<|im_end|>"]), tmp_path / "several")
    assert HuggingFaceTokenizer(path=str(several)).eos_id == 1
    assert HuggingFaceTokenizer(path=str(several / "tokenizer.json"), eos="<|im_end|>").eos_id == 2
    for eos in ("<|im_end|>", {"content": "<|im_end|>", "special": True}):
        (several / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert HuggingFaceTokenizer(path=str(several)).eos_id == 2
    unknown = save(byte_level(["<begin>", "<end>"]), tmp_path / "unknown")
    with pytest.raises(ValueError, match=r"which token ends a document\? .* <begin>, <end>\): give"):
        HuggingFaceTokenizer(path=str(unknown))
    assert HuggingFaceTokenizer(path=str(unknown), eos="<end>").eos_id == 1
    with pytest.raises(
        ValueError, match=r"tokenizer\.eos=</s> is no token of .*; its special tokens are <begin>, <end>"
    ):
        HuggingFaceTokenizer(path=str(unknown), eos="</s>")
    with pytest.raises(ValueError, match=r"tokenizer\.eos=Ġ\? can be spelled|is no token"):
        HuggingFaceTokenizer(path=str(unknown), eos="Ġ?")


def test_the_settings_tell_tokenizers_apart_wherever_they_lie(tmp_path: Path) -> None:
    one = save(byte_level(["<s>", "</s>"]), tmp_path / "one")
    moved = save(byte_level(["<s>", "</s>"]), tmp_path / "moved")
    assert HuggingFaceTokenizer(path=str(one)).settings == HuggingFaceTokenizer(path=str(moved)).settings
    assert HuggingFaceTokenizer(path=str(one)).settings != HuggingFaceTokenizer(path=str(one), eos="<s>").settings


def test_words_without_spaces_between(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "un": 2, "##able": 3, "a": 4}))
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[SEP]", "[UNK]"])
    loaded = HuggingFaceTokenizer(path=str(save(tokenizer, tmp_path)), eos="[SEP]")
    assert loaded.decode(loaded.encode("a unable")) == "a unable"


def test_a_pattern_that_gives_up_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "!": 1, EOS: 2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    tokenizer.add_special_tokens([EOS])
    loaded = HuggingFaceTokenizer(path=str(save(tokenizer, tmp_path)))
    with pytest.raises(ValueError, match=r"^tokenizer\.path: this tokenizer gives up on a text: .*retry-limit"):
        loaded.encode_batch([40 * "a" + "!"])


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.path=.*nowhere cannot be read \(No such file"):
        HuggingFaceTokenizer(path=str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        HuggingFaceTokenizer(path=str(tmp_path))
    unmarked = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0)], unk_id=0))
    with pytest.raises(ValueError, match="which token ends a document"):
        HuggingFaceTokenizer(path=str(save(unmarked, tmp_path / "unigram")))
    with pytest.raises(ValueError, match=r"tokenizer\.eos=</s> can be spelled by text.* among its added_tokens$"):
        HuggingFaceTokenizer(path=str(tmp_path / "unigram"), eos="</s>")

    with pytest.raises(ValueError, match=r"tokenizer\.path=.*nowhere cannot be read"):
        TiktokenTokenizer(path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"is no file of tiktoken's"):
        TiktokenTokenizer(path=str(tmp_path / "tokenizer.json"))
    own = tiktoken_file(tmp_path, "own")
    with pytest.raises(ValueError, match=r"how own splits words is not known here .*tokenizer\.pattern="):
        TiktokenTokenizer(path=str(own))
    assert TiktokenTokenizer(path=str(own), pattern=r"\S+|\s+").eos_id == 256 + 14
    with pytest.raises(ValueError, match=r"tokenizer\.pattern=\( is no regular expression"):
        TiktokenTokenizer(path=str(own), pattern="(")
    with pytest.raises(ValueError, match=r"tokenizer\.eos_id=5 is the id of a token of text: 270 is free"):
        TiktokenTokenizer(path=str(own), pattern=r"\S+|\s+", eos_id=5)
    node = {"_target_": "thunderhead.corpus.published_tokenizers.TiktokenTokenizer", "path": "x", "eos_id": 2**24}
    assert [problem.path for problem in check({"tokenizer": node})] == ["tokenizer.eos_id"]
    own.write_text("".join(own.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match="1 of 256 bytes"):
        TiktokenTokenizer(path=str(own), pattern=r"\S+|\s+")


# --- no text becomes a special token ---------------------------------------------------------------------------------

UNIGRAM = {"t5": ["<pad>", "</s>", "<unk>"], "xlm_r": ["<s>", "<pad>", "</s>", "<unk>"]}
OPEN_TO_SPELLING: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "word_pieces": word_pieces,
    "words": words,
    **{name: partial(unigram, special) for name, special in UNIGRAM.items()},
    "unigram_of_bytes": partial(unigram, UNIGRAM["t5"], byte_fallback=True),
    "byte_level": partial(byte_level, [EOS, "<|pad|>"]),
    "byte_level_ignoring_merges": partial(byte_level, [EOS, "<|pad|>"], use_regex=False, ignore_merges=True),
    "byte_level_merging_to_eos": partial(byte_level, [EOS, "<|pad|>"], texts=[f"{EOS}<|pad|>"] * 9, use_regex=False),
    "sentencepiece": sentencepiece,
}
SPELLINGS = ["[EOS]", "[PAD]", "[MASK]", "</s>", "<s>", "<pad>", "<unk>", EOS, "<|pad|>"]
CONTEXTS = [
    *("{}", " {}", "{} ", " {} ", "a {} b", "a{}b", "a{} b"),
    *("{0}{0}", "{0} {0}", "({})", "\n{}\n", "数{}ï", "▁{}▁"),
]
some_text = st.lists(
    st.sampled_from(["a", "ab", "def", " ", "  ", "\n", "\t", ".", "(", ")", "<", "|>", "▁", "\0"]) | unicode_text
)


@pytest.fixture(scope="module")
def raws() -> dict[str, tokenizers.Tokenizer]:
    return {name: make() for name, make in OPEN_TO_SPELLING.items()}


@pytest.fixture(scope="module")
def loaded(
    raws: dict[str, tokenizers.Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, HuggingFaceTokenizer]:
    folder = tmp_path_factory.mktemp("spelled")
    eos = {"word_pieces": "[EOS]"}
    return {
        name: HuggingFaceTokenizer(path=str(save(raw, folder / name)), eos=eos.get(name)) for name, raw in raws.items()
    }


def special_ids(raw: tokenizers.Tokenizer) -> set[int]:
    """Those that no text may have; what is in no token becomes the unknown one."""
    return {i for i, token in raw.get_added_tokens_decoder().items() if token.content not in ("<unk>", "[UNK]")}


def spelled_raw(raw: tokenizers.Tokenizer, text: str) -> list[int]:
    raw.encode_special_tokens = True
    return raw.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", OPEN_TO_SPELLING)
def test_spellings_of_special_tokens_are_text_everywhere(
    name: str, raws: dict[str, Any], loaded: dict[str, HuggingFaceTokenizer]
) -> None:
    raw, tokenizer = raws[name], loaded[name]
    forbidden = special_ids(raw)
    assert tokenizer.eos_id in forbidden
    texts = [context.format(spelling) for context in CONTEXTS for spelling in SPELLINGS]
    found = tokenizer.encode_batch(texts)
    assert [text for text, ids in zip(texts, found, strict=True) if forbidden.intersection(ids.tolist())] == []
    by_library = [text for text in texts if forbidden.intersection(spelled_raw(raw, text))]
    assert bool(by_library) == (name not in ("byte_level", "sentencepiece"))  # or there was nothing to mend


@pytest.mark.parametrize("name", OPEN_TO_SPELLING)
@given(parts=some_text, spelled=st.lists(st.sampled_from(SPELLINGS), max_size=3), data=st.data())
def test_any_text_has_no_special_ids_and_else_those_of_the_library(
    name: str, parts: list[str], spelled: list[str], data: st.DataObject, raws: dict[str, Any], loaded: dict[str, Any]
) -> None:
    raw, tokenizer = raws[name], loaded[name]
    forbidden = special_ids(raw)
    text = "".join(data.draw(st.permutations(parts + spelled)))
    ids = tokenizer.encode(text).tolist()
    assert not forbidden.intersection(ids)
    if name.startswith("byte_level"):
        assert tokenizer.decode(ids) == text
    contents = [token.content for token in raw.get_added_tokens_decoder().values()]
    if not any(content in text for content in contents):
        assert ids == spelled_raw(raw, text)


@pytest.mark.parametrize("name", OPEN_TO_SPELLING)
def test_what_was_read_from_a_file_is_written_as_it_was(
    name: str, raws: dict[str, Any], loaded: dict[str, HuggingFaceTokenizer]
) -> None:
    raw, tokenizer = raws[name], loaded[name]
    again = HuggingFaceTokenizer.from_json(tokenizer.to_json())
    assert again.to_json() == tokenizer.to_json()
    assert json.loads(tokenizer.to_json())["tokenizer"] == json.loads(raw.to_str())
    assert again.as_fast().to_str() == tokenizer.as_fast().to_str()
    assert tokenizer.as_fast().get_vocab() == raw.get_vocab()
    texts = [context.format(spelling) for context in CONTEXTS for spelling in SPELLINGS]
    for one, other in zip(again.encode_batch(texts), tokenizer.encode_batch(texts), strict=True):
        assert np.array_equal(one, other)


def test_a_character_that_is_marked_as_special_is_text_but_no_end(tmp_path: Path) -> None:
    """As CLIP pads with "!": without it, its byte would have no token."""
    raw = byte_level([EOS])
    raw.add_special_tokens(["!"])
    folder = str(save(raw, tmp_path))
    tokenizer = HuggingFaceTokenizer(path=folder)
    assert tokenizer.decode(tokenizer.encode("a! b!")) == "a! b!"
    with pytest.raises(ValueError, match=r"tokenizer\.eos=! can be spelled by text"):
        HuggingFaceTokenizer(path=folder, eos="!")


def test_a_token_of_the_vocabulary_that_is_added_but_not_special_ends_documents(tmp_path: Path) -> None:
    raw = unigram(UNIGRAM["t5"])
    content = json.loads(raw.to_str())
    for token in content["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = HuggingFaceTokenizer(path=str(tmp_path), eos="</s>")
    assert 1 not in tokenizer.encode("a</s>b </s>")


def test_the_unknown_token_cannot_end_documents(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.eos=<unk> can be spelled by text"):
        HuggingFaceTokenizer(path=str(save(words(), tmp_path)), eos="<unk>")


def test_each_document_of_a_text_full_of_eos_ends_once(tmp_path: Path, chunk_tokens: Callable[..., Any]) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(60):
        (corpus / f"{i:02}.txt").write_text("ab [EOS] " * 21 + "a" * i)
    tokenizer = HuggingFaceTokenizer(path=str(save(word_pieces(), tmp_path / "tokenizer")), eos="[EOS]")
    settings = {"shards_dir": tmp_path / "shards", "validation_fraction": 0.2}
    manifest = prepare({"text": LocalText(path=str(corpus))}, tokenizer, **settings)
    documents = 0
    for split, source, shard in manifest.shards():
        tokens = chunk_tokens(manifest.shard_folder(split, source), *shard.chunks)
        assert np.count_nonzero(tokens == manifest.eos_id) == shard.documents
        documents += shard.documents
    assert documents == 60


def test_shards_are_made_with_them_and_remember_them(corpus: Path, tmp_path: Path) -> None:
    trained = tmp_path / "tokenizer.json"
    trained.write_text(BpeTokenizer(vocab_size=300).train(TEXTS).to_json())
    tokenizer = HuggingFaceTokenizer(path=str(trained))
    manifest = prepare(
        {"text": LocalText(path=str(corpus))}, tokenizer, shards_dir=tmp_path / "shards", validation_fraction=0.2
    )
    verify(manifest)
    trained.unlink()
    assert manifest.tokenizer.sha256 == tokenizer.sha256 == manifest.load_tokenizer().sha256
    assert manifest.eos_id == tokenizer.eos_id == 0


def big_word_level(folder: Path) -> Path:
    """70,000 words and EOS after them: ids up to 70,000."""
    words = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    return save(tokenizer, folder)


def big_tiktoken(folder: Path) -> Path:
    """All bytes, all pairs of bytes, and two words: ids above 65,535."""
    pairs = (bytes([first, second]) for first in range(256) for second in range(256))
    tokens = [bytes([i]) for i in range(256)] + list(pairs) + [b"abc", b"naive"]
    folder.mkdir(parents=True)
    file = folder / "cl100k_base.tiktoken"
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return file


@pytest.mark.parametrize("kind", ["huggingface", "tiktoken"])
def test_ids_above_65_535_are_written_and_read_exactly(kind: str, tmp_path: Path) -> None:
    if kind == "huggingface":
        tokenizer: Tokenizer = HuggingFaceTokenizer(path=str(big_word_level(tmp_path / "big")))
        texts = [" ".join(f"w{i}" for i in range(first, 70_000, 1000)) for first in range(40)]
    else:
        tokenizer = TiktokenTokenizer(path=str(big_tiktoken(tmp_path / "big")))
        texts = [f"abc {'xy' * i} naive abc 数据" for i in range(1, 41)]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i, text in enumerate(texts):
        (corpus / f"{i:02}.txt").write_text(text)
    manifest = prepare(
        {"text": LocalText(path=str(corpus))}, tokenizer, shards_dir=tmp_path / "shards", validation_fraction=0.2
    )
    assert manifest.dtype == "uint32"
    assert manifest.max_token_id == tokenizer.eos_id > 2**16
    verify(manifest)
    found = []
    for split, by_source in manifest.splits.items():
        for chunk in by_source["text"].chunks:
            file = manifest.shard_folder(split, "text") / chunk.filename
            content = np.fromfile(file, np.uint32, offset=4 * (chunk.documents + 2))
            found += np.split(content, np.flatnonzero(content == tokenizer.eos_id) + 1)[:-1]
    oracle = [[*tokenizer.encode(text).tolist(), tokenizer.eos_id] for text in texts]
    assert sorted(document.tolist() for document in found) == sorted(oracle)
    assert sum(i >= 2**16 for ids in oracle for i in ids) >= 80
    again = manifest.load_tokenizer()
    assert sorted(again.decode(document[:-1]) for document in found) == sorted(texts)


def test_an_absurd_id_is_refused_before_anything_of_its_size_is_made(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "</s>": 1, "b": 4_000_000_000}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(ValueError, match=r"tokenizer\.path: its ids go up to 4,000,000,000"):
        HuggingFaceTokenizer(path=str(file), eos="</s>")


def test_text_that_is_lost_is_told(
    tmp_path: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every other word of the text is in the vocabulary."""
    (tmp_path / "text.txt").write_text("w1 else " * 4000)
    tokenizer = big_word_level(tmp_path)
    lines = ("tokenizer=huggingface", f"tokenizer.path={tokenizer}", f"data.path={tmp_path / 'text.txt'}")
    plan = json.loads((run(*lines, "data.validation=tail") / "plan.json").read_text())
    (note,) = [note for note in plan["notes"] if "unknown to the tokenizer" in note]
    assert 0.49 < float(note.removeprefix("about ").partition("%")[0]) / 100 < 0.51
    assert note.partition(":")[0] in capsys.readouterr().out  # after the preparation, which comes after the plan
