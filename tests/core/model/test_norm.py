import pytest
import torch
from torch import nn

from thunderhead.core.model.norm import normalize


@pytest.mark.parametrize("norm", [nn.RMSNorm(16, eps=1e-5), nn.LayerNorm(16)])
def test_bfloat16_is_normalised_in_float32(norm: nn.Module) -> None:
    x = torch.randn(3, 16).bfloat16()
    assert torch.equal(normalize(norm, x), norm(x.float()))


def test_a_norm_without_weights_takes_x_as_it_is() -> None:
    x = torch.randn(3, 16).bfloat16()
    assert normalize(nn.RMSNorm(16, elementwise_affine=False), x).dtype == torch.bfloat16
