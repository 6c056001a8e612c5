"""The named sizes: published parameter counts, exactly."""

from collections.abc import Callable

import pytest
import torch
from hugging_face import gpt2_config, llama_config, neox_config
from omegaconf import DictConfig
from transformers import GPT2LMHeadModel, GPTNeoXForCausalLM, LlamaForCausalLM, PreTrainedModel

from oracles import options
from thunderhead.core.model.decoder import Decoder

LLAMA_160M = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LLAMA_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_70B = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
PYTHIA_160M = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 50304,
    "tie_word_embeddings": False,
}
# overrides, published count (model cards; GPT-2's by its checkpoints), Hugging Face's model of the published config
PUBLISHED: dict[str, tuple[list[str], int, Callable[[], PreTrainedModel]]] = {
    "gpt2-124m": (["experiment=gpt2"], 124_439_808, lambda: GPT2LMHeadModel(gpt2_config())),
    "gpt2-350m": (
        ["experiment=gpt2"],
        354_823_168,
        lambda: GPT2LMHeadModel(gpt2_config(n_embd=1024, n_layer=24, n_head=16)),
    ),
    "gpt2-774m": (
        ["experiment=gpt2"],
        774_030_080,
        lambda: GPT2LMHeadModel(gpt2_config(n_embd=1280, n_layer=36, n_head=20)),
    ),
    "gpt2-1.5b": (
        ["experiment=gpt2"],
        1_557_611_200,
        lambda: GPT2LMHeadModel(gpt2_config(n_embd=1600, n_layer=48, n_head=25)),
    ),
    "llama-160m": (["experiment=llama"], 162_417_408, lambda: LlamaForCausalLM(llama_config(**LLAMA_160M))),
    "llama-1b": (["experiment=llama-1b"], 1_235_814_400, lambda: LlamaForCausalLM(llama_config(**LLAMA_1B))),
    "llama-7b": (["experiment=llama"], 6_738_415_616, lambda: LlamaForCausalLM(llama_config())),
    "llama-70b": (["experiment=llama-70b"], 70_553_706_496, lambda: LlamaForCausalLM(llama_config(**LLAMA_70B))),
    "pythia-160m": (["experiment=pythia"], 162_322_944, lambda: GPTNeoXForCausalLM(neox_config(**PYTHIA_160M))),
}


def test_every_published_shape_is_checked() -> None:
    assert {*options("model")} == {*PUBLISHED, "nano", "micro"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_count(build: Callable[..., Decoder], name: str) -> None:
    overrides, count, hugging_face = PUBLISHED[name]
    decoder = build(f"model={name}", *overrides, tiny=False, device="meta", vocab=100)
    assert decoder.parameter_counts()["total"] == count
    with torch.device("meta"):
        assert hugging_face().num_parameters() == count
    if name != "llama-7b":
        return
    assert decoder.context_length == 4096


RECIPES = [
    name
    for name in options("experiment")
    if not name.startswith("ablation_")
    and name not in ("synthetic", "shakespeare_char", "mup_transfer", "scaling_law", "ladder")
]


@pytest.mark.parametrize("experiment", RECIPES)
def test_recipes_build_and_train_at_tiny_size(build: Callable[..., Decoder], experiment: str) -> None:
    published = experiment in ("llama-1b", "llama-70b")
    overrides = ["model.vocab_size=null", "model.d_ff=null", "attention.n_kv_heads=2"] if published else []
    decoder = build(f"experiment={experiment}", *overrides).train()
    tokens = torch.randint(61, (2, 17))
    decoder(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_what_the_recipes_choose(compose_model: Callable[..., DictConfig]) -> None:
    palm, modern, pythia = (compose_model(f"experiment={name}") for name in ("palm", "modern", "pythia"))
    assert (palm.attention.n_kv_heads, palm.block.shared_norm, palm.norm.bias) == (1, True, False)
    assert (modern.attention.n_kv_heads, modern.attention.qk_norm) == (0.5, True)
    assert (pythia.block.shared_norm, pythia.position.fraction) == (False, 0.25)
