from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from oracles import naive_documents, options, randomize
from thunderhead.core.model.attention import GroupedQueryAttention
from thunderhead.core.model.block import Block, ResidualDropout
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.feedforward import GatedFeedForward
from thunderhead.core.model.loss import NextTokenLoss
from thunderhead.core.model.position import RotaryPosition
from thunderhead.options.activation_checkpointing import ActivationCheckpointing


def test_usable_from_a_notebook() -> None:
    decoder = Decoder(
        tokenizer_vocab_size=256,
        eos_id=None,
        attention=partial(GroupedQueryAttention, n_kv_heads=2),
        position=RotaryPosition,
        activation=partial(GatedFeedForward, gate="silu"),
        norm=nn.RMSNorm,
        dropout=ResidualDropout,
        block=Block,
        loss=NextTokenLoss,
        activation_checkpointing=ActivationCheckpointing,
        n_layers=2,
        d_model=32,
        n_heads=4,
        context_length=16,
    )
    decoder.initialize(seed=0)
    assert decoder.logits(torch.randint(256, (2, 16))).shape == (2, 16, 256)


@pytest.mark.parametrize("position", options("position"))
@pytest.mark.parametrize("attention", options("attention"))
def test_compiles_without_graph_breaks(build: Callable[..., Decoder], attention: str, position: str) -> None:
    torch._dynamo.reset()
    # Documents and QK-norm on: the parts with most going on. Plain configurations are subsets of their code paths.
    decoder = build(
        f"attention={attention}", f"position={position}", "attention.document_mask=true", "attention.qk_norm=true",
        "model.n_layers=1", "loss.z_loss=0.01",
    )  # fmt: skip
    tokens = torch.randint(61, (2, 17))
    expected = decoder(tokens[:, :-1], tokens[:, 1:])
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens[:, :-1], tokens[:, 1:]), expected)


