"""With the weights copied over, the decoder is the published model: logits and gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hugging_face import (
    from_gpt2,
    from_llama,
    from_neox,
    gpt2_config,
    gradients_of,
    llama_config,
    neox_config,
    weights_of,
)
from transformers import DeepseekV2Config, GPT2LMHeadModel, GPTNeoXForCausalLM, LlamaForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding

from oracles import randomize
from thunderhead.core.model.context import SequenceContext
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.position import RotaryPosition
from thunderhead.options.latent_attention import MultiHeadLatentAttention

SIZES = [
    "model.n_layers=2",
    "model.d_model=48",
    "model.n_heads=4",
    "model.context_length=24",
    "model.vocab_multiple=64",
]
VOCAB = 61


def check(decoder: Decoder, theirs: torch.nn.Module, rename: Callable[..., dict[str, torch.Tensor]]) -> None:
    """Logits and gradients of all parameters, in float32. Padding rows of embedding and head are ours alone."""
    theirs.eval()
    randomize(theirs, 0.2)
    own = decoder.state_dict()
    for name, tensor in rename(weights_of(theirs)).items():
        own[name][: len(tensor)] = tensor  # in place: a view of the parameter
    assert rename(weights_of(theirs)).keys() == own.keys()

    tokens, targets = torch.randint(VOCAB, (3, 24)), torch.randint(VOCAB, (3, 24))
    logits, expected = decoder.logits(tokens), theirs(tokens).logits
    # Both sum in float32, in different orders; logits are of order 10.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    terms = decoder(tokens, targets)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(terms.loss, loss, rtol=1e-5, atol=1e-5)
    terms.loss.backward()
    loss.backward()
    ours = gradients_of(decoder)
    renamed = rename(gradients_of(theirs))
    largest = max(gradient.abs().max().item() for gradient in renamed.values())
    for name, gradient in renamed.items():
        # Roundings are relative to a tensor's largest gradient. That of a bias of keys is 0 but for rounding (softmax
        # does not see what is added to all scores of a query), hence the second term.
        scale = max(gradient.abs().max().item(), 1e-2 * largest)
        torch.testing.assert_close(ours[name][: len(gradient)], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_gpt2(build: Callable[..., Decoder]) -> None:
    config = gpt2_config(n_layer=2, n_embd=48, n_head=4, n_positions=24, vocab_size=VOCAB)
    check(build("experiment=gpt2", *SIZES), GPT2LMHeadModel(config), from_gpt2)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_llama(build: Callable[..., Decoder], n_kv_heads: int, tied: bool) -> None:
    config = llama_config(
        num_hidden_layers=2,
        hidden_size=48,
        intermediate_size=104,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
        max_position_embeddings=24,
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
    )
    overrides = [
        "attention=gqa",
        f"attention.n_kv_heads={n_kv_heads}",
        "model.d_ff=104",
        f"model.tie_embeddings={tied}",
    ]
    check(build("experiment=llama", *SIZES, *overrides), LlamaForCausalLM(config), from_llama)


def test_llama_3_with_scaled_rotation(build: Callable[..., Decoder]) -> None:
    config = llama_config(
        num_hidden_layers=2,
        hidden_size=48,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=24,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    )
    scaling = ["position.scaling=llama3", "position.factor=4.0", "position.original_context_length=8"]
    overrides = ["attention.n_kv_heads=2", *SIZES, "model.vocab_size=61", "model.d_ff=128", *scaling]
    check(build("experiment=llama-1b", *overrides), LlamaForCausalLM(config), from_llama)


def test_pythia(build: Callable[..., Decoder]) -> None:
    config = neox_config(
        num_hidden_layers=2,
        hidden_size=48,
        intermediate_size=192,
        num_attention_heads=4,
        max_position_embeddings=24,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1 / 3},
    )
    decoder = build("experiment=pythia", *SIZES, "position.fraction=0.33334")  # 4 of 12 dimensions
    check(decoder, GPTNeoXForCausalLM(config), partial(from_neox, n_heads=4))


@pytest.mark.parametrize("q_lora_rank", [None, 20])
def test_mla_equals_deepseek_v2(q_lora_rank: int | None) -> None:
    nope, rope, v_head_dim, rank, n_heads, d_model = 8, 4, 6, 16, 4, 48
    config = DeepseekV2Config(
        hidden_size=d_model,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=v_head_dim,
        attn_implementation="eager",
    )
    theirs = DeepseekV2Attention(config, layer_idx=0).eval()
    randomize(theirs)
    sizes: dict[str, Any] = {"kv_lora_rank": rank, "qk_nope_head_dim": nope, "qk_rope_head_dim": rope}
    ours = MultiHeadLatentAttention(
        d_model, n_heads, 24, False, q_lora_rank=q_lora_rank, v_head_dim=v_head_dim, **sizes
    ).eval()
    names = {
        "q_a_proj": "q_down_proj",
        "q_a_layernorm": "q_latent_norm",
        "q_b_proj": "q_proj",
        "kv_a_proj_with_mqa": "kv_down_proj",
        "kv_a_layernorm": "kv_latent_norm",
        "kv_b_proj": "kv_proj",
        "o_proj": "out_proj",
    }
    weights = {}
    for name, tensor in theirs.state_dict().items():
        module = name.removesuffix(".weight")
        weights[f"{names.get(module, module)}.weight"] = tensor.clone()
    # DeepSeek rotates neighbours (2i, 2i + 1) where we rotate (i, i + R/2): reorder the rows that make rotary parts.
    order = torch.tensor([0, 2, 1, 3])
    by_head = weights["q_proj.weight"].unflatten(0, (n_heads, nope + rope))
    by_head[:, nope:] = by_head[:, nope:][:, order]
    weights["kv_down_proj.weight"][rank:] = weights["kv_down_proj.weight"][rank:][order]
    ours.load_state_dict(weights)

    x, position_ids = torch.randn(2, 24, d_model), torch.arange(24)[None]
    causal = torch.full((24, 24), float("-inf")).triu(1)[None, None]
    frequencies = DeepseekV2RotaryEmbedding(config)(x, position_ids)
    expected = theirs(x, causal, position_embeddings=frequencies)[0]
    rotation = RotaryPosition(rope).rotation(position_ids)
    torch.testing.assert_close(
        ours(x, SequenceContext(position_ids, rotation=rotation)), expected, rtol=1e-4, atol=1e-4
    )
