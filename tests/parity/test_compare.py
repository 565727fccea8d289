"""The parity report says which models agree, and names the first place where two models differ."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.hand_wired import HandWired
from palme_xt import PalmE
from palme_xt.parity.comparison import CHECKS, Outcome, Report, compare
from tests.models import SMALL, batch, small


def test_where_upstream_crashes_the_report_says_so() -> None:
    model = small()
    report = compare(model, HandWired(model.config))
    assert report
    assert list(report.outcomes) == list(CHECKS)
    result, reason = report.outcomes.pop("cached decoding")
    assert result == "could not be checked"
    assert re.match("the second raises RuntimeError: .* doesn't match the broadcast shape", reason)
    assert {outcome.result for outcome in report.outcomes.values()} == {"agrees"}


def test_a_hand_wired_model_agrees_with_itself_where_its_cache_crashes() -> None:
    hand_wired = HandWired(small().config)
    report = compare(hand_wired, hand_wired)
    assert report
    assert re.match("both raise RuntimeError: .* broadcast shape", report.outcomes["cached decoding"].reason)
    assert not compare(hand_wired, hand_wired, checks=["parameters", "cached decoding"])


def test_where_upstream_decodes_cached_decoding_agrees_too() -> None:
    for arguments in {"alibi_pos_bias": False}, {"rotary_xpos": False}:
        model = small(**arguments)
        report = compare(model, HandWired(model.config))
        assert report.outcomes["cached decoding"].result == "agrees"


def test_the_first_different_parameter_is_named() -> None:
    report = compare(small(), small(decoder_dim=40))
    assert not report
    name, dtype = "decoder.net.token_emb.emb.weight", "torch.float32"
    expected = f"{name} is (32, 32) {dtype} in the first, (32, 40) {dtype} in the second"
    assert report.differences == {"parameters": expected}
    assert list(report.outcomes) == ["parameters"]
    report = compare(small(), small(vit_kwargs={"num_register_tokens": 1}))
    assert report.differences == {"parameters": "encoder.register_tokens is only in the second"}


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
    assert re.match(rf"{re.escape(name)} differs by up to [\d.]+ \(values up to [\d.]+\)", report.differences["layers"])
    for check in "logits", "outputs", "gradients", "cached decoding":
        assert "differs by up to" in report.differences[check], check
    assert name in str(report)


def test_the_tolerance_is_absolute_and_bitwise_by_default() -> None:
    first, second = small(attn_flash=False), small(attn_flash=True)
    assert not compare(first, second)
    report = compare(first, second, tolerance=1e-3)
    assert report
    assert "agrees within 0.001" in str(report)
    assert "agrees bitwise" in str(compare(first, first))


def test_both_models_are_left_as_they_were() -> None:
    first, second = small(seed=0).train(), small(seed=1).train()
    for model in first, second:
        model.norm = nn.BatchNorm1d(24)
        model.encoder.attn_layers.register_forward_hook(
            lambda module, args, output, norm=model.norm: norm(output.transpose(1, 2)).transpose(1, 2)
        )
    second.encoder.eval()
    before = [copy.deepcopy(model.state_dict()) for model in (first, second)]
    modes = [module.training for module in second.modules()]
    states = torch.get_rng_state(), random.getstate()
    assert compare(first, second, checks=["layers", "outputs", "gradients"])
    assert (torch.equal(torch.get_rng_state(), states[0]), random.getstate() == states[1]) == (True, True)
    for model, state in zip((first, second), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in second.modules()] == modes
    assert not first.decoder.exact


def test_tied_embeddings_and_given_inputs() -> None:
    model = small(transformer_kwargs={"tie_embedding": True}, rotary_xpos=False)
    img, text = batch(model, b=3, n=5)
    assert compare(model, HandWired(model.config), img, text)
    assert not compare(model, small(transformer_kwargs={"tie_embedding": True}, qk_norm=False), img, text)


class Reader(nn.Module):
    """A model wired by hand, whose parts have other names than in `PalmE`."""

    def __init__(self, vit: nn.Module, lm: nn.Module) -> None:
        super().__init__()
        self.vit, self.lm = vit, lm

    def forward(self, img: torch.Tensor, text: torch.Tensor) -> Any:
        return self.lm(text, context=self.vit(img, return_embeddings=True))


class Flipped(Reader):
    def forward(self, img: torch.Tensor, text: torch.Tensor) -> Any:
        return self.lm(text, context=self.vit(img, return_embeddings=True).flip(1))


def test_models_are_given_as_modules_or_pairs_and_name_their_parts_as_they_like() -> None:
    model = small(rotary_xpos=True, alibi_pos_bias=False)
    other = HandWired(model.config)
    for second in (other.encoder, other.decoder), Reader(other.encoder, other.decoder):
        report = compare(model, second)
        assert {outcome.result for outcome in report.outcomes.values()} == {"agrees"}
    report = compare(model, Flipped(other.encoder, other.decoder))
    assert re.match(r"decoder\.net\.attn_layers\.layers\.1\.1\.to_k differs", report.differences["layers"])
    report = compare(model, Reader(other.encoder, small(alibi_pos_bias=False, decoder_dim=40).decoder))
    assert report.differences["parameters"].startswith("decoder.net.token_emb.emb.weight is (32, 32)")
    bare = small(alibi_pos_bias=False).decoder.net
    assert compare(model, Reader(other.encoder, bare), checks=["parameters", "buffers"])
    assert compare(Reader(other.encoder, bare), Reader(other.encoder, bare), *batch(model))
    img, text = batch(model)
    assert compare(model, (other.encoder, other.decoder), torch.stack([img, -img], dim=1), text)


class Swapped(Reader):
    def forward(self, text: torch.Tensor, img: torch.Tensor, scale: torch.Tensor) -> Any:  # type: ignore[override]
        return self.lm(text, context=self.vit(img, return_embeddings=True) * scale)


def test_inputs_that_cannot_be_drawn_must_be_passed() -> None:
    model = small()
    img, text = batch(model)
    with pytest.raises(
        TypeError, match=r"no inputs can be drawn for Linear, it must be .*: compare\(first, second, \*in"
    ):
        compare(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(
        TypeError, match=r"no inputs can be drawn for ModuleList, it must .* hold one ViTransformerWrapper"
    ):
        compare(nn.ModuleList([model, small()]), model)
    swapped = Swapped(model.encoder, model.decoder)
    message = r"Swapped\.forward\(text: .*\) -> .* does not take the inputs drawn for the first model: pass"
    with pytest.raises(TypeError, match=message):
        compare(swapped, swapped)
    assert compare(swapped, swapped, text, img, torch.ones(()))
    assert compare(swapped, swapped, text, kwargs={"img": img, "scale": torch.ones(())})
    assert compare(nn.Linear(2, 2), nn.Linear(2, 2), torch.randn(3, 2))


def test_bfloat16_and_float64_agree_within_rounding_and_not_bitwise() -> None:
    torch.manual_seed(0)
    model = PalmE(**SMALL)
    for dtype in torch.bfloat16, torch.float64:
        other = copy.deepcopy(model).to(dtype)
        assert compare(other, other)
        for first, second in (model, other), (other, model):
            assert "pos_embedding is (1, 4, 24) torch." in compare(first, second).differences["parameters"]
            report = compare(first, second, tolerance=None)
            assert {outcome.result for outcome in report.outcomes.values()} == {"agrees"}
            assert "agrees within rounding" in str(report)
        assert not compare(model, other, tolerance=1e-12)
        flags = PalmE(**SMALL | {"qk_norm": False}).to(dtype)
        assert not compare(model, flags, tolerance=None)
    assert not compare(model, PalmE(**SMALL | {"attn_flash": False}))
    assert compare(model, PalmE(**SMALL | {"attn_flash": False}), tolerance=None)


class Lossy(nn.Linear):
    """A model that raises errors, returns nan, or returns nothing."""

    behaviour: Any = None

    def forward(self, x: torch.Tensor) -> Any:
        if isinstance(self.behaviour, Exception):
            raise self.behaviour
        return super().forward(x) if self.behaviour is None else self.behaviour(super().forward(x))


def lossy(behaviour: Any = None) -> Lossy:
    model = Lossy(2, 2)
    model.behaviour = behaviour
    return model


def test_what_could_not_be_checked_is_not_true() -> None:
    x = torch.randn(3, 2)
    assert compare(lossy(), lossy(), x)
    report = compare(lossy(ValueError("no")), lossy(ValueError("no")), x)
    assert not report
    assert not report.differences
    assert report.outcomes["outputs"] == ("could not be checked", "both raise ValueError: no")
    for raised, reason in {
        ValueError("yes"): "the first raises ValueError: no; the second raises ValueError: yes"
    }.items():
        assert compare(lossy(ValueError("no")), lossy(raised), x).differences["outputs"] == reason
    assert compare(lossy(), lossy(ValueError("no")), x).differences["outputs"] == "the second raises ValueError: no"
    nan = lossy(lambda y: y * torch.nan)
    assert compare(nan, nan, x).outcomes["outputs"] == ("could not be checked", "the output has nan in both")
    assert not compare(nan, nan, x)
    assert "differs by up to nan" in compare(lossy(), nan, x).differences["outputs"]
    nothing = lossy(lambda y: None)
    assert not compare(nothing, nothing, x)
    assert compare(nothing, nothing, x, checks=["parameters"])
    infinite = lossy(lambda y: y.masked_fill(y > 0, torch.inf))
    assert compare(infinite, infinite, x)
    assert not compare(nn.GELU(), nn.GELU(), x, checks=["parameters", "buffers"])
    assert compare(nn.GELU(), nn.GELU(), x)


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
    for checks in [["speed"], []]:
        message = re.escape(f"checks={tuple(checks)} must be at least one of parameters, buffers, layers")
        with pytest.raises(ValueError, match=message):
            compare(model, model, checks=checks)
    with pytest.raises(ValueError, match=re.escape("tolerance=-1 must be 0 (bitwise) or more, or None")):
        compare(model, model, tolerance=-1)


def test_the_report_prints_well() -> None:
    outcomes = {
        "outputs": Outcome("agrees"),
        "logits": Outcome("differs", "logits differs by up to 2"),
        "buffers": Outcome("could not be checked", "there is nothing to compare"),
    }
    header, *rows = str(Report(outcomes, tolerance=0.0)).splitlines()
    assert header.startswith("x-transformers ")
    assert rows == [
        "outputs  agrees bitwise",
        "logits   differs: logits differs by up to 2",
        "buffers  could not be checked: there is nothing to compare",
    ]


def test_no_hook_is_left_behind() -> None:
    model = small()
    assert compare(model, model)
    assert not torch.nn.modules.module._has_any_global_hook()
    assert not any(module._forward_hooks for module in model.modules())
