"""A decoder and its tokenizer as GGUF, the format of llama.cpp and of what is built on it (Ollama, LM Studio …).

What an architecture computes is fixed in its code (src/models of llama.cpp, as in llama-cpp-python 0.3.36): it has one
nonlinearity, GELU in its tanh form, and those here read no window.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from thunderhead import word_patterns
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.position import RotaryPosition
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.options.blocks import ParallelBlock
from thunderhead.options.positions import AlibiPosition
from thunderhead.release.architectures import (
    ANY_HEAD,
    BIASES,
    GROUPED,
    LAYER,
    PARTIAL,
    QKV_BIAS,
    SCALED,
    eps_of,
    names_of,
    theta_of,
)
from thunderhead.release.facts import fitting
from thunderhead.release.huggingface import folded, renamed
from thunderhead.release.rearrange import Weights, interleaved, joined

NAMES = names_of(
    "embedding=token_embd position.embedding=position_embd final_norm=output_norm head=output blocks=blk "
    "attention.q_proj=attn_q attention.k_proj=attn_k attention.v_proj=attn_v attention.out_proj=attn_output "
    "attention.q_norm=attn_q_norm attention.k_norm=attn_k_norm attention_norm=attn_norm feedforward_norm=ffn_norm "
    "feedforward.gate_proj=ffn_gate feedforward.up_proj=ffn_up feedforward.down_proj=ffn_down"
)


class Architecture(NamedTuple):
    """One of llama.cpp's.

    - allows: values of facts that it can be; of facts that are not named, those of `architectures.PLAIN`.
    - pairs: rotates the dimensions (2i, 2i + 1) of a head. joins: has q, k and v in one matrix.
    - biases: which it needs, as the first letters of tensors' names; others may be there or not.
    - ties: whether its head may be the embedding.
    """

    name: str
    allows: Mapping[str, set[str]]
    pairs: bool = False
    joins: bool = False
    biases: tuple[str, ...] = ()
    ties: bool = True


_SILU, _GELU = {"function": {"silu"}}, {"function": {"gelu_pytorch_tanh"}, "activation": {"ungated"}}
_RELU2 = {"function": {"relu2"}, "activation": {"ungated"}}
_LINEAR = {"position.scaling": {"none", "linear"}}
_GPT = GROUPED | LAYER | _GELU | BIASES
_NORMS = ("attn_norm", "ffn_norm", "output_norm")
_ALL = (*_NORMS, "attn_qkv", "attn_output", "ffn_up", "ffn_down")
_PARALLEL = "parallel with shared_norm=false"

# The first that fits is taken.
ARCHITECTURES = (
    Architecture("llama", GROUPED | _SILU | SCALED | ANY_HEAD | BIASES, pairs=True),
    Architecture("qwen3", GROUPED | _SILU | _LINEAR | ANY_HEAD | QKV_BIAS | {"attention.qk_norm": {"true"}}),
    Architecture("arcee", GROUPED | _RELU2 | SCALED | ANY_HEAD | QKV_BIAS, pairs=True),
    Architecture("gpt2", _GPT | {"position": {"learned", "sinusoidal", "none"}}, joins=True, biases=_ALL),
    Architecture(
        "gptneox",
        _GPT | PARTIAL | _LINEAR | {"block": {"pre", _PARALLEL}},
        joins=True,
        biases=_ALL,
        ties=False,
    ),
    Architecture("nemotron", _GPT | _RELU2 | PARTIAL | _LINEAR, biases=_NORMS, ties=False),
    Architecture(
        "stablelm",
        GROUPED | LAYER | _SILU | PARTIAL | QKV_BIAS | {"block": {"pre", "parallel"}},
        biases=_NORMS,
        ties=False,
    ),
    Architecture(
        "phi2",
        _GPT | PARTIAL | _LINEAR | {"block": {"parallel"}},
        biases=(*_NORMS, "attn_output", "ffn_up", "ffn_down", "output"),
        ties=False,
    ),
    Architecture("mpt", _GPT | {"position": {"alibi"}}, joins=True),
)

# Llama.cpp's names for them (LLAMA_VOCAB_PRE_TYPE_ in its src/llama-vocab.cpp).
_WORDS = {word_patterns.GPT2: "gpt-2", word_patterns.CL100K: "dbrx", word_patterns.O200K: "gpt-4o"}


def architecture_of(decoder: Decoder) -> Architecture:
    """The architecture that has all options of a decoder; raises Misfit if none has."""
    return fitting(decoder, ARCHITECTURES)


def write_gguf(
    decoder: Decoder,
    architecture: Architecture,
    vocabulary: dict[str, Any],
    folder: Path,
    *,
    name: str,
    dtype: Literal["float32", "bfloat16"],
    max_shard_size: int,
) -> None:
    """Write model.gguf, or where that were larger than `max_shard_size` bytes, model-00001-of-0000N.gguf and so on.

    Args:
        decoder: the model; in float32.
        architecture: that it is to be, from `architecture_of`.
        vocabulary: of the tokenizer, from `vocabulary_of`.
        folder: where to.
        name: of the model, shown by programs that load it.
        dtype: of matrices; vectors and tables of positions are float32, as llama.cpp has them.
        max_shard_size: of one file, bytes.
    """
    import gguf

    kind, file_type = {"float32": ("F32", "ALL_F32"), "bfloat16": ("BF16", "MOSTLY_BF16")}[dtype]
    arrays = {}
    for tensor_name, tensor in tensors_of(decoder, architecture).items():
        is_kept = tensor.ndim == 1 or tensor_name.startswith("position_embd")
        raw = gguf.GGMLQuantizationType["F32" if is_kept else kind]
        arrays[tensor_name] = gguf.quants.quantize(tensor.contiguous().numpy(), raw), raw
    is_split = sum(array.nbytes for array, _ in arrays.values()) > max_shard_size
    writer = gguf.GGUFWriter(folder / "model.gguf", architecture.name, split_max_size=max_shard_size if is_split else 0)
    for key, value in [*_settings(decoder, name).items(), *vocabulary.items()]:
        getattr(writer, f"add_{key}")(value)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    for tensor_name, (array, raw) in arrays.items():
        writer.add_tensor(tensor_name, array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors_of(decoder: Any, architecture: Architecture) -> Weights:
    """A decoder's weights under GGUF's names, in float32."""
    weights = {name: tensor.detach().float() for name, tensor in decoder.state_dict().items()}
    weights = folded(decoder, weights, architecture.name == "gpt2")
    if not architecture.ties:
        weights.setdefault("head.weight", weights["embedding.weight"])
    if architecture.pairs:
        weights = interleaved(decoder, weights)
    if architecture.joins:
        weights = joined("qkv_proj")(decoder, weights)
    theirs = renamed(weights, NAMES | {"attention.qkv_proj": "attn_qkv"})
    d_model = decoder.embedding.embedding_dim
    for layer in range(decoder.n_layers):
        for norm in _norms(decoder):
            theirs.setdefault(f"blk.{layer}.{norm}.weight", torch.ones(d_model))  # of norms without weights
        if not isinstance(decoder.mixers[layer].q_norm, torch.nn.Identity):
            for norm in ("attn_q_norm", "attn_k_norm"):
                theirs.setdefault(f"blk.{layer}.{norm}.weight", torch.ones(decoder.mixers[layer].head_dim))
    theirs.setdefault("output_norm.weight", torch.ones(d_model))
    for name in [name for name in theirs if name.endswith(".weight")]:
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part in architecture.biases:
            theirs.setdefault(name.replace(".weight", ".bias"), torch.zeros(len(theirs[name])))
    scaled: Any = decoder.position
    if getattr(scaled, "scaling", "none") == "llama3":
        theirs["rope_freqs.weight"] = _slowed(scaled)
    return theirs


def _norms(decoder: Decoder) -> list[str]:
    shares = isinstance(decoder.blocks[0], ParallelBlock) and decoder.blocks[0].shared_norm
    return ["attn_norm"] if shares else ["attn_norm", "ffn_norm"]


def _slowed(position: Any) -> Tensor:
    """By how much each pair turns more slowly than without scaling, (R/2)."""
    device = torch.device("cpu")
    scaled: Tensor = position.frequencies(device)
    return RotaryPosition.frequencies(position, device) / scaled


def _settings(decoder: Any, name: str) -> dict[str, Any]:
    """Keys that architectures have in common; what one does not have it does not read."""
    mixer, block, position = decoder.mixers[0], decoder.blocks[0], decoder.position
    eps = eps_of(decoder)
    settings = {
        "name": name,
        "vocab_size": decoder.vocab_size,
        "context_length": decoder.context_length,
        "embedding_length": decoder.embedding.embedding_dim,
        "block_count": decoder.n_layers,
        "feed_forward_length": block.feedforward.up_proj.out_features,
        "head_count": decoder.n_heads,
        "head_count_kv": mixer.n_kv_heads,
        "key_length": mixer.head_dim,
        "value_length": mixer.head_dim,
        "layer_norm_eps": eps,
        "layer_norm_rms_eps": eps,
        "parallel_residual": isinstance(block, ParallelBlock),
    }
    if isinstance(position, RotaryPosition):
        settings |= {"rope_dimension_count": position.rotated_dim, "rope_freq_base": theta_of(position)}
        if getattr(position, "scaling", "none") == "linear":
            import gguf

            settings |= {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": position.factor}
    if isinstance(position, AlibiPosition):
        settings["max_alibi_bias"] = 8.0
    return settings


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Values of tokenizer.ggml.* for a byte-level BPE; ValueError for another, or one that splits words differently."""
    import gguf

    fast = tokenizer.as_fast()
    content = json.loads(fast.to_str())
    words = _words_of(content)
    if words is None:
        raise ValueError("llama.cpp reads byte-level BPE that splits words as GPT-2, cl100k or o200k do")
    by_id = {i: token for token, i in fast.get_vocab(with_added_tokens=True).items()}
    special = {token["id"] for token in content["added_tokens"] if token["special"]}
    kinds, ids = gguf.TokenType, range(vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": words,
        "token_list": [by_id.get(i, f"[PAD{i}]") for i in ids],
        "token_types": [
            kinds.UNUSED if i not in by_id else kinds.CONTROL if i in special else kinds.NORMAL for i in ids
        ],
        "token_merges": merges or ["\ue000 \ue001"],  # there must be one: of characters that spell no byte
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": tokenizer.eos_id,
        "add_bos_token": False,
        "add_eos_token": False,
    }


def _words_of(content: dict[str, Any]) -> str | None:
    """Llama.cpp's name for how a tokenizer.json splits texts into words; None if it has no such one."""
    model, splitter = content["model"], content["pre_tokenizer"] or {}
    *before, last = splitter.get("pretokenizers", [splitter])
    is_bytes = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if model["type"] != "BPE" or model.get("ignore_merges") or content["normalizer"] or not is_bytes:
        return None
    if not before:
        return "gpt-2" if last["use_regex"] or not model["merges"] else None
    is_known = len(before) == 1 and before[0].get("type") == "Split" and not last["use_regex"]
    return _WORDS.get(before[0]["pattern"].get("Regex", "")) if is_known else None
