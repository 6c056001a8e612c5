"""A decoder's weights as classes of transformers keep them, under their names already: in another order, joined, moved.

Each takes the decoder and the weights, and changes neither.

Shape letters: E dimensions of a head.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


def transposed(decoder: Any, weights: Weights) -> Weights:
    """GPT-2 has q, k and v in one matrix, and keeps matrices of layers as (in, out)."""
    both = joined("c_attn")(decoder, weights)
    is_matrix = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
    return {name: tensor.T.contiguous() if is_matrix.search(name) else tensor for name, tensor in both.items()}


def joined(name: str) -> Callable[[Any, Weights], Weights]:
    """Q, k and v in one matrix, one below the other."""

    def join(decoder: Any, weights: Weights) -> Weights:
        out = dict(weights)
        for kind in ("weight", "bias"):
            for q in [key for key in weights if key.endswith(f"q_proj.{kind}")]:
                parts = [out.pop(q.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
                out[q.replace("q_proj", name)] = torch.cat(parts)
        return out

    return join


def by_head(decoder: Any, weights: Weights) -> Weights:
    """GPT-NeoX has q, k and v of each head beside each other."""
    both, head_dim = joined("query_key_value")(decoder, weights), decoder.mixers[0].head_dim

    def reordered(tensor: Tensor) -> Tensor:
        return tensor.view(3, -1, head_dim, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2)

    return {name: reordered(tensor) if "query_key_value" in name else tensor for name, tensor in both.items()}


def interleaved(decoder: Any, weights: Weights) -> Weights:
    """Cohere rotates the pairs (2i, 2i + 1) of a head, ours (i, i + E/2)."""
    head_dim, rotated = decoder.mixers[0].head_dim, re.compile(r"[qk]_proj\.(weight|bias)$")
    return {name: _pairs(tensor, head_dim) if rotated.search(name) else tensor for name, tensor in weights.items()}


def _pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows (i, i + E/2) of each head, one after the other."""
    return tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:]).transpose(1, 2).flatten(0, 2)


def deepseek_v2_weights(decoder: Any, weights: Weights) -> Weights:
    """It rotates as Cohere does, the last dimensions of each query head, and of what keys are made of."""
    mixer, out = decoder.mixers[0], {}
    rows = {"q_proj": mixer.head_dim, "kv_a_proj_with_mqa": mixer.kv_lora_rank + mixer.rotary_dim}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        if module in rows:
            parts = tensor.view(-1, rows[module], *tensor.shape[1:])
            nope, rope = parts.tensor_split([rows[module] - mixer.rotary_dim], 1)
            rope = _pairs(rope.flatten(0, 1), mixer.rotary_dim).view_as(rope)
            out[name] = torch.cat((nope, rope), 1).flatten(0, 1)
        else:
            out[name] = tensor
    return {name.replace("q_proj", "q_b_proj"): t for name, t in out.items()} if mixer.q_lora_rank else out


def norms_less_one(decoder: Any, weights: Weights) -> Weights:
    """Gemma and Nemotron keep a norm's weights without the 1 that they are around."""
    return {name: t - 1 if re.search(r"norm\w*\.weight$", name) else t for name, t in weights.items()}


def gemma2_weights(decoder: Any, weights: Weights) -> Weights:
    """It multiplies embeddings by sqrt(D), rounded to their dtype: float32's here."""
    normalizer = torch.tensor(decoder.embedding.embedding_dim**0.5)
    name = "model.embed_tokens.weight"
    return norms_less_one(decoder, weights | {name: weights[name] / normalizer})


def opt_weights(decoder: Any, weights: Weights) -> Weights:
    """Its table of positions begins with two rows for padding."""
    name = "model.decoder.embed_positions.weight"
    return weights | {name: F.pad(weights[name], (0, 0, 2, 0))}
