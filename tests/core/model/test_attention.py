from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import naive_attention, naive_rotate, randomize
from thunderhead.core.model import kernels
from thunderhead.core.model.attention import (
    Attention,
    GroupedQueryAttention,
)
from thunderhead.core.model.context import SequenceContext, document_layout
from thunderhead.core.model.position import RotaryPosition
from thunderhead.options.latent_attention import MultiHeadLatentAttention
from thunderhead.options.positions import AlibiPosition

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
D_MODEL, N_HEADS, T = 24, 4, 9
TOKENS = torch.tensor([[5, 0, 3, 4, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 0, 2, 1]])  # 0 ends a document
# eager flex_attention materialises all scores, which is fine for a test
UNCOMPILED_FLEX = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
VARIANTS: dict[str, Callable[..., Attention]] = {
    "mha": GroupedQueryAttention,
    "mqa": partial(GroupedQueryAttention, n_kv_heads=1),
    "gqa": partial(GroupedQueryAttention, n_kv_heads=0.5),
    "wide_heads": partial(GroupedQueryAttention, n_kv_heads=2, head_dim=10),
    "qk_norm": partial(GroupedQueryAttention, n_kv_heads=2, qk_norm=True),
    "sliding_window": partial(GroupedQueryAttention, window=3, n_kv_heads=2),
    "mla": MultiHeadLatentAttention,
    "mla_full": partial(
        MultiHeadLatentAttention, q_lora_rank=7, kv_lora_rank=5, qk_rope_head_dim=4, v_head_dim=5, qk_norm=True
    ),
}


def build(variant: Callable[..., Attention], bias: bool = True, **settings: Any) -> Attention:
    layer = variant(d_model=D_MODEL, n_heads=N_HEADS, context_length=T, bias=bias, **settings).eval()
    randomize(layer)
    return layer


def context_of(layer: Attention, positions: str = "rope", dtype: torch.dtype = torch.float32) -> SequenceContext:
    document_ids, position_ids = None, torch.arange(T)[None]
    if layer.document_mask:
        document_ids, position_ids = document_layout(TOKENS, eos_id=0)
    slopes = AlibiPosition(N_HEADS).slopes(CPU, dtype) if positions == "alibi" else None
    rotation = RotaryPosition(layer.rotary_dim).rotation(position_ids, dtype) if positions == "rope" else None
    context = SequenceContext(position_ids, document_ids, rotation, slopes)
    return context._replace(**layer.masks(context))


def rms(x: Tensor, norm: nn.Module) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight if isinstance(norm, nn.RMSNorm) else x


def reference(layer: Attention, x: Tensor, context: SequenceContext) -> Tensor:
    """The layer's output from its weights, in float64: heads cut out by slicing, scores query by query."""
    layer = layer.double()
    x = x.double()
    positions = context.position_ids.expand(len(x), -1)
    frequencies = 10000 ** -(torch.arange(0, layer.rotary_dim, 2).double() / layer.rotary_dim)

    def turned(heads: Tensor) -> Tensor:
        return heads if context.rotation is None else naive_rotate(heads, positions, frequencies)

    def heads_of(y: Tensor, size: int) -> Tensor:
        return torch.stack(y.split(size, dim=-1), dim=1)

    if isinstance(layer, MultiHeadLatentAttention):
        nope, rope, rank = layer.nope_dim, layer.rotary_dim, layer.kv_lora_rank
        queries = heads_of(layer.q_proj(rms(layer.q_down_proj(x), layer.q_latent_norm)), nope + rope)
        down = layer.kv_down_proj(x)
        up = heads_of(layer.kv_proj(rms(down[..., :rank], layer.kv_latent_norm)), nope + layer.v_head_dim)
        shared = torch.stack([down[..., rank:]] * N_HEADS, dim=1)  # one rotary key for all heads
        q = rms(queries, layer.q_norm)
        k = rms(torch.cat((up[..., :nope], shared), dim=-1), layer.k_norm)
        q, k = (torch.cat((heads[..., :nope], turned(heads[..., nope:])), dim=-1) for heads in (q, k))
        v = up[..., nope:]
    else:
        assert isinstance(layer, GroupedQueryAttention)
        q = turned(rms(heads_of(layer.q_proj(x), layer.head_dim), layer.q_norm))
        k = turned(rms(heads_of(layer.k_proj(x), layer.head_dim), layer.k_norm))
        v = heads_of(layer.v_proj(x), layer.head_dim)
    y = naive_attention(
        q,
        k,
        v,
        window=layer.window,
        documents=context.document_ids,
        slopes=context.slopes,
        softcap=layer.logit_softcap,
    )
    output: Tensor = layer.out_proj(torch.cat(tuple(y.unbind(1)), dim=-1))
    return output