@pytest.mark.parametrize(
    "overrides",
    [
        ["attention=gqa", "position=rope"],
        ["experiment=gpt2"],
        ["block=peri", "loss.chunk_size=8", "activation_checkpointing=block"],
        ["block=parallel", "attention=sliding_window"],
    ],
    ids=str,
)
def test_training_compiles_without_graph_breaks(build: Callable[..., Decoder], overrides: list[str]) -> None:
    torch._dynamo.reset()
    decoder = build(*overrides)
    tokens = torch.randint(61, (2, 17))
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    compiled(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    decoder.zero_grad()
    decoder(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own, tracing vmap
def test_flex_compiles_without_graph_breaks(build: Callable[..., Decoder]) -> None:
    torch._dynamo.reset()
    decoder = build("attention.document_mask=true", "attention.backend=flex", "position=alibi", "model.n_layers=1")
    tokens = torch.randint(61, (2, 16))
    with torch.no_grad():
        expected = decoder.logits(tokens)
        logits = torch.compile(decoder.logits, backend="eager", fullgraph=True)(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", options("block"))
@pytest.mark.parametrize("attention", options("attention"))
def test_autocast_stays_close_to_float32(build: Callable[..., Decoder], attention: str, block: str) -> None:
    decoder = build(f"attention={attention}", f"block={block}", "attention.qk_norm=true")
    tokens = torch.randint(61, (2, 17))
    expected = decoder(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        terms = decoder(tokens[:, :-1], tokens[:, 1:])
    terms.loss.backward()
    assert terms.loss.dtype == torch.float32
    torch.testing.assert_close(
        terms.loss, expected.loss, rtol=2e-3, atol=0
    )  # half a bfloat16 digit of a loss near ln 61
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in decoder.parameters())


@pytest.mark.parametrize("position", options("position"))
@pytest.mark.parametrize("attention", options("attention"))
def test_packed_documents_equal_documents_run_by_themselves(
    build: Callable[..., Decoder], attention: str, position: str
) -> None:
    decoder = build(f"attention={attention}", f"position={position}", "attention.document_mask=true")
    randomize(decoder, 0.2)
    tokens = torch.tensor([[7, 3, 0, 9, 8, 0, 0, 5, 4, 3, 2, 1, 6, 7, 8, 9]])
    packed = decoder.logits(tokens)[0]
    documents, _ = naive_documents(tokens, eos_id=0)
    for document in range(4):
        alone = decoder.logits(tokens[0][documents[0] == document][None])[0]
        torch.testing.assert_close(
            packed[documents[0] == document], alone, rtol=1e-4, atol=1e-4
        )  # other masks, other sums


@pytest.mark.parametrize("attention", options("attention"))
def test_no_token_sees_the_future(build: Callable[..., Decoder], attention: str) -> None:
    decoder = build(f"attention={attention}")
    randomize(decoder, 0.2)
    tokens = torch.randint(61, (1, 16))
    changed = tokens.clone()
    changed[0, 9:] = (tokens[0, 9:] + 1) % 61
    before, after = decoder.logits(tokens), decoder.logits(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9], after[:, 9])


def test_documents_are_not_masked_unless_asked_for(build: Callable[..., Decoder]) -> None:
    decoder = build(eos_id=None)
    context, _ = decoder.contexts(torch.zeros(2, 5, dtype=torch.int64))
    assert context.document_ids is None
    assert context.mask is None
    assert context.position_ids.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("position", options("position"))
def test_nothing_in_a_float64_decoder_is_below_float64(build: Callable[..., Decoder], position: str) -> None:
    decoder = build("attention=gqa", f"position={position}", "loss.z_loss=0.1").double()
    tokens = torch.randint(61, (2, 17))
    assert decoder(tokens[:, :-1], tokens[:, 1:]).loss.dtype == torch.float64
    context = decoder.contexts(tokens[:, :-1])[0]
    assert {t.dtype for t in (*(context.rotation or ()), context.slopes) if t is not None} <= {torch.float64}
    with sdpa_kernel(SDPBackend.MATH):
        expected = decoder.logits(tokens[:, :-1])
    torch.testing.assert_close(decoder.logits(tokens[:, :-1]), expected, rtol=1e-12, atol=1e-12)


def test_there_are_no_buffers(build: Callable[..., Decoder]) -> None:
    for position in options("position"):
        assert not list(build(f"position={position}", "attention=mla", device="meta").buffers())


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        (["model.vocab_size=60"], {}, "model.vocab_size=60 is smaller than the tokenizer's 61 tokens"),
        (["attention.document_mask=true"], {"eos_id": None}, "attention.document_mask=true needs an end-of-document"),
        (["attention=mla", "attention.qk_rope_head_dim=3"], {}, "3 rotary dimensions a head"),
    ],
)
def test_refused(build: Callable[..., Decoder], overrides: list[str], arguments: dict[str, None], message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        build(*overrides, **arguments)
    assert isinstance(error.value.__cause__ or error.value, ValueError)  # Hydra wraps what instantiate meets


def test_input_longer_than_the_context(build: Callable[..., Decoder]) -> None:
    with pytest.raises(ValueError, match=r"the input has 17 tokens a sequence, model.context_length=16"):
        build().logits(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize(("vocab_size", "multiple", "rows"), [("null", 128, 128), ("null", 1, 61), ("100", 64, 128)])
def test_vocabulary_and_its_padding(build: Callable[..., Decoder], vocab_size: str, multiple: int, rows: int) -> None:
    decoder = build(f"model.vocab_size={vocab_size}", f"model.vocab_multiple={multiple}")
    assert decoder.vocab_size == (61 if vocab_size == "null" else int(vocab_size))
    assert decoder.embedding.weight.shape[0] == rows
    assert decoder.logits(torch.randint(61, (1, 4))).shape[-1] == decoder.vocab_size


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_computed_equal_parameters_built(build: Callable[..., Decoder], tied: bool) -> None:
    decoder = build(
        "attention=gqa", "attention.n_kv_heads=2", "attention.qk_norm=true", "position=learned", "block=peri",
        "norm=layernorm", f"model.tie_embeddings={tied}", "model.bias=true", "model.d_ff=96", "model.vocab_multiple=64",
    )  # fmt: skip
    n_layers, d, d_ff, head_dim, norm = 2, 32, 96, 8, 2 * 32
    attention = (d * d + d) * 2 + (d * 16 + 16) * 2 + 2 * head_dim
    expected = {
        "embedding": 64 * d,
        "position": 16 * d,
        "attention": n_layers * attention,
        "feedforward": n_layers * ((d * d_ff + d_ff) * 2 + d_ff * d + d),
        "norm": n_layers * 4 * norm + 2 * norm,
        "head": 0 if tied else 64 * d,
    }
    assert decoder.parameter_counts() == {**expected, "total": sum(expected.values())}
    assert decoder.parameter_counts()["total"] == sum(p.numel() for p in decoder.parameters())


@pytest.mark.parametrize("attention", ["mha", "gqa", "mla"])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_flops_equal_those_counted(build: Callable[..., Decoder], attention: str, tied: str) -> None:
    decoder = build(f"attention={attention}", f"model.tie_embeddings={tied}", "model.vocab_multiple=64")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        decoder.logits(torch.randint(61, (3, 16)))
    # Both count matrix multiplications, and the whole T × T square of scores without a discount for causality. On the
    # CPU the counter knows SDPA's plain implementation only, and counts the fused ones as nothing.
    assert decoder.forward_flops_per_token() * 3 * 16 == counter.get_total_flops()


def test_flops_of_a_window_count_the_window_only(build: Callable[..., Decoder]) -> None:
    # 4 keys instead of 16 in each of 2 layers; a dense masked kernel computes all 16 and throws 12 away.
    window, plain = build("attention=sliding_window", "attention.window=4"), build()
    scores = 4 * 16 * 32 * 2
    assert plain.forward_flops_per_token() - window.forward_flops_per_token() == scores - scores // 4
