import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from thunderhead.core.model import init
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.init import ResidualProjection, give_storage, initialize, without_parameters

# A normal distribution cut at ±3 standard deviations has 0.9866 of its standard deviation.
CUT = 0.98658


def weights(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in decoder.state_dict().items()}


def test_distributions(build: Callable[..., Decoder]) -> None:
    decoder = build("experiment=gpt2", "model.d_model=256", "model.n_layers=3", "model.init_std=0.05", vocab=512)
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            std = 0.05 / math.sqrt(6) if isinstance(module, ResidualProjection) else 0.05
            sample = module.weight
            # 5 standard errors of a standard deviation estimated from n values: 5 / sqrt(2 n)
            assert sample.std().item() == pytest.approx(CUT * std, rel=5 / math.sqrt(2 * sample.numel())), name
            assert abs(sample.mean().item()) < 5 * std / math.sqrt(sample.numel()), name
            assert sample.abs().max().item() <= 3 * std * (1 + 1e-6), name
        if isinstance(module, nn.Linear):
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert torch.all(module.weight == 1)
            assert not module.bias.any()
    residual = {name.split(".", 2)[-1] for name, m in decoder.named_modules() if isinstance(m, ResidualProjection)}
    assert residual == {"attention.out_proj", "feedforward.down_proj"}


def test_depth_scaling_can_be_left_out(build: Callable[..., Decoder]) -> None:
    scaled = build()
    plain = build("model.scale_residual_init=false")
    for name, tensor in scaled.state_dict().items():
        factor = 2.0 if name.endswith(("out_proj.weight", "down_proj.weight")) else 1.0  # sqrt(2 · 2 layers)
        torch.testing.assert_close(tensor * factor, plain.state_dict()[name])


def test_a_pure_function_of_seed_and_name(build: Callable[..., Decoder]) -> None:
    decoder = build()
    first = weights(decoder)
    torch.manual_seed(99)
    decoder.initialize(seed=1)
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(decoder).items())
    decoder.initialize(seed=2)
    assert not torch.equal(decoder.embedding.weight, first["embedding.weight"])
    assert not torch.equal(first["blocks.0.attention.q_proj.weight"], first["blocks.1.attention.q_proj.weight"])


def test_other_modules_do_not_shift_weights(build: Callable[..., Decoder]) -> None:
    few = weights(build("model.scale_residual_init=false"))
    more = build(
        "model.scale_residual_init=false",
        "model.n_layers=3",
        "block=peri",
        "position=learned",
        "model.tie_embeddings=false",
    )
    shared = few.keys() & more.state_dict().keys()
    assert len(shared) == len(few)
    assert all(torch.equal(few[name], more.state_dict()[name]) for name in shared)


@pytest.mark.parametrize(
    "other",
    [
        ("attention=mqa",),
        ("attention=gqa", "attention.n_kv_heads=2"),
        ("model.d_ff=136",),
        ("activation=swiglu", "model.d_ff=24"),
        ("model.d_model=48",),
        ("model.n_layers=3",),
        ("model.context_length=64", "position=learned"),
    ],
    ids=" ".join,
)
def test_models_of_other_shapes_share_what_both_have_room_for(
    other: tuple[str, ...], build: Callable[..., Decoder]
) -> None:
    base = ("attention=mha", "activation=gelu", "position=learned", "model.scale_residual_init=false")
    one, two = weights(build(*base)), weights(build(*base, *other))
    shared = 0
    for name in one.keys() & two.keys():
        common = tuple(slice(min(sizes)) for sizes in zip(one[name].shape, two[name].shape, strict=True))
        assert torch.equal(one[name][common], two[name][common]), name
        shared += one[name].shape != two[name].shape
    assert shared or "model.n_layers=3" in other


