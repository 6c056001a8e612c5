import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from thunderhead.core import trust
from thunderhead.core.components import check
from thunderhead.core.tokenizer import EOS, Tokenizer, load_tokenizer
from thunderhead.corpus.trained_tokenizers import BpeTokenizer, ByteTokenizer, sample

TEXTS = [f"def cloud_{i}(x):\n    return x + {i}  # naïve 数据\n" for i in range(50)]
BPE = BpeTokenizer(vocab_size=290).train(TEXTS)
TRAINED: dict[str, Tokenizer] = {"byte": ByteTokenizer().train(TEXTS), "bpe": BPE}

# Surrogates are halves of characters: no text holds them (sources replace them).
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
text_with_eos = st.lists(unicode_text | st.sampled_from([EOS, "<|", "|>", " ", "\n"])).map("".join)


@pytest.mark.parametrize("name", TRAINED)
@given(text=text_with_eos)
def test_round_trip_of_any_text_even_one_that_spells_eos(name: str, text: str) -> None:
    tokenizer = TRAINED[name]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", TRAINED)
def test_reading_back_gives_the_same_tokenizer(name: str) -> None:
    tokenizer = TRAINED[name]
    again = load_tokenizer(name, tokenizer.to_json())
    assert again.sha256 == tokenizer.sha256
    assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    text = f"def other(): {EOS}"
    assert np.array_equal(again.encode(text), tokenizer.encode(text))
    for one, many in zip([tokenizer.encode(text) for text in TEXTS], tokenizer.encode_batch(TEXTS), strict=True):
        assert np.array_equal(one, many)


@pytest.mark.parametrize("name", TRAINED)
def test_eos_and_ids_without_a_token_can_be_decoded(name: str) -> None:
    tokenizer = TRAINED[name]
    ids = [*tokenizer.encode("a").tolist(), tokenizer.eos_id, tokenizer.vocab_size + 5, *tokenizer.encode("b").tolist()]
    assert tokenizer.decode(ids) == f"a{EOS}b"


def test_every_byte_is_one_token_of_the_byte_tokenizer() -> None:
    assert ByteTokenizer().encode("aé").tolist() == list("aé".encode())
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"


def test_training_is_deterministic_and_leaves_the_original_alone() -> None:
    untrained = BpeTokenizer(vocab_size=290)
    assert untrained.train(iter(TEXTS)).sha256 == untrained.train(TEXTS).sha256 == BPE.sha256
    with pytest.raises(AttributeError):
        untrained.encode("x")


def test_bpe_equals_hugging_face_on_its_own_file() -> None:
    oracle = tokenizers.Tokenizer.from_str(BPE.to_json())
    text = "def cloud_7(x): return naïve"
    assert BPE.encode(text).tolist() == oracle.encode(text).ids
    assert oracle.encode(EOS).ids == [BPE.eos_id]  # which a text's own spelling must not become


def test_bpe_compresses_what_it_was_trained_on() -> None:
    assert BPE.vocab_size == 290
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 1.5


def test_a_tiny_corpus_gives_a_smaller_vocabulary() -> None:
    tokenizer = BpeTokenizer(vocab_size=8192).train(["abcabc"])
    assert 257 < tokenizer.vocab_size < 270
    assert tokenizer.settings["vocab_size"] == 8192
    assert tokenizer.decode(tokenizer.encode("zebra 数")) == "zebra 数"


def test_training_takes_a_sample_from_all_over_the_corpus() -> None:
    texts = [f"{i:04} text" for i in range(1000)]  # 9 bytes each
    taken = list(sample(texts, 900))
    assert len(taken) == 100
    assert taken == sorted(taken) == list(sample(iter(texts), 900))
    tenths = [sum(text.startswith(f"0{tenth}") for text in taken) for tenth in range(10)]
    assert min(tenths) >= 3  # of 10 expected: 3 standard deviations below are 1
    # A larger sample holds the smaller one, and one of the corpus' size is the corpus.
    assert set(taken) < set(sample(texts, 1800))
    assert list(sample(texts, 9000)) == list(sample(texts, 10**9)) == texts
    assert list(sample([], 10)) == []


@given(texts=st.lists(unicode_text), n_bytes=st.integers(1, 50))
def test_a_sample_is_no_larger_than_it_must_be(texts: list[str], n_bytes: int) -> None:
    taken = list(sample(texts, n_bytes))
    sizes = [len(text.encode()) for text in taken]
    assert sum(sizes) >= min(n_bytes, sum(len(text.encode()) for text in texts))
    assert not taken or sum(sizes) - max(sizes) < n_bytes
    rest = iter(texts)
    assert all(text in rest for text in taken)  # in their order


def test_bpe_trains_on_the_sample_only() -> None:
    texts = [f"{chr(0x4E00 + i)}{chr(0x4E00 + i)}" * 50 for i in range(100)]
    whole = BpeTokenizer(vocab_size=600).train(texts)
    part = BpeTokenizer(vocab_size=600, sample_bytes=1500).train(texts)
    assert part.sha256 == BpeTokenizer(vocab_size=600).train(sample(texts, 1500)).sha256 != whole.sha256


class Upper(ByteTokenizer):
    """One of somebody else's."""


def test_a_trusted_tokenizer_of_another_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Upper.name == f"{__name__}.Upper"
    monkeypatch.setattr(trust, "_trusted", set())
    with pytest.raises(ValueError, match=r"trust=\["):
        load_tokenizer(Upper.name, Upper().to_json())
    trust.trust(__name__)
    assert type(load_tokenizer(Upper.name, Upper().to_json())) is Upper
    for name in (f"{__name__}.load_tokenizer", f"{__name__}.Lower", "no.such.module"):
        with pytest.raises(ValueError, match="unknown kind"):
            load_tokenizer(name, Upper().to_json())


def test_vocabularies_that_cannot_be_are_refused() -> None:
    for size in (256, 65_537):
        node = {"_target_": "thunderhead.corpus.trained_tokenizers.BpeTokenizer", "vocab_size": size}
        (problem,) = check({"tokenizer": node})
        assert (problem.path, str(size) in problem.message) == ("tokenizer.vocab_size", True)
    with pytest.raises(ValueError, match="unknown kind"):
        load_tokenizer("morse", "{}")
    with pytest.raises(ValueError, match="not a byte tokenizer"):
        load_tokenizer("byte", "{}")