@pytest.mark.parametrize("positions", ["rope", "alibi", "none"])
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_naive_reference(name: str, document_mask: bool, positions: str) -> None:
    layer = build(VARIANTS[name], document_mask=document_mask)
    context = context_of(layer, positions)
    x = torch.randn(2, T, D_MODEL)
    output = layer(x, context)
    expected = reference(layer, x, context)
    # float32 against float64; outputs are of order 1 to 10
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    output = layer.double()(x.double(), context_of(layer, positions, torch.float64))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@UNCOMPILED_FLEX
@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("name", ["mha", "gqa", "sliding_window"])
def test_flex_equals_sdpa(name: str, document_mask: bool, positions: str) -> None:
    sdpa = build(VARIANTS[name], document_mask=document_mask, backend="sdpa")
    flex = build(VARIANTS[name], document_mask=document_mask, backend="flex")
    flex.load_state_dict(sdpa.state_dict())
    x = torch.randn(2, T, D_MODEL)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):  # another order of sums
        sdpa, flex, x = sdpa.to(dtype), flex.to(dtype), x.to(dtype)
        with torch.no_grad():
            expected, output = (layer(x, context_of(layer, positions, dtype)) for layer in (sdpa, flex))
        assert context_of(flex, positions).block_mask is not None
        torch.testing.assert_close(output, expected, rtol=10 * tolerance, atol=tolerance)