def test_draws_are_independent_and_of_a_truncated_normal_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against SciPy's, and no rank of correlation between neighbours in a row, in a column, or of another seed."""
    monkeypatch.setattr(init, "BLOCK", 5000)  # more than one
    matrices = []
    for seed in (1, 2):
        linear = nn.Linear(301, 400)
        initialize(linear, seed, std=1.0, n_layers=1, scale_residual=False)
        matrices.append(linear.weight.detach().double().numpy())
    sample = matrices[0]
    assert stats.kstest(sample.ravel(), stats.truncnorm(-3, 3).cdf).pvalue > 1e-3
    assert len(np.unique(sample)) > 0.99 * sample.size  # 23 bits a number
    neighbours = [(sample[:, :-1], sample[:, 1:]), (sample[:-1], sample[1:]), (sample[:, :150], sample[:, 150:300])]
    for a, b in [
        *neighbours,
        (sample, matrices[1]),
        (sample**2, matrices[1] ** 2),
        (sample[:-1] ** 2, sample[1:] ** 2),
    ]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / math.sqrt(a.size)


def test_the_same_after_meta(build: Callable[..., Decoder]) -> None:
    direct = weights(build("attention=mla", "position=learned", "norm=layernorm"))
    decoder = build("attention=mla", "position=learned", "norm=layernorm", device="meta").to_empty(device="cpu")
    decoder.initialize(seed=1)
    assert all(torch.equal(tensor, direct[name]) for name, tensor in decoder.state_dict().items())


def test_what_is_built_without_parameters_has_its_other_tensors() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.again = nn.Linear(3, 3), nn.Linear(3, 3)
            self.again.weight = self.linear.weight
            self.register_buffer("decay", torch.arange(3.0), persistent=False)
            self.plain = torch.ones(2)

    with without_parameters():
        module = Own()
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert module.again.weight is module.linear.weight
    give_storage(module, torch.device("cpu"))
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert (module.decay.tolist(), module.plain.tolist()) == ([0, 1, 2], [1, 1])
    assert nn.Linear(2, 2).weight.device.type == "cpu"  # outside of it all is as ever


def test_the_random_state_is_left_alone(build: Callable[..., Decoder]) -> None:
    decoder = build("norm=layernorm")
    state = torch.get_rng_state()
    decoder.initialize(seed=3)
    assert torch.equal(torch.get_rng_state(), state)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(5))
        self.shift = nn.Parameter(torch.empty(5))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gain)
        nn.init.ones_(self.shift)


def test_a_custom_module_resets_itself_reproducibly() -> None:
    model = nn.ModuleDict({"a": Custom(), "b": Custom()})
    gain = model["a"].gain
    initialize(model, 1, 0.02, 2, True)
    first, other = model["a"].gain.clone(), model["b"].gain.clone()
    assert model["a"].gain is gain, "optimizers and sharding hold on to the parameter itself"
    initialize(model, 1, 0.02, 2, True)
    assert torch.equal(model["a"].gain, first)
    assert not torch.equal(first, other)
    assert torch.all(model["a"].shift == 1)


def test_modules_that_cannot_be_initialised_are_named() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(5))

    class Forgetful(Custom):
        def reset_parameters(self) -> None:
            nn.init.ones_(self.gain)

    with pytest.raises(
        ValueError, match=r"cannot initialise x \(Silent\): it has parameters \(gain\) and no reset_param"
    ):
        initialize(nn.ModuleDict({"x": Silent()}), 1, 0.02, 2, True)
    with pytest.raises(ValueError, match=r"cannot initialise x \(Forgetful\): its reset_parameters\(\) leaves 'shift'"):
        initialize(nn.ModuleDict({"x": Forgetful()}), 1, 0.02, 2, True)


def test_a_sharded_parameter_gets_its_slice_of_the_same_tensor(build: Callable[..., Decoder]) -> None:
    """As rank 1 of 2, in a process group that only pretends to communicate: initialisation must not need to."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    full = weights(build("norm=layernorm"))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        decoder = build("norm=layernorm", device="meta")
        fully_shard(decoder, mesh=init_device_mesh("cpu", (2,)))
        decoder.to_empty(device="cpu")
        decoder.initialize(seed=1)
        for name, parameter in decoder.named_parameters():
            assert isinstance(parameter, DTensor)
            expected = full[name].chunk(2)  # rows are sharded; an odd one goes to rank 0
            assert torch.equal(parameter.to_local(), expected[1]), name
    finally:
        torch.distributed.destroy_process_group()


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def test_what_has_no_rule_is_told_before_weights_are_there() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), Bare())
    with pytest.raises(ValueError, match=r"cannot initialise 2 \(Bare\): it has parameters \(scale\)"):
        init.refuse_without_rule(model)
    init.refuse_without_rule(model[:2])
