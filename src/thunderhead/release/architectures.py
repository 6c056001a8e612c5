"""Classes of transformers that a decoder may be exported as: what of ours they can be, and where they keep it.

Shape letters: V vocabulary, D model dimensions, H query heads, G key/value heads, E dimensions of a head.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from thunderhead.core.model.position import RotaryPosition
from thunderhead.options.blocks import ParallelBlock
from thunderhead.release.facts import function_of
from thunderhead.release.rearrange import (
    Weights,
    by_head,
    deepseek_v2_weights,
    gemma2_weights,
    interleaved,
    joined,
    norms_less_one,
    opt_weights,
    transposed,
)


class Architecture(NamedTuple):
    """A class of transformers.

    - allows: values of facts that it can be; of facts that are not named, `facts.PLAIN`'s.
    - settings: of a decoder, its configuration. names: of its modules for ours, whole or parts of a dotted name.
    - change: weights under its names, where more is different than the names.
    - unit: the weights of a norm that multiplies by 1.
    """

    name: str
    allows: Mapping[str, set[str]]
    settings: Callable[[Any], dict[str, Any]]
    names: Mapping[str, str]
    change: Callable[[Any, Weights], Weights] = lambda decoder, weights: weights
    unit: float = 1.0


# --- configurations ---------------------------------------------------------------------------------------------------


def _shared(decoder: Any, **more: Any) -> dict[str, Any]:
    """Settings that most classes call so."""
    mixer, feedforward = decoder.mixers[0], decoder.blocks[0].feedforward
    eos = None if decoder.eos_id is None else int(decoder.eos_id)
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.embedding.embedding_dim,
        "intermediate_size": feedforward.up_proj.out_features,
        "num_hidden_layers": decoder.n_layers,
        "num_attention_heads": decoder.n_heads,
        "num_key_value_heads": mixer.n_kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": function_of(feedforward),
        "max_position_embeddings": decoder.context_length,
        "initializer_range": decoder.init_std,
        "attention_dropout": mixer.dropout,
        **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon"), eps_of(decoder)),
        "attention_bias": any(
            m.bias is not None for m in (mixer.q_proj, mixer.out_proj)
        ),  # one of both: the other's is 0
        "mlp_bias": feedforward.up_proj.bias is not None,
        "rope_parameters": _rope_of(decoder),
        **tokens_of(eos),
    } | more


def tokens_of(eos: int | None) -> dict[str, Any]:
    """Nothing stands before a document, and EOS after it; batches are padded with it, too, behind a mask."""
    return {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": None}


def eps_of(decoder: Any) -> float:
    """Of its norms; float32's, where PyTorch chooses."""
    norm: Any = decoder.blocks[0].attention_norm
    return float(norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps)


def theta_of(position: Any) -> float:
    """The base of rotary positions, of which position.scaling=ntk makes another."""
    theta: float = position.theta
    if getattr(position, "scaling", "none") == "ntk":
        theta *= position.factor ** (position.rotated_dim / (position.rotated_dim - 2))
    return theta


def _rope_of(decoder: Any) -> dict[str, Any]:
    position: Any = decoder.position
    if not isinstance(position, RotaryPosition):
        return {"rope_type": "default", "rope_theta": 10_000.0}
    fraction = position.rotated_dim / decoder.mixers[0].rotary_dim
    partial = {} if fraction == 1 else {"partial_rotary_factor": fraction}
    scaling, theta = getattr(position, "scaling", "none"), theta_of(position)
    if scaling in ("none", "ntk"):
        return {"rope_type": "default", "rope_theta": theta, **partial}
    settings = {"rope_type": scaling, "rope_theta": theta, "factor": position.factor, **partial}
    if scaling == "llama3":
        settings |= {
            "low_freq_factor": position.low_freq_factor,
            "high_freq_factor": position.high_freq_factor,
            "original_max_position_embeddings": position.original_context_length,
        }
    return settings


def _partial(decoder: Any, **more: Any) -> dict[str, Any]:
    """Of classes that rotate a part of each head where nothing is said."""
    return _shared(decoder, rope_parameters={"partial_rotary_factor": 1.0} | _rope_of(decoder), **more)


def _windowed(decoder: Any, **more: Any) -> dict[str, Any]:
    """Of classes that know windows by layer."""
    window = decoder.mixers[0].window
    kind = "full_attention" if window is None else "sliding_attention"
    settings = {
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": 0 if window is not None else decoder.n_layers,
        "layer_types": [kind] * decoder.n_layers,
    }
    return _shared(decoder) | settings | more


def _smollm3(decoder: Any) -> dict[str, Any]:
    layers = decoder.n_layers
    return _shared(decoder, no_rope_layers=[0] * layers, layer_types=["full_attention"] * layers)


