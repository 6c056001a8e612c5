"""A pattern of layers from outside: who sees whom in each, positions, cache, FLOPs."""

import pytest
import torch

from thunderhead.release.sample import generate

OPTIONS = ("attention=local_global", "attention.window=4", "attention.global_every=2")
TOKENS = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(0))


def seen_by_last(decoder, layer: int) -> list[int]:
    """Which of 16 inputs the last output of a layer depends on."""
    x = torch.randn(1, 16, 32, requires_grad=True)
    block, context = decoder.blocks[layer], decoder.contexts(TOKENS[:1])[layer]
    block(x, context)[0, -1].sum().backward()
    return x.grad[0].abs().sum(dim=-1).nonzero().flatten().tolist()


def test_local_and_global_layers_take_turns(outside) -> None:
    decoder = outside(*OPTIONS)
    assert [seen_by_last(decoder, i) for i in range(4)] == [[12, 13, 14, 15], [*range(16)]] * 2


def test_global_layers_know_no_positions(outside) -> None:
    """Without them attention is a sum over a set: what the last token gets is the same when others change places."""
    decoder = outside(*OPTIONS).double()
    x, shuffled = torch.randn(1, 16, 32).double(), torch.tensor([*torch.randperm(15).tolist(), 15])
    contexts = decoder.contexts(TOKENS[:1])
    for index, same in ((1, True), (0, False)):
        mixer, context = decoder.mixers[index], contexts[1]._replace(rotation=contexts[index].rotation)
        last, other = mixer(x, context)[0, -1], mixer(x[:, shuffled], context)[0, -1]
        assert torch.allclose(last, other) is same


def test_text_with_its_cache_is_text_without(outside, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = outside(*OPTIONS, "attention.n_kv_heads=2").double()
    cached = generate(decoder, TOKENS[:, :3], 20, seed=3)
    monkeypatch.setattr(type(decoder), "new_cache", lambda *_: None)
    assert torch.equal(cached, generate(decoder, TOKENS[:, :3], 20, seed=3))


def test_what_it_costs(outside) -> None:
    decoder, all_global = outside(*OPTIONS), outside("attention=mha")
    scores = 4 * 16 * 32  # of a global layer; a local one has 4 keys instead of 16
    assert all_global.forward_flops_per_token() - decoder.forward_flops_per_token() == 2 * (scores - scores // 4)
    assert decoder.cache_bytes_per_token() == 2 * 2 * 32 * 2 * (1 + 4 / 16)
