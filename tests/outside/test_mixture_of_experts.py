"""A mixture of experts from outside: its numbers, its loss, the FLOPs of what is active."""

from pathlib import Path

import torch
from mixture_of_experts import MixtureOfExperts

from thunderhead.core import config
from thunderhead.lab.coordinate_check import changes
from thunderhead.options.mup import at_width

TOKENS = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(0))


def test_equals_its_formula_token_by_token() -> None:
    torch.manual_seed(0)
    layer, x = MixtureOfExperts(8, 12, False, n_experts=5, top_k=2, balance=0.5), torch.randn(2, 3, 8)
    y, terms = layer(x)
    counts, probabilities = torch.zeros(5), torch.zeros(5)
    for b in range(2):
        for t in range(3):
            p = (layer.router.weight @ x[b, t]).softmax(-1)
            first, second = p.argsort(descending=True)[:2].tolist()
            expected = sum(p[i] * layer.experts[i](x[b, t]) for i in (first, second)) / (p[first] + p[second])
            torch.testing.assert_close(y[b, t], expected)
            counts[[first, second]] += 1 / 12
            probabilities += p / 6
    torch.testing.assert_close(terms["balance"], 0.5 * 5 * (counts * probabilities).sum())


def test_its_term_is_in_the_loss(outside) -> None:
    decoder = outside("activation=mixture_of_experts", "activation.balance=0.1", "loss.z_loss=1e-3").train()
    terms = decoder(TOKENS[:, :-1], TOKENS[:, 1:])
    assert terms.auxiliary.keys() == {"balance", "z_loss"}
    assert 4 * 0.1 <= terms.auxiliary["balance"].item() < 4 * 0.2  # four layers, each a little above the least
    torch.testing.assert_close(terms.loss, terms.cross_entropy + sum(terms.auxiliary.values()))
    terms.auxiliary["balance"].backward(retain_graph=True)
    assert decoder.blocks[0].feedforward.router.weight.grad.any()


def test_flops_are_those_of_what_is_active(outside) -> None:
    settings = ("activation=mixture_of_experts", "model.d_ff=24", "activation.top_k=2")
    four, eight = (outside(*settings, f"activation.n_experts={n}") for n in (4, 8))
    expert, router = 3 * 32 * 24, 32
    dense = outside("activation=swiglu", "model.d_ff=24")
    assert four.forward_flops_per_token() == dense.forward_flops_per_token() + 2 * 4 * (expert + 4 * router)
    assert eight.forward_flops_per_token() == four.forward_flops_per_token() + 2 * 4 * 4 * router
    parameters = [decoder.parameter_counts()["feedforward"] for decoder in (four, eight)]
    assert parameters == [4 * (n * expert + n * router) for n in (4, 8)]


def test_its_activations_are_checked_at_several_widths() -> None:
    search = f"hydra.searchpath=[file://{Path(__file__).parent / 'conf'}]"
    composed = config.plain(
        config.compose([search, "activation=mixture_of_experts", "attention=mha"], "coordinate_check")
    )
    settings = {"steps": 1, "sequences": 2, "vocab_size": 61, "seeds": [1]}
    found = changes(composed, at_width, [32, 64], {}, **settings)
    assert set(found["block 0 feed-forward"]) == {32, 64}
