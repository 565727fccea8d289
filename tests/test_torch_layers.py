"""Torch's layers in upstream's modules, and cross-attention inserted into a decoder without it."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from x_transformers.x_transformers import Attention, FeedForward

from palme_xt import PalmE, PalmEConfig
from palme_xt.parity import compare
from palme_xt.source import to_source
from palme_xt.wiring import DECODER, ENCODER, build

LIKE_A_VIT = {
    "norm": "LayerNorm",
    "eps": 1e-6,
    "bias": ["to_q", "to_k", "to_v", "to_out"],
    "activation": "quick_gelu",
    "patch_norm": False,
}
LIKE_LLAMA = {"norm": "RMSNorm", "eps": 1e-5, "bias": ["to_q", "to_logits"]}
SIZES = (16, 8, 16, 2, 2, 20, 64, 24, 2, 2, 1)


def config(**arguments: Any) -> PalmEConfig:
    given: dict[str, Any] = {"cross_attend": False, "torch_layers": {"encoder": LIKE_A_VIT, "decoder": LIKE_LLAMA}}
    kwargs = {"encoder_kwargs": {"attn_dim_head": 8}, "decoder_kwargs": {"attn_dim_head": 8}}
    return PalmEConfig(*SIZES, **kwargs | given | arguments)


def modules(description: PalmEConfig) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return build(ENCODER, description), build(DECODER, description)


def text(b: int = 2) -> torch.Tensor:
    return torch.randint(20, (b, 9), generator=torch.Generator().manual_seed(0))


def test_layers_are_torch_s() -> None:
    encoder, decoder = modules(config(cross_attend=True))
    for module, norm, eps, bias in (
        (encoder, nn.LayerNorm, 1e-6, ("to_q", "to_k", "to_v", "to_out")),
        (decoder, nn.RMSNorm, 1e-5, ("to_q",)),
    ):
        layers = getattr(module, "net", module).attn_layers
        norms = [layers.final_norm, *(layer[0][0] for layer in layers.layers)]
        assert [(type(found), found.eps) for found in norms] == [(norm, eps)] * len(norms)
        for attention in (found for found in module.modules() if isinstance(found, Attention)):
            for name in "to_q", "to_k", "to_v", "to_out":
                assert (getattr(attention, name).bias is not None) == (name in bias)
    assert decoder.net.to_logits.bias is not None
    assert type(encoder.patch_to_embedding[0]) is type(encoder.patch_to_embedding[2]) is nn.Identity
    activations = [found.ff[0][-1] for found in encoder.modules() if isinstance(found, FeedForward)]
    x = torch.randn(5)
    assert activations
    for activation in activations:
        assert torch.equal(activation(x), x * torch.sigmoid(1.702 * x))


def test_without_them_layers_are_upstream_s() -> None:
    encoder, decoder = modules(config(torch_layers={}))
    for module in *encoder.modules(), *decoder.modules():
        assert not isinstance(module, nn.RMSNorm)
        assert getattr(module, "to_q", nn.Linear(1, 1, bias=False)).bias is None


def test_the_bias_of_a_projection_before_a_gate() -> None:
    description = config(decoder_kwargs={"attn_on_attn": True}, torch_layers={"decoder": {"bias": ["to_out"]}})
    _, decoder = modules(description)
    assert decoder.net.attn_layers.layers[0][1].to_out[0].bias is not None


@pytest.mark.parametrize(
    "activation", ["quick_gelu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gelu_tanh", "relu"))]
)
def test_the_config_describes_them(activation: str) -> None:
    layers = {"encoder": LIKE_A_VIT | {"activation": activation}, "decoder": LIKE_LLAMA}
    description = config(cross_attend=True, torch_layers=layers)
    assert PalmEConfig.from_dict(description.to_dict()) == description
    adopted = PalmE.from_modules(*modules(description), torch_layers=layers)
    assert adopted.config == description
    program: dict[str, Any] = {}
    source = to_source(description)
    exec(source, program)
    assert compare(PalmE.from_config(description), (program["encoder"], program["decoder"]))
    for arguments in ("format", "--check"), ("check",):
        command = [sys.executable, "-m", "ruff", *arguments, "--isolated", "-"]
        checked = subprocess.run(command, input=source, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_modules_with_other_layers_are_unproven() -> None:
    with pytest.warns(UserWarning, match=r"does not describe the modules.* is \(\d+,\) in the modules, but missing"):
        PalmE.from_modules(*modules(config(cross_attend=True)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"torch_layers=\(\) must be a dict of dicts, for 'encoder' and 'decoder'"),
        ({"vit": {}}, r"torch_layers\['vit'\]=\{\} must be a dict, for 'encoder' or 'decoder'"),
        ({"decoder": 1}, r"torch_layers\['decoder'\]=1 must be a dict, for 'encoder' or 'decoder'"),
        ({"decoder": {"norms": 1}}, r"\['norms'\]=1 is unknown: use norm, eps, bias, activation, patch_norm"),
        ({"decoder": {"norm": "BatchNorm"}}, r"\['norm'\]='BatchNorm' must be one of LayerNorm, RMSNorm"),
        ({"decoder": {"eps": 0}}, r"\['eps'\]=0 must be a positive number"),
        ({"decoder": {"bias": ["to_z"]}}, r"\['bias'\]=\('to_z',\) must hold only to_q, to_k, to_v, to_out, to_logits"),
        ({"encoder": {"activation": "tanh"}}, r"\['activation'\]='tanh' must be one of gelu_tanh, quick_gelu, relu"),
        ({"encoder": {"patch_norm": 1}}, r"\['patch_norm'\]=1 must be True or False"),
        ({"decoder": {"patch_norm": False}}, r"torch_layers\['decoder'\]\['patch_norm'\]=False is for the encoder"),
    ],
)
def test_errors(given: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        PalmEConfig(torch_layers=given)


@pytest.mark.parametrize(
    "overrides",
    [
        {"use_layerscale": True},
        *(pytest.param(each, marks=pytest.mark.slow) for each in ({}, {"attn_on_attn": True}, {"ff_glu": True})),
    ],
)
def test_inserted_cross_attention_changes_nothing_at_first(overrides: dict[str, Any]) -> None:
    description = config(decoder_kwargs={"attn_dim_head": 8, **overrides})
    encoder, decoder = modules(description)
    decoder.net.token_emb.requires_grad_(False)
    model = PalmE.from_modules(encoder, decoder, cross_attend=True, **_stated(description))
    assert model.config == PalmEConfig(**vars(description) | {"cross_attend": True})
    img = torch.randn(2, 3, 16, 16)
    found = model.decoder.net(text(), context=model.encode(img))
    torch.testing.assert_close(found, decoder.net(text()), rtol=1e-6, atol=1e-6)
    assert not model.decoder.net.token_emb.emb.weight.requires_grad
    assert PalmE.from_config(model.config).load_state_dict(model.state_dict())

    model(img, text()).backward()
    inserted = [module for module in model.decoder.modules() if isinstance(module, Attention) and not module.causal]
    assert len(inserted) == 2
    for module in inserted:
        for weight in module.to_out.parameters():
            assert weight.grad is not None
            assert weight.grad.any()
            nn.init.normal_(weight)
    changed = model.decoder.net(text(), context=model.encode(img))
    assert not torch.allclose(changed, found, atol=1e-3)
    assert model.generate(img, text(), seq_len=3, temperature=0).shape == (2, 3)


def _stated(description: PalmEConfig) -> dict[str, Any]:
    return {"torch_layers": description.torch_layers, "decoder_kwargs": description.decoder_kwargs}


def test_arguments_that_come_with_modules_count_as_given() -> None:
    description = config(eos_token=3, sources={"decoder": "a folder"})
    encoder, decoder = modules(description)
    encoder.palme_arguments = {"torch_layers": {"encoder": LIKE_A_VIT}}
    decoder.palme_arguments = {
        "torch_layers": {"decoder": LIKE_LLAMA},
        "eos_token": 3,
        "sources": {"decoder": "a folder"},
        "cross_attend": True,
    }
    assert PalmE.from_modules(encoder, decoder).config == PalmEConfig(**vars(description) | {"cross_attend": True})
    assert PalmE.from_modules(encoder, decoder, cross_attend=False).config == description
    assert PalmE.from_modules(encoder, decoder, cross_attend=False, eos_token=4).config.eos_token == 4


def test_a_decoder_with_inserted_cross_attention_can_be_adopted_again() -> None:
    description = config()
    encoder, decoder = modules(description)
    encoder.palme_arguments = {"torch_layers": {"encoder": LIKE_A_VIT}}
    decoder.palme_arguments = {"torch_layers": {"decoder": LIKE_LLAMA}, "cross_attend": True}
    model = PalmE.from_modules(encoder, decoder)
    assert PalmE.from_modules(model.encoder, model.decoder).config == model.config


def test_cross_attention_is_not_inserted_where_it_would_change_something() -> None:
    description = config(decoder_kwargs={"attn_dim_head": 8, "pre_norm": False})
    encoder, decoder = modules(description)
    for module in decoder.modules():
        if isinstance(module, nn.RMSNorm):
            nn.init.normal_(module.weight)
    with pytest.raises(ValueError, match="cross_attend=True changes what the decoder computes: it must normalise"):
        PalmE.from_modules(encoder, decoder, cross_attend=True, **_stated(description))


def test_cross_attention_is_not_inserted_into_what_cannot_be_rebuilt() -> None:
    with pytest.raises(ValueError, match=r"cross_attend=True for a decoder without cross-attention, which cannot be"):
        PalmE.from_modules(*modules(config()), cross_attend=True)
