"""What the tests of the model compare with: attention as the papers write it, query by query; and helpers."""

import gc
import math
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

CONF = Path(__file__).parents[1] / "conf"


def options(group: str) -> list[str]:
    """All options of a config group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def values(group: str, option: str) -> Any:
    """An option's values, those it shares with others first."""
    own = OmegaConf.load(CONF / group / f"{option}.yaml")
    shared = [values(group, entry.removesuffix("@_here_")) for entry in own.pop("defaults", [])]
    return OmegaConf.merge(*shared, own)


def randomize(module: nn.Module, scale: float = 0.3) -> None:
    """Weights far from symmetric starting points (norms of 1, biases of 0), so that a wrong formula shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    documents: Tensor | None = None,
    slopes: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q (B, H, T, E), k (B, G, T, E), v (B, G, T, V) to (B, H, T, V): loops over sequences, heads and queries."""
    n_sequences, n_heads, n_tokens, head_dim = q.shape
    shared_by = n_heads // k.shape[1]
    result = torch.zeros(n_sequences, n_heads, n_tokens, v.shape[-1], dtype=q.dtype)
    for b in range(n_sequences):
        for h in range(n_heads):
            for i in range(n_tokens):
                seen = [
                    j
                    for j in range(i + 1)
                    if (window is None or i - j < window) and (documents is None or documents[b, i] == documents[b, j])
                ]
                scores = torch.stack([q[b, h, i] @ k[b, h // shared_by, j] / math.sqrt(head_dim) for j in seen])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if slopes is not None:
                    scores = scores - slopes[h] * torch.tensor([i - j for j in seen], dtype=q.dtype)
                result[b, h, i] = torch.softmax(scores, 0) @ v[b, h // shared_by, seen]
    return result


def naive_rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Rotate pairs (i, i + n) of the last dimension of x (B, H, T, 2n) as complex numbers; positions (B, T)."""
    n = frequencies.numel()
    turned = torch.complex(x[..., :n], x[..., n:])
    angles = positions[:, None, :, None].double() * frequencies.double()
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def naive_documents(tokens: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
    """Document numbers and positions by walking through each sequence."""
    documents, positions = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for b, row in enumerate(tokens.tolist()):
        document = position = 0
        for t, token in enumerate(row):
            documents[b, t], positions[b, t] = document, position
            position += 1
            if token == eos_id:
                document, position = document + 1, 0
    return documents, positions


def storages() -> dict[int, int]:
    """Bytes of every CPU storage that a tensor of this process lies in, by address, whoever holds the tensor."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]  # and not fake ones
    tensors = [t for t in tensors if not torch._C._functorch.is_batchedtensor(t)]  # left by a vmap; they have none
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