def _neox(decoder: Any) -> dict[str, Any]:
    return _partial(decoder, use_parallel_residual=isinstance(decoder.blocks[0], ParallelBlock))


def _stablelm(decoder: Any) -> dict[str, Any]:
    return _neox(decoder) | {"use_qkv_bias": decoder.mixers[0].q_proj.bias is not None}


def _starcoder2(decoder: Any) -> dict[str, Any]:
    return _windowed(decoder, use_bias=True)


def _cohere(decoder: Any) -> dict[str, Any]:
    return _shared(decoder, logit_scale=1.0)


def _deepseek_v2(decoder: Any) -> dict[str, Any]:
    mixer = decoder.mixers[0]
    return _shared(
        decoder,
        first_k_dense_replace=decoder.n_layers,  # no layer of experts
        q_lora_rank=mixer.q_lora_rank,
        kv_lora_rank=mixer.kv_lora_rank,
        qk_nope_head_dim=mixer.nope_dim,
        qk_rope_head_dim=mixer.rotary_dim,
        v_head_dim=mixer.v_head_dim,
    )


def _gemma2(decoder: Any) -> dict[str, Any]:
    return _windowed(
        decoder,
        hidden_activation=function_of(decoder.blocks[0].feedforward),
        query_pre_attn_scalar=decoder.mixers[0].head_dim,
        attn_logit_softcapping=decoder.mixers[0].logit_softcap,
        final_logit_softcapping=None,
        sliding_window=decoder.mixers[0].window or decoder.context_length,  # it makes both masks
    )


def _gpt2(decoder: Any) -> dict[str, Any]:
    shared = _shared(decoder)
    block = decoder.blocks[0]
    return {
        "n_positions": shared["max_position_embeddings"],
        "n_embd": shared["hidden_size"],
        "n_inner": shared["intermediate_size"],
        "n_layer": shared["num_hidden_layers"],
        "n_head": shared["num_attention_heads"],
        "activation_function": shared["hidden_act"],
        "layer_norm_epsilon": shared["layer_norm_eps"],
        "attn_pdrop": shared["attention_dropout"],
        "embd_pdrop": decoder.embedding_dropout,
        "resid_pdrop": block.dropout.attention_output,
        "multi_query": decoder.mixers[0].n_kv_heads == 1,
        **{name: shared[name] for name in ("vocab_size", "initializer_range", *tokens_of(None))},
    }


def _opt(decoder: Any) -> dict[str, Any]:
    shared, block = _shared(decoder), decoder.blocks[0]
    return {
        **shared,
        "ffn_dim": shared["intermediate_size"],
        "activation_function": shared["hidden_act"],
        "do_layer_norm_before": decoder.final_norm is not None,
        "word_embed_proj_dim": shared["hidden_size"],
        "dropout": block.dropout.attention_output,
        "init_std": decoder.init_std,
    }


def _mpt(decoder: Any) -> dict[str, Any]:
    shared = _shared(decoder)
    return {
        "d_model": shared["hidden_size"],
        "n_heads": decoder.n_heads,
        "n_layers": decoder.n_layers,
        "expansion_ratio": 4,
        "max_seq_len": decoder.context_length,
        "layer_norm_epsilon": shared["layer_norm_eps"],
        "attn_config": {"alibi": True},
        **{name: shared[name] for name in ("vocab_size", "initializer_range", *tokens_of(None))},
    }


# --- names and classes ------------------------------------------------------------------------------------------------


def names_of(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split())


_LLAMA = names_of(
    "embedding=model.embed_tokens final_norm=model.norm head=lm_head blocks=model.layers attention=self_attn "
    "out_proj=o_proj feedforward=mlp attention_norm=input_layernorm feedforward_norm=post_attention_layernorm"
)
_GEMMA2 = _LLAMA | names_of(
    "attention_output_norm=post_attention_layernorm feedforward_norm=pre_feedforward_layernorm "
    "feedforward_output_norm=post_feedforward_layernorm"
)
_DEEPSEEK_V2 = _LLAMA | names_of(
    "q_down_proj=q_a_proj q_latent_norm=q_a_layernorm kv_down_proj=kv_a_proj_with_mqa kv_latent_norm=kv_a_layernorm "
    "kv_proj=kv_b_proj"
)
_GPT2 = names_of(
    "embedding=transformer.wte position.embedding=transformer.wpe final_norm=transformer.ln_f head=lm_head "
    "blocks=transformer.h attention=attn out_proj=c_proj feedforward=mlp up_proj=c_fc down_proj=c_proj "
    "attention_norm=ln_1 feedforward_norm=ln_2"
)
_OPT = names_of(
    "embedding=model.decoder.embed_tokens position.embedding=model.decoder.embed_positions head=lm_head "
    "final_norm=model.decoder.final_layer_norm blocks=model.decoder.layers attention=self_attn "
    "feedforward.up_proj=fc1 feedforward.down_proj=fc2 attention_norm=self_attn_layer_norm "
    "feedforward_norm=final_layer_norm"
)
_NEOX = _LLAMA | names_of(
    "embedding=gpt_neox.embed_in final_norm=gpt_neox.final_layer_norm blocks=gpt_neox.layers attention=attention "
    "out_proj=dense up_proj=dense_h_to_4h down_proj=dense_4h_to_h"
)
_MPT = names_of(
    "embedding=transformer.wte final_norm=transformer.norm_f head=lm_head blocks=transformer.blocks attention=attn "
    "feedforward=ffn attention_norm=norm_1 feedforward_norm=norm_2"
)
_PHI = _LLAMA | names_of("final_norm=model.final_layernorm out_proj=dense up_proj=fc1 down_proj=fc2")
_STARCODER2 = _LLAMA | names_of("up_proj=c_fc down_proj=c_proj")

