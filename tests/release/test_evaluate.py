"""`python evaluate.py`: every token of any text is scored once, with what a forward pass for each alone says."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.loss import IGNORED_TARGET
from thunderhead.core.model_spec import build_decoder
from thunderhead.corpus.sources import LocalText
from thunderhead.corpus.trained_tokenizers import ByteTokenizer
from thunderhead.release.evaluate import evaluate
from thunderhead.release.scoring import score, windows
from tiny import tiny

CONTEXT, EOS = 32, 256
TEXTS = ["def f(x):\n    return x\n" * 4, "", "é", "a" * 31, "b" * 32, "c" * 33]


@given(n=st.integers(0, 200), context_length=st.integers(1, 40), data=st.data())
def test_each_token_is_scored_once_after_as_many_as_promised(n: int, context_length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context_length))
    document, scored = list(range(n)), list[int]()
    for tokens, targets in windows(document, -1, context_length, stride):
        assert len(tokens) == len(targets) <= context_length
        for place, target in enumerate(targets):
            assert tokens[place] == (target - 1 if target != IGNORED_TARGET else tokens[place])
            if target != IGNORED_TARGET:
                scored.append(target)
                assert place >= min(target, context_length - stride)
    assert scored == document


def alone(decoder: Decoder, text: str, stride: int) -> float:
    """Of each token −log probability from a forward pass for it alone, with the tokens before it that count."""
    ids, total = [EOS, *text.encode()], 0.0
    for place in range(1, len(ids)):
        n_windows = max(0, math.ceil((place - CONTEXT) / stride))  # that begin before the one that scores it
        seen = torch.tensor([ids[n_windows * stride : place]])
        total -= float(decoder.logits(seen)[0, -1].log_softmax(-1)[ids[place]])
    return total


@pytest.mark.parametrize("stride", [1, 5, 16, 32])
@torch.inference_mode()
def test_scores_are_those_of_each_token_alone(stride: int) -> None:
    """In float64, so that only the sum's order differs."""
    decoder = build_decoder(config.plain(config.compose(tiny("x", "x"))), 257, EOS).double().eval()
    decoder.initialize(1)
    found = score(decoder, ByteTokenizer(), TEXTS, stride=stride, batch_size=3)
    expected = sum(alone(decoder, text, stride) for text in TEXTS)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (found.documents, found.bytes, found.tokens) == (len(TEXTS), n_bytes, n_bytes)
    assert found.nats == pytest.approx(expected, rel=1e-6)  # the loss itself is computed in float32
    told = found.to_dict()
    assert told["bits_per_byte"] == pytest.approx(told["loss"] / math.log(2))
    assert told["perplexity"] == pytest.approx(math.exp(expected / n_bytes))


def test_sources_of_a_run(run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("callbacks=default")
    (tmp_path / "a.txt").write_text("some text\n" * 20)
    asked = [f"run={folder}", "data=text", f"data.path={tmp_path / 'a.txt'}", "accelerator=cpu"]
    found = evaluate(config.compose(asked, "evaluate"))
    assert set(found) == {"text"}
    assert found["text"]["bytes"] == found["text"]["tokens"] == 200
    assert 5 < found["text"]["loss"] < 6  # two steps of training: about log 257
    two = "+data.sources.more={_target_: thunderhead.corpus.sources.LocalText, path: '${data.path}'}"
    capsys.readouterr()
    found = evaluate(config.compose([*asked, two, "json=true"], "evaluate"))
    assert json.loads(capsys.readouterr().out) == found
    assert found["all"]["nats"] == found["text"]["nats"] + found["more"]["nats"] == 2 * found["text"]["nats"]


def test_all_sources_elsewhere_are_reached_first(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of the hub are; what cannot be reached is refused by the sources' names, and nothing is read."""

    def unreachable(source: LocalText) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(LocalText, "connect", unreachable)
    monkeypatch.setattr(LocalText, "documents", None)
    readme = config.CONF_DIR.parent / "README.md"
    asked = [f"run={run('callbacks=default')}", "accelerator=cpu", "data=text", f"data.path={readme}"]
    asked.append("+data.sources.more={_target_: thunderhead.corpus.sources.LocalText, path: '${data.path}'}")
    with pytest.raises(ConfigError) as refused:
        evaluate(config.compose(asked, "evaluate"))
    assert [*refused.value.problems] == [(f"data.sources.{name}", "nobody there") for name in ("text", "more")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=text", "data.path=nowhere.txt"], r"data.sources.text: .*nowhere.txt does not exist"),
        (["data=induction"], "data: has no sources of text: choose data=text"),
        (["data=text", "data.path=README.md", "stride=33"], r"stride: is longer than .* 32 at most"),
        (["data=text", "data.path=README.md", "stride=0"], "stride"),
    ],
)
def test_what_cannot_be_scored_is_refused(overrides: list[str], message: str, run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(config.compose([f"run={run('callbacks=default')}", "accelerator=cpu", *overrides], "evaluate"))
