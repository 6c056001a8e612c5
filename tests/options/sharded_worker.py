"""One of two processes that train the same small model whole and sharded (FSDP2), with every optimizer option.

Started by test_sharded.py: `python sharded_worker.py RANK FOLDER`. Rank 0 writes the differences to FOLDER/result.json.
"""

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from thunderhead.core.components import factory
from thunderhead.core.optim.parameter_groups import parameter_groups
from thunderhead.options.adafactor import Adafactor

CONF = Path(__file__).parents[2] / "conf"


class Model(nn.Module):
    """Uneven sizes on purpose: 5 and 9 rows over two processes, and a vector of 3."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 6)
        self.up = nn.Linear(6, 5)
        self.down = nn.Linear(5, 3)
        self.head = nn.Linear(3, 9, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.embedding(tokens)).tanh()))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model: Model, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for seed in steps:
        tokens = torch.randint(9, (16,), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens.roll(1)).backward()
        optimizer.step()


def difference(model: Model, other: Model) -> float:
    """Largest difference of any parameter, relative to the way that the parameter has made, as a matrix norm."""
    return max(
        float((whole(a.detach()) - whole(b.detach())).norm() / (whole(b.detach()) - start.detach()).norm())
        for a, b, start in zip(model.parameters(), other.parameters(), Model().parameters(), strict=True)
    )


def compare(option: str, mesh: Any) -> dict[str, Any]:
    node = yaml.safe_load((CONF / "optimizer" / f"{option}.yaml").read_text())

    def sharded_model() -> Model:
        model = Model()
        fully_shard(model, mesh=mesh)
        return model

    plain, sharded, resumed = Model(), sharded_model(), sharded_model()
    models = (plain, sharded, resumed)
    optimizers = [factory(node)(parameter_groups(model)) for model in models]
    train(plain, optimizers[0], range(6))
    train(sharded, optimizers[1], range(3))

    train(resumed, optimizers[2], range(70, 71))
    resumed.load_state_dict(sharded.state_dict())
    saved = deepcopy(get_optimizer_state_dict(sharded, optimizers[1]))  # the first optimizer goes on in place
    set_optimizer_state_dict(resumed, optimizers[2], saved)

    train(sharded, optimizers[1], range(3, 6))
    train(resumed, optimizers[2], range(3, 6))
    state = [v for per_parameter in optimizers[1].state.values() for v in per_parameter.values()]
    return {
        "sharded": difference(sharded, plain),
        "resumed": difference(resumed, sharded),
        "partial": any(p.is_partial() for v in state if isinstance(v, DTensor) for p in v.placements),
        "groups": [group["name"] for group in optimizers[1].param_groups],
    }


def tensor_parallel_adafactor(mesh: Any) -> float:
    """The largest difference between a matrix sharded by columns, by rows, and not at all."""
    random = torch.Generator().manual_seed(3)
    start, gradients = torch.randn(5, 7, generator=random), torch.randn(4, 5, 7, generator=random)
    results = []
    for placement in (None, Shard(0), Shard(1)):
        place = (lambda t: t) if placement is None else (lambda t, p=placement: distribute_tensor(t, mesh, [p]))
        parameter = nn.Parameter(place(start.clone()))
        optimizer = Adafactor([parameter], weight_decay=0.1)
        for gradient in gradients:
            parameter.grad = place(gradient.clone())
            optimizer.step()
        results.append(whole(parameter.detach()))
    return max(float((result - results[0]).abs().max()) for result in results[1:])


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    options = sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml"))
    result: dict[str, Any] = {option: compare(option, mesh) for option in options}
    result["tensor_parallel_adafactor"] = tensor_parallel_adafactor(mesh)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
