"""Parameter groups on a small decoder with everything that they must tell apart."""

from functools import partial

import pytest
import torch
from torch import nn

from thunderhead.core.model.attention import GroupedQueryAttention
from thunderhead.core.model.block import Block, ResidualDropout
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.feedforward import FeedForward
from thunderhead.core.model.loss import NextTokenLoss
from thunderhead.core.optim.parameter_groups import holds_matrices, parameter_groups
from thunderhead.options.activation_checkpointing import ActivationCheckpointing
from thunderhead.options.positions import LearnedPosition


class TinyDecoder(nn.Module):
    """The attributes that `parameter_groups` looks at: embedding, position, blocks, norm, head."""

    def __init__(self, tied: bool = False, bias: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.position = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.RMSNorm(4), "up_proj": nn.Linear(4, 8, bias=bias)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def named(model: nn.Module, groups: list[dict]) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


VECTORS = {
    "norm.weight",
    "norm.bias",
    *(f"blocks.{i}.{name}" for i in (0, 1) for name in ("norm.weight", "up_proj.bias")),
}
MATRICES = {"blocks.0.up_proj.weight", "blocks.1.up_proj.weight"}
TABLES = {"embedding.weight", "position.weight"}


def decay_of(groups: list[dict]) -> dict[str, float | None]:
    return {group["name"]: group.get("weight_decay") for group in groups}


def test_default_decays_every_matrix():
    model = TinyDecoder()
    groups = parameter_groups(model)
    assert named(model, groups) == {
        "matrices": MATRICES,
        "embeddings": TABLES | {"head.weight"},
        "vectors": VECTORS,
    }
    assert decay_of(groups) == {"matrices": None, "embeddings": None, "vectors": 0.0}


def test_without_decay_of_embeddings_an_untied_head_decays_still():
    model = TinyDecoder()
    groups = parameter_groups(model, decay_embeddings=False)
    assert named(model, groups) == {
        "matrices": MATRICES,
        "embeddings": {"head.weight"},
        "embeddings_no_decay": TABLES,
        "vectors": VECTORS,
    }
    assert decay_of(groups)["embeddings_no_decay"] == 0.0


def test_a_head_of_none_uses_the_embedding():
    model = TinyDecoder()
    model.head = None
    assert named(model, parameter_groups(model))["embeddings"] == TABLES


def test_a_tied_head_is_an_embedding_and_counted_once():
    model = TinyDecoder(tied=True)
    groups = parameter_groups(model, decay_embeddings=False)
    assert named(model, groups) == {"matrices": MATRICES, "embeddings_no_decay": TABLES, "vectors": VECTORS}


def test_patterns():
    model = TinyDecoder()
    groups = parameter_groups(model, no_decay=["head.*", "blocks.1.*"])
    assert named(model, groups) == {
        "matrices": {"blocks.0.up_proj.weight"},
        "matrices_no_decay": {"blocks.1.up_proj.weight"},
        "embeddings": TABLES,
        "embeddings_no_decay": {"head.weight"},
        "vectors": VECTORS,
    }
    assert [group["name"] for group in groups if holds_matrices(group)] == ["matrices", "matrices_no_decay"]


def test_a_pattern_may_mean_either_name_of_a_tied_weight():
    model = TinyDecoder(tied=True)
    for pattern in ("head.weight", "embedding.weight"):
        assert named(model, parameter_groups(model, no_decay=[pattern]))["embeddings_no_decay"] == {"embedding.weight"}


def test_a_pattern_without_a_match_is_refused_with_the_nearest_names():
    with pytest.raises(
        ValueError, match=r"parameter_groups\.no_decay: 'blocks\.\*\.up_porj\.weight' matches no param"
    ) as e:
        parameter_groups(TinyDecoder(), no_decay=["head.weight", "blocks.*.up_porj.weight"])
    assert "nearest: blocks.*.up_proj.weight, " in str(e.value)
    assert "\n" not in str(e.value)


def test_empty_groups_are_left_out():
    model = TinyDecoder(bias=False)
    model.blocks, model.norm = nn.ModuleList(), nn.Identity()
    assert [group["name"] for group in parameter_groups(model)] == ["embeddings"]


def test_frozen_parameters_are_in_no_group():
    model = TinyDecoder()
    model.embedding.weight.requires_grad_(False)
    groups = parameter_groups(model)
    assert named(model, groups)["embeddings"] == {"position.weight", "head.weight"}
    with pytest.raises(ValueError, match=r"parameter_groups\.no_decay: 'embedding\.weight'"):
        parameter_groups(model, no_decay=["embedding.weight"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", [{}, {"decay_embeddings": False}, {"no_decay": ["*weight"]}])
def test_each_parameter_exactly_once_on_the_meta_device_too(tied, settings):
    with torch.device("meta"):
        model = TinyDecoder(tied=tied)
    grouped = [id(p) for group in parameter_groups(model, **settings) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_the_order_is_that_of_the_model():
    model = TinyDecoder()
    for group in parameter_groups(model):
        order = [next(i for i, p in enumerate(model.parameters()) if p is q) for q in group["params"]]
        assert order == sorted(order)


def test_the_optimizers_own_weight_decay_holds_for_the_groups_that_decay():
    optimizer = torch.optim.AdamW(parameter_groups(TinyDecoder()), weight_decay=0.3)
    assert decay_of(optimizer.param_groups) == {"matrices": 0.3, "embeddings": 0.3, "vectors": 0.0}


def test_a_whole_lightning_module_is_the_programmers_mistake():
    with pytest.raises((AssertionError, AttributeError)):
        parameter_groups(nn.ModuleDict({"decoder": TinyDecoder()}))


@pytest.mark.parametrize("tied", [True, False])
def test_the_real_decoder(tied):
    model = Decoder(
        50,
        None,
        GroupedQueryAttention,
        LearnedPosition,
        partial(FeedForward, activation="gelu"),
        nn.LayerNorm,
        ResidualDropout,
        Block,
        NextTokenLoss,
        ActivationCheckpointing,
        n_layers=2,
        d_model=16,
        n_heads=2,
        context_length=8,
        tie_embeddings=tied,
        bias=True,
    )
    groups = named(model, parameter_groups(model, no_decay=["blocks.0.attention.*"]))
    tables = {"embedding.weight", "position.embedding.weight"}
    assert groups["embeddings"] == tables | (set() if tied else {"head.weight"})
    every = {name: p.ndim for name, p in model.named_parameters()}
    assert groups["vectors"] == {name for name, ndim in every.items() if ndim < 2}
    assert groups["matrices"] | groups["matrices_no_decay"] == {
        name for name, ndim in every.items() if ndim == 2 and name.startswith("blocks.")
    }
    assert all(name.startswith("blocks.0.attention.") for name in groups["matrices_no_decay"])
