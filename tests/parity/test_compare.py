"""The parity report says which models agree, and names the first place where two models differ."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

from benchmarks.hand_wired import HandWired
from palme_xt import PalmE, PalmEConfig
from palme_xt.parity.comparison import CHECKS, Report, compare
from palme_xt.strategies import configs
from tests.models import batch, small


@given(configs())
def test_palme_and_the_hand_wired_model_agree_bitwise(config: PalmEConfig) -> None:
    torch.manual_seed(0)
    checks = [check for check in CHECKS if check != "cached decoding"]
    assert compare(PalmE.from_config(config), HandWired(config), checks=checks)


def test_where_upstream_crashes_the_report_says_so() -> None:
    model = small()
    report = compare(model, HandWired(model.config))
    assert not report
    found = report.differences.pop("cached decoding") or ""
    assert re.match("second crashes: RuntimeError: .* doesn't match the broadcast shape", found)
    assert report
    assert list(report.differences) == list(CHECKS[:-1])


def test_where_upstream_decodes_cached_decoding_agrees_too() -> None:
    for arguments in {"alibi_pos_bias": False}, {"rotary_xpos": False}:
        model = small(**arguments)
        assert compare(model, HandWired(model.config))


def test_the_first_different_parameter_is_named() -> None:
    report = compare(small(), small(decoder_dim=40))
    assert not report
    expected = "decoder.net.token_emb.emb.weight is (32, 32) in the first, (32, 40) in the second"
    assert report.differences == {"parameters": expected}
    report = compare(small(), small(vit_kwargs={"num_register_tokens": 1}))
    assert report.differences == {
        "parameters": "encoder.register_tokens is missing in the first, (1, 24) in the second"
    }


class Doubled(nn.Module):
    """A replacement for a layer that returns twice its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight = layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * nn.functional.linear(x, self.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["encoder.attn_layers.layers.2.1.to_q", "decoder.net.attn_layers.layers.4.1.to_v"])
def test_the_first_different_layer_is_named(name: str) -> None:
    first, second = small(), small()
    parent, child = name.rsplit(".", 1)
    setattr(second.get_submodule(parent), child, Doubled(second.get_submodule(name)))
    report = compare(first, second)
    assert re.match(
        rf"{re.escape(name)} differs by up to [\d.]+ \(values up to [\d.]+\)", report.differences["layers"] or ""
    )
    for check in "logits", "loss", "gradients", "cached decoding":
        assert "differs by up to" in (report.differences[check] or ""), check
    assert name in str(report)


def test_the_tolerance_is_absolute_and_bitwise_by_default() -> None:
    first, second = small(attn_flash=False), small(attn_flash=True)
    assert not compare(first, second)
    report = compare(first, second, tolerance=1e-3)
    assert report
    assert "agree within 0.001" in str(report)
    assert "agree bitwise" in str(compare(first, first))


def test_both_models_are_left_as_they_were() -> None:
    first, second = small(seed=0).train(), small(seed=1).train()
    second.encoder.eval()
    before = copy.deepcopy(second.state_dict())
    modes = [module.training for module in second.modules()]
    assert compare(first, second)
    assert all(torch.equal(value, before[name]) for name, value in second.state_dict().items())
    assert [module.training for module in second.modules()] == modes
    assert all(parameter.grad is None for model in (first, second) for parameter in model.parameters())


def test_tied_embeddings_and_given_inputs() -> None:
    model = small(transformer_kwargs={"tie_embedding": True}, rotary_xpos=False)
    img, text = batch(model, b=3, n=5)
    assert compare(model, HandWired(model.config), img, text)
    assert not compare(model, small(transformer_kwargs={"tie_embedding": True}, qk_norm=False), img, text)


def test_models_are_given_as_modules_or_pairs() -> None:
    model = small()
    assert compare((model.encoder, model.decoder), model)
    with pytest.raises(
        TypeError, match=r"Linear holds 0 ViTransformerWrapper and 0 AutoregressiveWrapper, must hold one"
    ):
        compare(model, nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"ModuleList holds 2 ViTransformerWrapper and 2 Autoreg"):
        compare(nn.ModuleList([model, small()]), model)


@pytest.mark.parametrize(
    "arguments",
    [
        {"transformer_kwargs": {"num_memory_tokens": 2}},
        {"max_seq_len": 1, "rotary_xpos": False},
        {"autoregressive_kwargs": {"pad_value": 3}},
        {"decoder_kwargs": {"only_cross": True}},
    ],
    ids=str,
)
def test_every_model_agrees_with_itself(arguments: dict[str, Any]) -> None:
    model = small(**arguments)
    assert compare(model, model)
    img, text = batch(model, b=2, n=5)
    text[0, 3:] = -100
    assert compare(model, model, torch.stack([img, -img], dim=1), text)
    assert compare(model.requires_grad_(False), model, checks=(check for check in CHECKS))


def test_bad_requests() -> None:
    model = small()
    with pytest.raises(TypeError, match=re.escape("a pair (AutoregressiveWrapper, ViTransformerWrapper) must be (enc")):
        compare((model.decoder, model.encoder), model)
    with pytest.raises(TypeError, match=re.escape("3 must be a module, or the pair (encoder, decoder)")):
        compare(3, model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checks has 'speed', must be some of parameters, layers"):
        compare(model, model, checks=["speed"])
    with pytest.raises(ValueError, match=re.escape("tolerance=-1 must be 0 (bitwise) or more")):
        compare(model, model, tolerance=-1)


def test_the_report_prints_well() -> None:
    report = Report({"loss": None, "logits": "logits differs by up to 2"}, tolerance=0.0)
    header, *rows = str(report).splitlines()
    assert header.startswith("x-transformers ")
    assert rows == ["loss    agree bitwise", "logits  logits differs by up to 2"]