_EITHER, _IF_GIVEN = {"true", "false"}, {"null", "given"}
SCALED = {"position.scaling": {"none", "linear", "llama3"}}
GROUPED = {"attention.n_kv_heads": {"all", "fewer", "one"}}
PARTIAL = {"position.fraction": {"1", "less"}}
ANY_HEAD = {"attention.head_dim": {"d_model / n_heads", "given"}}
_WINDOW = {"attention.window": _IF_GIVEN}
QKV_BIAS = {"attention.qkv_bias": _EITHER}
BIASES = QKV_BIAS | {"model.bias": _EITHER}
_PARALLEL = {"block": {"parallel"}}
_ADDED = {"position": {"learned", "sinusoidal", "none"}}
_RMS = GROUPED | SCALED
LAYER = {"norm": {"layernorm"}, "norm.bias": _EITHER}
_GPT = LAYER | BIASES | {"activation": {"ungated"}}
_QK_NORM = {"attention.qk_norm": {"true"}}

# The first that fits is taken.
ARCHITECTURES = (
    Architecture("Qwen2", _RMS | _WINDOW | {"attention.qkv_bias": {"true"}}, _windowed, _LLAMA),
    Architecture("Llama", _RMS | ANY_HEAD | BIASES, _shared, _LLAMA),
    Architecture("Mistral", _RMS | ANY_HEAD | {"attention.window": {"given"}}, _windowed, _LLAMA),
    Architecture("Qwen3", _RMS | ANY_HEAD | _QK_NORM | _WINDOW | QKV_BIAS, _windowed, _LLAMA),
    Architecture("SmolLM3", GROUPED | BIASES | {"position": {"none"}}, _smollm3, _LLAMA),
    Architecture("Arcee", _RMS | ANY_HEAD | BIASES | {"activation": {"ungated"}}, _shared, _LLAMA),
    Architecture(
        "Gemma2",
        _RMS | ANY_HEAD | QKV_BIAS | _WINDOW | {"block": {"sandwich"}, "attention.logit_softcap": _IF_GIVEN},
        *(_gemma2, _GEMMA2, gemma2_weights, 0.0),
    ),
    Architecture(
        "DeepseekV2",
        SCALED | {"attention": {"mla"}, "model.bias": _EITHER},
        *(_deepseek_v2, _DEEPSEEK_V2, deepseek_v2_weights),
    ),
    Architecture("GPT2", _GPT | {"position": {"learned"}}, _gpt2, _GPT2, transposed),
    Architecture("GPTBigCode", _GPT | _ADDED | {"attention.n_kv_heads": {"one"}}, _gpt2, _GPT2, joined("c_attn")),
    Architecture("OPT", _GPT | _ADDED | {"block": {"pre", "post"}}, _opt, _OPT, opt_weights),
    Architecture(
        "GPTNeoX",
        _GPT | PARTIAL | SCALED | {"block": {"pre", "parallel with shared_norm=false"}},
        *(_neox, _NEOX, by_head),
    ),
    Architecture("Starcoder2", _GPT | _RMS | _WINDOW, _starcoder2, _STARCODER2),
    Architecture("Nemotron", _GPT | _RMS | PARTIAL | ANY_HEAD, _partial, _LLAMA, norms_less_one, 0.0),
    Architecture("Cohere", _RMS | QKV_BIAS | _PARALLEL | {"norm": {"layernorm"}}, _cohere, _LLAMA, interleaved),
    Architecture("StableLm", LAYER | _RMS | PARTIAL | QKV_BIAS | {"block": {"pre", "parallel"}}, _stablelm, _LLAMA),
    Architecture("Phi", _GPT | _RMS | PARTIAL | _PARALLEL, _partial, _PHI),
    Architecture(
        "Mpt",
        {"norm": {"layernorm"}, "activation": {"ungated"}, "position": {"alibi"}, "function": {"gelu"}},
        *(_mpt, _MPT, joined("Wqkv")),
    ),
)
