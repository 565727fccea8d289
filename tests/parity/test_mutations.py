"""`compare` finds each of many single changes, and reports none between equal models that were built in two ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper, XTransformer

from benchmarks.hand_wired import HandWired
from palme_xt import PalmE, PalmEConfig
from palme_xt.parity import compare
from palme_xt.source import to_source
from palme_xt.strategies import configs
from tests.models import small
from tests.parity.mutations import CHANGES


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_found(name: str) -> None:
    first = small()
    report = compare(first, CHANGES[name](copy.deepcopy(first)))
    assert not report
    assert report.differences


def test_no_change_is_no_difference() -> None:
    first = small()
    report = compare(first, copy.deepcopy(first))
    assert report
    assert {outcome.result for outcome in report.outcomes.values()} == {"agrees"}


class Net(nn.Module):
    """A module that has nothing to do with x-transformers, with nested inputs and outputs."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.register_buffer("scale", torch.full((6,), 2.0), persistent=False)
        self.activation = nn.GELU()

    def forward(self, batch: dict[str, Tensor], shift: float = 0.0) -> dict[str, Any]:
        hidden = self.activation(self.norm(self.linear(batch["x"])) * self.scale)
        return {"hidden": [hidden, hidden.sum(-1)], "rows": len(hidden), "shift": shift, "nothing": None}


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(0))}


def changed_output(change: Callable[[dict[str, Any]], Any]) -> Callable[[Net], object]:
    return lambda net: net.register_forward_hook(lambda module, args, output: change(output))


OTHERS: dict[str, Callable[[Net], object]] = {
    "activation": lambda net: setattr(net, "activation", nn.ReLU()),
    "eps": lambda net: setattr(net.norm, "eps", 1e-4),
    "norm that stays in training mode": lambda net: setattr(net.norm, "train", lambda mode: net.norm),
    "buffer outside the state dict": lambda net: net.scale.mul_(2),
    "statistics in the state dict": lambda net: net.norm.running_mean.add_(1),  # type: ignore[union-attr]
    "item left out": changed_output(lambda output: {key: output[key] for key in ("hidden", "rows", "shift")}),
    "item more": changed_output(lambda output: output | {"more": 1}),
    "items in another order": changed_output(lambda output: output | {"hidden": output["hidden"][::-1]}),
    "other int": changed_output(lambda output: output | {"rows": 4}),
    "other float": changed_output(lambda output: output | {"shift": 1e-9}),
    "something for nothing": changed_output(lambda output: output | {"nothing": False}),
    "last number": changed_output(
        lambda output: output | {"hidden": [output["hidden"][0], output["hidden"][1] + 1e-6]}
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_each_change_to_any_other_module_is_found(name: str) -> None:
    first = Net()
    assert compare(first, copy.deepcopy(first), batch(), kwargs={"shift": 0.5})
    second = copy.deepcopy(first)
    OTHERS[name](second)
    report = compare(first, second, batch())
    assert not report
    assert report.differences


def net(**keywords: Any) -> TransformerWrapper:
    layers = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True, verbose=False, **keywords)
    return TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=layers)


def x_transformer(**keywords: Any) -> XTransformer:
    sizes = {"num_tokens": 20, "max_seq_len": 12, "depth": 2, "heads": 2}
    parts = {f"{part}_{name}": value for part in ("enc", "dec") for name, value in sizes.items()}
    return XTransformer(dim=16, **parts, **keywords)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (net, lambda: net(ff_relu_squared=True)),
        (lambda: net(cross_attend=True), lambda: net(cross_attend=True, cross_attn_qk_norm=True)),
        (lambda: net(cross_attend=True, cross_attn_dim_context=24), lambda: net(cross_attend=True)),
        (lambda: AutoregressiveWrapper(net()), lambda: AutoregressiveWrapper(net(), pad_value=3)),
        (lambda: AutoregressiveWrapper(net()), lambda: AutoregressiveWrapper(net(attn_qk_norm=True))),
        (lambda: small().encoder, lambda: small(encoder_kwargs={"ff_swish": True}).encoder),
        (x_transformer, lambda: x_transformer(enc_ff_swish=True)),
        (x_transformer, lambda: x_transformer(dec_ff_swish=True)),
    ],
)
def test_modules_of_upstream_alone(first: Callable[[], nn.Module], second: Callable[[], nn.Module]) -> None:
    assert compare(first(), first())
    assert not compare(first(), second())


def twin(config: PalmEConfig, how: str) -> Any:
    """Return a model of `config`, built in another way than from the config."""
    if how == "printed":
        program: dict[str, Any] = {}
        exec(to_source(config), program)
        return program["encoder"], program["decoder"]
    return HandWired(config) if how == "hand-wired" else copy.deepcopy(PalmE.from_config(config))


def equal_pair(config: PalmEConfig, how: str, seed: int) -> Any:
    """Assert that two models of `config` have no difference, and return the second one."""
    torch.manual_seed(seed)
    first, second = PalmE.from_config(config), twin(config, how)
    report = compare(first, second)
    assert report
    assert {check for check, outcome in report.outcomes.items() if outcome.result != "agrees"} <= {
        "buffers",
        "cached decoding",
    }
    return second


equal_pairs = given(configs(), st.sampled_from(["hand-wired", "printed", "copied"]), st.integers(0, 2**16))


@settings(max_examples=15)
@equal_pairs
def test_equal_models_have_no_difference(config: PalmEConfig, how: str, seed: int) -> None:
    second = equal_pair(config, how, seed)
    assert compare(second, second)


@pytest.mark.slow
@settings(max_examples=200)
@equal_pairs
def test_two_hundred_equal_models_have_no_difference(config: PalmEConfig, how: str, seed: int) -> None:
    equal_pair(config, how, seed)
