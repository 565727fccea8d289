"""The layer norm in one pass, and that upstream's still takes two."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from x_transformers import x_transformers as upstream

from palme_xt.parity import exactly
from palme_xt.upstream.norm import LayerNorm
from tests.models import small


def pair(*, unit_offset: bool = True) -> tuple[LayerNorm, upstream.LayerNorm]:
    """Return a layer norm, and that of upstream with the same weights."""
    torch.manual_seed(0)
    theirs = upstream.LayerNorm(12, unit_offset=unit_offset)
    nn.init.normal_(theirs.gamma)
    return LayerNorm(copy.deepcopy(theirs)), theirs


def results(norm: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of the input and of the weight."""
    x = x.clone().requires_grad_()
    out = norm(x)
    return [out, *torch.autograd.grad((out * torch.arange(12)).sum(), [x, *norm.parameters()])]


@pytest.mark.parametrize("unit_offset", [False, True])
def test_it_is_upstreams_up_to_rounding(unit_offset: bool) -> None:
    ours, theirs = pair(unit_offset=unit_offset)
    other, _ = pair(unit_offset=not unit_offset)
    x = 3 * torch.randn(2, 5, 12)
    torch.testing.assert_close(results(ours, x), results(theirs, x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(other(x), theirs(x), atol=0.1)
    with exactly():
        assert all(map(torch.equal, results(ours, x), results(theirs, x)))


def test_it_has_upstreams_state_and_can_be_pickled() -> None:
    ours, theirs = pair()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(3, 12)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))


def test_every_layer_norm_of_the_layers_is_replaced() -> None:
    model = small()
    layers = [model.encoder.attn_layers, model.decoder.net.attn_layers]
    norms = [norm for part in layers for norm in part.modules() if isinstance(norm, upstream.LayerNorm)]
    assert len(norms) == 12
    assert {type(module) for module in norms} == {LayerNorm}
    others = small(encoder_kwargs={"use_rmsnorm": True}, decoder_kwargs={"use_rmsnorm": True})
    assert not any(isinstance(module, LayerNorm) for module in others.modules())


def kept(norm: nn.Module, x: Tensor) -> int:
    """Return how many tensors as large as `x` a norm keeps for its backward pass."""
    found: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x)
    return len({tensor.data_ptr() for tensor in found if tensor.shape == x.shape})


def test_upstream_still_keeps_one_tensor_more() -> None:
    ours, theirs = pair()
    x = torch.randn(2, 5, 12, requires_grad=True)
    assert kept(ours, x) == 1
    assert kept(theirs, x) == 2
