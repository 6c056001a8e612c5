"""Hugging Face's models as oracles: their configs, and their weights or gradients under our names."""

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig


def gpt2_config(**sizes: Any) -> GPT2Config:
    return GPT2Config(**sizes, attn_implementation="eager")


def llama_config(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(**sizes, attn_implementation="eager", rms_norm_eps=1e-5)


def neox_config(**sizes: Any) -> GPTNeoXConfig:
    return GPTNeoXConfig(**sizes, attn_implementation="eager", hidden_act="gelu", use_parallel_residual=True)


def from_gpt2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2 keeps q, k and v in one matrix, and all matrices transposed (Conv1D)."""
    ours = {"embedding.weight": tensors["transformer.wte.weight"]}
    ours["position.embedding.weight"] = tensors["transformer.wpe.weight"]
    for name, tensor in tensors.items():
        if not name.startswith("transformer.h."):
            continue
        _, _, layer, part = name.split(".", 3)
        block, kind = f"blocks.{layer}.", part.rsplit(".", 1)[1]
        upright = tensor.T if tensor.ndim == 2 else tensor
        if part.startswith("attn.c_attn"):
            for letter, third in zip("qkv", upright.chunk(3), strict=True):
                ours[f"{block}attention.{letter}_proj.{kind}"] = third
        else:
            names = {
                "ln_1": "attention_norm",
                "ln_2": "feedforward_norm",
                "attn.c_proj": "attention.out_proj",
                "mlp.c_fc": "feedforward.up_proj",
                "mlp.c_proj": "feedforward.down_proj",
            }
            ours[f"{block}{names[part.rsplit('.', 1)[0]]}.{kind}"] = upright
    for kind in ("weight", "bias"):
        ours[f"final_norm.{kind}"] = tensors[f"transformer.ln_f.{kind}"]
    return ours


def from_llama(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same layout under other names."""
    names = {
        "model.embed_tokens.": "embedding.",
        "model.layers.": "blocks.",
        "model.norm.": "final_norm.",
        "lm_head.": "head.",
        "self_attn.": "attention.",
        "o_proj": "out_proj",
        "mlp.": "feedforward.",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "feedforward_norm",
    }
    return _renamed(tensors, names)


def from_neox(tensors: dict[str, Tensor], n_heads: int) -> dict[str, Tensor]:
    """GPT-NeoX keeps q, k and v of one head beside each other."""
    names = {
        "gpt_neox.embed_in.": "embedding.",
        "gpt_neox.layers.": "blocks.",
        "gpt_neox.final_layer_norm.": "final_norm.",
        "embed_out.": "head.",
        "lm_head.": "head.",
        "attention.dense.": "attention.out_proj.",
        "mlp.dense_h_to_4h.": "feedforward.up_proj.",
        "mlp.dense_4h_to_h.": "feedforward.down_proj.",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "feedforward_norm",
    }
    ours = _renamed(tensors, names)
    for name in [name for name in ours if "query_key_value" in name]:
        by_head = ours.pop(name).unflatten(0, (n_heads, 3, -1))
        for i, letter in enumerate("qkv"):
            ours[name.replace("query_key_value", f"{letter}_proj")] = by_head[:, i].flatten(0, 1)
    return ours


def _renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    ours = {}
    for name, tensor in tensors.items():
        if "rotary" in name:
            continue
        renamed = name
        for theirs, own in names.items():
            renamed = renamed.replace(theirs, own)
        ours[renamed] = tensor
    return ours


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters by name, each once (a tied head is left out)."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    return gradients
