"""Which parameters decay, and which are matrices: the one place that sorts a model's parameters for its optimizer."""

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

GROUPS = ("matrices", "matrices_no_decay", "embeddings", "embeddings_no_decay", "vectors")


def parameter_groups(
    model: nn.Module, *, decay_embeddings: bool = True, no_decay: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Sort a decoder's trainable parameters into groups for a `torch.optim.Optimizer`, each (tied ones, too) into one.

    - `matrices`: what has two or more dimensions and is none of the following; decays.
    - `embeddings`: every `nn.Embedding` table (tokens, learned positions) and the weight of `model.head`; decays, the
      tables only with `decay_embeddings`. An untied head is a projection and not a table: it decays either way.
    - `vectors`: what has fewer than two dimensions (norm scales, biases); never decays.
    - `matrices_no_decay`, `embeddings_no_decay`: the part of the two that does not decay.

    A group that decays says nothing about weight decay, so the optimizer's own `weight_decay` holds; the others carry
    `weight_decay: 0.0`. Works on meta and DTensor parameters alike.

    - decay_embeddings: decay the embedding tables (nanoGPT) or do not (OLMo 2).
    - no_decay: fnmatch patterns of further parameter names that do not decay (`blocks.*.attention.*`).

    Returns dicts with `name` and `params`, and `weight_decay` where it is 0; in the order of GROUPS, none empty.
    Raises ValueError if a pattern in `no_decay` matches no trainable parameter.
    """
    # The parameter itself: what a module computes with as self.weight may be a view (bfloat16, or gathered).
    tables = {id(module._parameters["weight"]) for module in model.modules() if isinstance(module, nn.Embedding)}
    head_weight = None if model.head is None else model.head._parameters["weight"]  # type: ignore[union-attr]
    # A tied weight has two names, and a pattern may mean either.
    names = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    undecayed = {id(names[name]) for pattern in no_decay for name in _matches(pattern, names)}
    undecayed |= set() if decay_embeddings else tables

    sorted_by_name: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):  # each shared parameter once
        name = "embeddings" if id(parameter) in tables or parameter is head_weight else "matrices"
        name += "_no_decay" if id(parameter) in undecayed else ""
        sorted_by_name[name if parameter.ndim >= 2 else "vectors"].append(parameter)
    return [
        {"name": name, "params": params} | ({} if name in ("matrices", "embeddings") else {"weight_decay": 0.0})
        for name, params in sorted_by_name.items()
        if params
    ]


def holds_matrices(group: dict[str, Any]) -> bool:
    """Whether a group made by `parameter_groups` holds hidden matrices, decayed or not."""
    return group.get("name") in ("matrices", "matrices_no_decay")


def _matches(pattern: str, names: Iterable[str]) -> list[str]:
    matching = [name for name in names if fnmatchcase(name, pattern)]
    if not matching:
        # The layers' numbers as `*`: three suggestions then differ by more than the layer.
        known = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.0)
        raise ValueError(f"parameter_groups.no_decay: {pattern!r} matches no parameter; nearest: {', '.join(near)}")
    return matching
