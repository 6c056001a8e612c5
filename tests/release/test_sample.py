"""Generation against argmax, softmax and the definitions of top-k and top-p, on a decoder that is a table of logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from thunderhead.core import config
from thunderhead.core.model_spec import build_decoder
from thunderhead.corpus.trained_tokenizers import ByteTokenizer
from thunderhead.release.sample import Outcome, generate, sample_text, sample_texts
from tiny import tiny

V, CONTEXT = 11, 32
CPU = torch.device("cpu")


class TableDecoder(nn.Module):
    """Next-token logits that depend on the last token alone; records the lengths it was asked for."""

    def __init__(self, table: torch.Tensor, context_length: int = 6):
        super().__init__()
        self.table = table
        self.context_length = context_length
        self.lengths: list[int] = []
        self.modes: list[bool] = []

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        self.lengths.append(tokens_BT.size(1))
        self.modes.append(self.training)
        return self.table[tokens_BT]


@pytest.fixture
def decoder() -> TableDecoder:
    return TableDecoder(torch.randn(V, V, generator=torch.Generator().manual_seed(7)))


def prompt(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_greedy_is_argmax_and_so_is_top_k_1(decoder):
    expected = [3]
    for _ in range(9):
        expected.append(int(decoder.table[expected[-1]].argmax()))
    assert generate(decoder, prompt([3]), 9, temperature=0.0).tolist() == [expected]
    assert generate(decoder, prompt([3]), 9, top_k=1, seed=5).tolist() == [expected]
    assert generate(decoder, prompt([3]), 9, top_p=1e-6, seed=5).tolist() == [expected]
    assert generate(decoder, prompt([3]), 9, temperature=1e-40, seed=5).tolist() == [expected]


def test_the_seed_decides(decoder):
    first, again, other = (generate(decoder, prompt([1, 2]), 40, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (1, 42)
    assert first[0, :2].tolist() == [1, 2]


def test_the_global_generator_is_left_alone(decoder):
    before = torch.get_rng_state()
    generate(decoder, prompt([1]), 5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_is_used_and_the_old_mode_restored(decoder, training):
    decoder.train(training)
    generate(decoder, prompt([1]), 3)
    assert decoder.modes == [False] * 3
    assert decoder.training is training


def test_the_mode_is_restored_after_an_error(decoder):
    decoder.train()
    with pytest.raises(IndexError):
        generate(decoder, prompt([V + 5]), 3)
    assert decoder.training


def test_the_context_is_cropped(decoder):
    generate(decoder, prompt([1, 2, 3, 4]), 5)
    assert decoder.lengths == [4, 5, 6, 6, 6]


def test_rows_stop_at_eos_and_are_filled_up():
    table = torch.full((V, V), -50.0)
    table[range(V), [min(i + 1, V - 1) for i in range(V)]] = 50.0  # always the next number
    text = generate(TableDecoder(table), prompt([1], [4]), 20, eos_id=6)
    assert text.tolist() == [[1, 2, 3, 4, 5, 6], [4, 5, 6, 6, 6, 6]]
    assert generate(TableDecoder(table), prompt([1]), 3, eos_id=6).tolist() == [[1, 2, 3, 4]]


def test_eos_in_the_prompt_does_not_stop(decoder):
    assert generate(decoder, prompt([6, 3]), 1, eos_id=6).shape == (1, 3)


def frequencies(decoder: TableDecoder, n: int = 40_000, **settings: object) -> torch.Tensor:
    rows = torch.full((n, 1), 2)
    return generate(decoder, rows, 1, seed=3, **settings)[:, 1].bincount(minlength=V) / n


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_are_the_softmax(decoder, temperature):
    # The standard deviation of a frequency is at most sqrt(1/4/n) = 0.0025; 0.0125 is five of them.
    expected = (decoder.table[2].double() / temperature).softmax(-1)
    torch.testing.assert_close(frequencies(decoder, temperature=temperature).double(), expected, atol=0.0125, rtol=0)


def test_top_k_keeps_the_k_most_probable(decoder):
    keep = decoder.table[2].topk(3).indices
    expected = torch.zeros(V).index_copy(0, keep, decoder.table[2][keep].softmax(-1))
    torch.testing.assert_close(frequencies(decoder, top_k=3), expected, atol=0.0125, rtol=0)
    assert torch.equal(frequencies(decoder, top_k=V + 100), frequencies(decoder))


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15] + [0.0] * (V - 5))
    decoder = TableDecoder(probabilities.log().clamp(min=-1e4).expand(V, V))
    for p, kept in [(0.3, [1]), (0.5, [1, 3]), (0.75, [1, 3, 4]), (0.9, [1, 2, 3, 4])]:
        expected = torch.zeros(V)
        expected[kept] = probabilities[kept] / probabilities[kept].sum()
        torch.testing.assert_close(frequencies(decoder, top_p=p), expected, atol=0.0125, rtol=0)


def test_ties_do_not_let_more_than_k_tokens_in():
    used = frequencies(TableDecoder(torch.zeros(V, V)), top_k=2)
    assert int((used > 0).sum()) == 2


def test_min_p_and_the_penalty_are_those_of_transformers(decoder):
    """Their processors on the same logits, by the frequencies that they give."""
    tokens = torch.tensor([[2, 5, 5, 2]])
    scores = RepetitionPenaltyLogitsProcessor(1.7)(tokens, decoder.table[2][None].clone())
    expected = MinPLogitsWarper(0.2)(tokens, scores / 0.8).softmax(-1)[0]
    rows = generate(decoder, tokens.expand(40_000, -1), 1, temperature=0.8, min_p=0.2, repetition_penalty=1.7, seed=3)
    found = rows[:, -1].bincount(minlength=V) / len(rows)
    torch.testing.assert_close(found, expected, atol=0.0125, rtol=0)
    assert ((found > 0) == (expected > 0)).all()


@pytest.mark.parametrize("with_cache", [True, False])
@pytest.mark.parametrize("attention", ["gqa", "sliding_window", "mla"])
def test_prompts_of_several_lengths_are_continued_as_each_alone(attention: str, with_cache: bool) -> None:
    """Greedily, also beyond the end of the context, where the window slides; rows end after as many new tokens."""
    resolved = config.plain(config.compose(tiny("x", "x", f"attention={attention}", "position=rope")))
    decoder = build_decoder(resolved, 257, 256)
    decoder.initialize(3)
    if not with_cache:
        decoder.new_cache = lambda *arguments: None
    rows = [[7], [5, 6, 200, 3, 9, 1], [9, 250, 4]]
    padded = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    for n_new in (9, CONTEXT + 4):
        together = generate(decoder, padded, n_new, lengths_B=torch.tensor([1, 6, 3]), temperature=0, eos_id=256)
        for row, found in zip(rows, together.tolist(), strict=True):
            alone = generate(decoder, torch.tensor([row]), n_new, temperature=0, eos_id=256)[0].tolist()
            if len(alone) + n_new <= CONTEXT:  # the window of the longest slides first
                assert found[: len(alone)] == alone
                assert set(found[len(row) + n_new :]) <= {256}


def test_a_text_that_ends_it() -> None:
    table = torch.full((257, 257), -50.0)
    table[range(256), [(i + 1) % 256 for i in range(256)]] = 50.0  # the alphabet
    decoder, tokenizer = TableDecoder(table, 64), ByteTokenizer()
    settings = {"max_new_tokens": 30, "temperature": 0.0}
    texts = sample_texts(decoder, tokenizer, CPU, ["a", "xyza", "m"], stop=["ef", "yy"], **settings)
    assert texts == ["abcd", "xyzabcd", "mnopqrstuvwxyz{|}~\x7f" + "\ufffd" * 12]
    assert sample_text(decoder, tokenizer, CPU, prompt="xyza", stop=["xy", "bc"], **settings) == "xyza"
    assert len(decoder.lengths) < 60


class ScriptDecoder(nn.Module):
    """Says one text, byte by byte, whatever it has read."""

    context_length = 1000

    def __init__(self, script: bytes, n_read: int):
        super().__init__()
        self.script, self.n_read = script, n_read

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        logits_BTV = torch.zeros(*tokens_BT.shape, 257)
        logits_BTV[:, -1, self.script[tokens_BT.shape[1] - self.n_read]] = 1.0
        return logits_BTV


def pieces_of(prompt: str, script: bytes, stop: list[str]) -> tuple[list[str], str]:
    pieces, decoder = list[str](), ScriptDecoder(script, len(prompt.encode()) or 1)
    settings = {"max_new_tokens": len(script), "temperature": 0.0, "stop": stop, "show": pieces.append}
    [text] = sample_texts(decoder, ByteTokenizer(), CPU, [prompt], **settings)
    return pieces, text


@settings(max_examples=300)
@given(
    prompt=st.text(alphabet="aé漢", max_size=4),
    script=st.binary(min_size=1, max_size=12) | st.text(alphabet="abcé漢", min_size=1, max_size=8).map(str.encode),
    stop=st.lists(st.text(alphabet="abcé", min_size=1, max_size=3), max_size=2),
)
def test_what_is_shown_is_the_text(prompt: str, script: bytes, stop: list[str]) -> None:
    """Piece by piece, and never anything that the text has not; the text is Python's own decoding, split at `stop`.

    At the one that is complete first: "b", where "a" and "baa" end "baa".
    """
    pieces, text = pieces_of(prompt, script, stop)
    said = (prompt.encode() + script).decode("utf-8", "replace")[len(prompt) :]
    read = next((said[:n] for n in range(len(said)) if any(end in said[:n] for end in stop)), said)
    assert text == prompt + min((read.split(end)[0] for end in stop), key=len, default=said)
    assert "".join(pieces) == text


def test_it_is_shown_at_once_but_for_what_may_still_change() -> None:
    assert pieces_of("né", "aé漢b".encode(), []) == (["né", "a", "é", "漢", "b"], "néaé漢b")
    assert pieces_of("n", b"abcabd!", ["abd", "xyz"]) == (["n", "abc"], "nabc")
    assert pieces_of("n", b"abcab", ["abd"]) == (["n", "abc", "ab"], "nabcab")
    assert pieces_of("ab", b"dab", ["abd"])[0] == ["ab", "d", "ab"]  # one that begins in the prompt is none
    assert pieces_of("", b"\xe6\xbc", []) == (["\ufffd"], "\ufffd")


@pytest.mark.parametrize("with_cache", [True, False])
@pytest.mark.parametrize("position", ["rope", "learned", "alibi", "none"])
def test_text_ends_with_the_context(position: str, with_cache: bool) -> None:
    """Where asked to; it is that of the window that slides up to there."""
    resolved = config.plain(config.compose(tiny("x", "x", f"position={position}")))
    decoder = build_decoder(resolved, 257, 256)
    decoder.initialize(3)
    if not with_cache:
        decoder.new_cache = lambda *arguments: None
    rows, lengths_B, outcome = prompt([5, 6, 7], [8, 0, 0]), torch.tensor([3, 1]), Outcome()
    asked = {"lengths_B": lengths_B, "temperature": 0.0, "outcome": outcome}
    slid = generate(decoder, rows, CONTEXT + 5, **asked)
    assert (slid.shape, outcome.rows_cut) == ((2, 3 + CONTEXT + 5), 0)
    assert torch.equal(generate(decoder, rows, CONTEXT + 5, beyond_context="stop", **asked), slid[:, :CONTEXT])
    assert outcome.rows_cut == 2
    for n_new, n_cut in ((CONTEXT - 2, 1), (CONTEXT - 3, 0)):  # the first row has one too many; both just fit
        outcome.rows_cut = 0
        found = generate(decoder, rows, n_new, beyond_context="stop", **asked)
        assert (found.shape[1], outcome.rows_cut) == (CONTEXT, n_cut)
    with pytest.raises(ValueError, match="a prompt of 32 tokens leaves no room in the context of 32"):
        generate(decoder, torch.ones(1, CONTEXT, dtype=torch.int64), 1, beyond_context="stop")


def test_an_end_of_its_own_is_not_the_contexts() -> None:
    table = torch.eye(V).roll(1, dims=1)  # the next number
    outcome = Outcome()
    found = generate(
        TableDecoder(table), prompt([1]), 20, temperature=0, eos_id=6, beyond_context="stop", outcome=outcome
    )
    assert found.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert outcome.rows_cut == 0


def test_what_it_took() -> None:
    """Of rows that end at EOS, what fills them up does not count."""
    table, outcome = torch.eye(V).roll(1, dims=1), Outcome()
    generate(TableDecoder(table), prompt([1, 1], [4, 4]), 20, temperature=0, eos_id=6, outcome=outcome)
    assert (outcome.prefill_tokens, outcome.decode_tokens) == (4, 4 + 1)  # after 2 and 5: 3, 4, 5, 6; 6
    assert outcome.prefill_seconds > 0 < outcome.decode_seconds
    assert outcome.cache_bytes_per_token is None
    outcome = Outcome(50, 0.5, 30, 2.0, 1536.0)
    assert str(outcome) == (
        "prefill 100 tokens/s (50 tokens), decode 15 tokens/s (30 tokens), cache 1,536 bytes a token"
    )
    assert str(Outcome(5, 0.5)).endswith("decode 0 tokens/s (0 tokens), no cache")