@UNCOMPILED_FLEX
@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_soft_cap_equals_the_naive_reference(positions: str) -> None:
    layer = build(VARIANTS["gqa"], logit_softcap=0.5).double()
    context = context_of(layer, positions, torch.float64)
    x = torch.randn(2, T, D_MODEL).double()
    with torch.no_grad():
        output = layer(x, context)
    torch.testing.assert_close(output, reference(layer, x, context), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("setting", [{"logit_softcap": 30.0}, {"backend": "flex"}])
def test_flex_cannot_train_on_a_cpu_and_says_so(setting: dict[str, Any]) -> None:
    layer = build(GroupedQueryAttention, **setting)
    assert layer.needs_flex
    with pytest.raises(NotImplementedError, match="FlexAttention does not support backward on CPU"):  # torch's words
        layer(torch.randn(2, T, D_MODEL), context_of(layer))


def test_which_backend_runs_where() -> None:
    plain = build(GroupedQueryAttention)
    assert not plain.needs_flex
    assert plain.backend_on(CUDA) == "sdpa"
    assert plain.backend_on(CUDA, with_slopes=True) == "flex"
    for masked in (build(GroupedQueryAttention, document_mask=True), build(VARIANTS["sliding_window"])):
        assert masked.backend_on(CUDA) == "flex"
        assert masked.backend_on(CPU) == "sdpa"
    assert build(GroupedQueryAttention, document_mask=True, dropout=0.1).backend_on(CUDA) == "sdpa"
    assert build(GroupedQueryAttention, document_mask=True, backend="sdpa").backend_on(CUDA) == "sdpa"
    assert build(GroupedQueryAttention, logit_softcap=5.0).backend_on(CPU) == "flex"


def test_dropout_of_probabilities_in_training_only() -> None:
    layer = build(GroupedQueryAttention, dropout=0.5)
    context, x = context_of(layer), torch.randn(2, T, D_MODEL)
    assert torch.equal(layer(x, context), layer(x, context))
    layer.train()
    assert not torch.equal(layer(x, context), layer(x, context))


@pytest.mark.parametrize(("given", "heads"), [(None, 8), (1, 1), (2, 2), (8, 8), (0.25, 2), (0.125, 1)])
def test_kv_heads_absolute_and_as_a_ratio(given: float | None, heads: int) -> None:
    layer = GroupedQueryAttention(64, 8, 16, False, n_kv_heads=given)
    assert layer.n_kv_heads == heads
    assert layer.k_proj.out_features == heads * 8
    cache = layer.new_cache(3, 16, CPU, torch.bfloat16)
    assert {name: tensor.shape for name, tensor in cache.items()} == dict.fromkeys(
        ("keys", "values"), (3, heads, 16, 8)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_kv_heads": 3}, r"attention.n_kv_heads=3 does not divide model.n_heads=8: use 1, 2, 4 or 8"),
        ({"n_kv_heads": 0}, r"attention.n_kv_heads=0 does not divide"),
        ({"n_kv_heads": 16}, r"attention.n_kv_heads=16 does not divide"),
        ({"n_kv_heads": 0.3}, r"attention.n_kv_heads=0.3 \(2.4 heads\) does not divide model.n_heads=8"),
        ({"n_kv_heads": 2.5}, r"attention.n_kv_heads=2.5 does not divide"),
        ({"logit_softcap": 5.0, "backend": "sdpa"}, r"attention.logit_softcap needs attention.backend=flex or auto"),
        ({"logit_softcap": 5.0, "dropout": 0.1}, r"attention.dropout=0.1 excludes attention.logit_softcap"),
        ({"backend": "flex", "dropout": 0.1}, r"attention.dropout=0.1 excludes attention.backend=flex"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedQueryAttention(64, 8, 16, False, **settings)


def test_heads_that_do_not_divide_the_width_need_a_head_dim() -> None:
    with pytest.raises(
        ValueError, match=r"model.n_heads=5 does not divide model.d_model=16: use 1, 2, 4, 8 or 16 heads"
    ):
        GroupedQueryAttention(16, 5, 16, False)
    assert GroupedQueryAttention(16, 5, 16, False, head_dim=4).q_proj.out_features == 20


@pytest.mark.parametrize(("window", "tokens"), [(3, 3), (1, 1), (0.25, 4), (0.01, 1)])
def test_windows_in_tokens_and_as_a_ratio(window: float, tokens: int) -> None:
    assert GroupedQueryAttention(64, 8, 16, False, window=window).window == tokens


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (16, r"attention.window=16 reaches all of model.context_length=16 and changes nothing"),
        (99, r"attention.window=99 reaches all"),
        (0, r"attention.window=0 must be a positive number of tokens or a ratio"),
        (1.5, r"attention.window=1.5 must be a positive number"),
        (1.0, r"attention.window=1.0 must be a positive number"),
    ],
)
def test_refused_windows(window: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedQueryAttention(64, 8, 16, False, window=window)


def test_biases() -> None:
    def biased(bias: bool, qkv_bias: bool | None, variant: Callable[..., Attention]) -> tuple[bool, bool]:
        layer = variant(64, 8, 16, bias, qkv_bias=qkv_bias)
        return layer.q_proj.bias is not None, layer.out_proj.bias is not None

    for variant in (GroupedQueryAttention, MultiHeadLatentAttention, partial(GroupedQueryAttention, window=4)):
        assert biased(False, None, variant) == (False, False)
        assert biased(True, None, variant) == (True, True)
        assert biased(False, True, variant) == (True, False)
        assert biased(True, False, variant) == (False, True)


def test_mla_is_sized_like_deepseek_v2() -> None:
    # DeepSeek-V2 (2405.04434, 3.1.2): 128 heads of 128, latents of 512 and 1,536, a rotary part of 64
    with torch.device("meta"):
        layer = MultiHeadLatentAttention(128 * 128, 128, 4096, False, q_lora_rank=1536)
    assert (layer.kv_lora_rank, layer.nope_dim, layer.rotary_dim, layer.v_head_dim) == (512, 128, 64, 128)
    cache = layer.new_cache(1, 4096, CPU, torch.bfloat16)
    assert sum(tensor.numel() for tensor in cache.values()) == 576 * 4096
    assert layer.flops_per_token() == 2 * 4096 * 128 * (192 + 128) + 2 * sum(
        p.numel() for p in layer.parameters() if p.ndim > 1
    )


def test_mla_head_dim_must_have_something_to_size() -> None:
    sizes = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    with pytest.raises(ValueError, match=r"attention.head_dim=8 changes nothing"):
        MultiHeadLatentAttention(64, 8, 16, False, head_dim=8, **sizes)
    assert MultiHeadLatentAttention(60, 8, 16, False, **sizes).head_dim == 12  # 8 need not divide 60


def test_flops() -> None:
    # PaLM, appendix B: 4 · T · heads · head_dim a layer for the scores, 2 for each weight
    assert GroupedQueryAttention(64, 8, 16, False, n_kv_heads=1).flops_per_token() == 4 * 16 * 64 + 2 * 64 * (128 + 16)
    assert GroupedQueryAttention(64, 8, 16, False, window=4).flops_per_token() == 4 * 4 * 64 + 2 * 4 * 64 * 64


def test_a_variant_is_one_small_class() -> None:
    class MeanOfThePast(Attention):
        """Uniform attention: queries of zero."""

        def __init__(self, d_model: int, n_heads: int, context_length: int, bias: bool, *, scale: float = 1.0) -> None:
            super().__init__(d_model, n_heads, context_length, bias)
            self.scale = scale

        def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
            x = x_BTD[:, None]
            return self.scale * self.attend(torch.zeros_like(x), x, x, context)[:, 0]

    layer = MeanOfThePast(D_MODEL, N_HEADS, T, False, scale=2.0)
    x = torch.randn(2, T, D_MODEL)
    expected = 2 * x.cumsum(1) / torch.arange(1, T + 1)[:, None]
    torch.testing.assert_close(layer(x, context_of(layer)), expected, rtol=1e-4, atol=1e-5)
    assert (layer.rotary_dim, layer.needs_flex, layer.flops_per_token()) == (6, False, 4 * T * D_MODEL)


@pytest.mark.parametrize(("n_tokens", "n_groups"), [(1, 2), (48, 6), (64, 2), (150, 2), (600, 1)])
def test_blocks_of_queries_are_causal_attention(n_tokens: int, n_groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, out = (
        torch.randn(2, heads, n_tokens, dim, generator=generator, dtype=torch.float64).requires_grad_()
        for heads, dim in ((6, 16), (n_groups, 16), (n_groups, 24), (6, 24))
    )
    for scale in (None, 0.5):
        y = kernels.causal_in_blocks(q, k, v, scale)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, scale=scale
        )
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(each, (q, k, v), out) for each in (y, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sharpness", [1.0, 4.0])  # of the scores: their standard deviation
def test_blocks_in_bfloat16_are_exact_to_the_rounding_of_scores(sharpness: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 256, 64, generator=generator) for heads in (6, 2, 2))
    q, k, v = (q * sharpness).bfloat16(), k.bfloat16(), v.bfloat16()
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
    )
    error = torch.nn.functional.mse_loss(kernels.causal_in_blocks(q, k, v).double(), exact).sqrt()
    assert error < 0.01 * exact.square().mean().sqrt()  # 0.3 and 0.8 %; the flash kernel's is 0.2 %


def test_shared_keys_in_bfloat16_are_those_of_their_queries() -> None:
    """Both what comes out and what flows back, against float64; the rounding of bfloat16 is 0.4 %."""
    generator = torch.Generator().manual_seed(0)
    attention = GroupedQueryAttention(96, 6, 64, False, n_kv_heads=2, backend="sdpa")
    context = SequenceContext(position_ids=torch.arange(64)[None])
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        generator.manual_seed(0)
        q, k, v = (torch.randn(2, heads, 64, 16, generator=generator).to(dtype).requires_grad_() for heads in (6, 2, 2))
        y = attention.attend(q, k, v, context)
        y.square().sum().backward()
        found.append([y, q.grad, k.grad, v.grad])
    for exact, rounded in zip(*found, strict=True):
        assert (rounded.double() - exact).square().mean().sqrt() < 0.01 * exact.square().mean().sqrt()


def test_blocks_are_for_short_causal_attention_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(kernels, "causal_in_blocks", lambda q, k, v, scale: used.append(q.shape[2]) or q)
    for backend, dropout, dtype, n_tokens in (
        ("auto", 0.0, torch.bfloat16, 32),
        ("auto", 0.0, torch.float32, 33),
        ("sdpa", 0.0, torch.bfloat16, 34),
        ("auto", 0.1, torch.bfloat16, 35),
        ("auto", 0.0, torch.bfloat16, 1025),
    ):
        attention = build(GroupedQueryAttention, backend=backend, dropout=dropout).train()
        x = torch.zeros(1, attention.n_heads, n_tokens, 8, dtype=dtype)
        attention.attend(x, x, x, SequenceContext(position_ids=torch.arange(n_tokens)[None]))
    assert used == [32]


def test_the_kernel_that_runs_is_told() -> None:
    assert build(GroupedQueryAttention).kernel_on(CPU, torch.bfloat16) == "blocks"
    assert build(GroupedQueryAttention, backend="sdpa").kernel_on(CPU, torch.bfloat16) == "FLASH_ATTENTION"
    assert build(GroupedQueryAttention).kernel_on(CPU, torch.float32) == "FLASH_ATTENTION"
    assert build(GroupedQueryAttention, dropout=0.1).kernel_on(CPU, torch.bfloat16) == "MATH"
    assert build(GroupedQueryAttention, logit_softcap=5.0).kernel_on(CPU, torch.bfloat16) == "flex"
    assert build(VARIANTS["mla"]).kernel_on(CPU, torch.float32) in ("FLASH_ATTENTION", "MATH")
    assert build(VARIANTS["sliding_window"]).kernel_on(CPU, torch.bfloat16) != "blocks"
