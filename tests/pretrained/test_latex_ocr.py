"""Decoders of LaTeX-OCR, against what they computed under x-transformers 0.15 (`record_latex_ocr.py`)."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from palme_xt import PalmE, PalmEConfig
from palme_xt.pretrained.latex_ocr import load_decoder
from palme_xt.wiring import ENCODER, build

CASES = ("config", "plain", "rel_pos")
each_case = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case != "config")) for case in CASES]
)


def golden(case: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Return the arguments, the weights of the whole model, and what went in and came out."""
    with safe_open(Path(__file__).parent / "goldens" / "latex_ocr.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{case}.")]  # noqa: SIM118
        tensors = {name.removeprefix(f"{case}."): file.get_tensor(name) for name in names}
        args = json.loads(file.metadata()[case])
    weights = {name.removeprefix("weights."): tensor for name, tensor in tensors.items() if "weights." in name}
    return args, weights, tensors


def logits(args: Any, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = load_decoder(weights, args).eval().net(inputs["text"], context=inputs["context"])
    return found


def wired(args: dict[str, Any], weights: dict[str, Tensor]) -> PalmE:
    encoder = build(ENCODER, PalmEConfig(16, 8, args["dim"], 2, 2, encoder_kwargs={"attn_dim_head": 8}))
    return PalmE.from_modules(encoder, load_decoder(weights, args))


@each_case
def test_logits_and_loss_are_those_of_the_old_release(case: str) -> None:
    args, weights, tensors = golden(case)
    torch.testing.assert_close(logits(args, weights, tensors), tensors["logits"], rtol=0, atol=1e-5)
    with torch.no_grad():
        loss = load_decoder(weights, args).eval()(tensors["text"], context=tensors["context"])
    torch.testing.assert_close(loss, tensors["loss"], rtol=1e-6, atol=0)
    if case != "rel_pos":  # without the conversion of positions, the logits are others
        other = weights | {(name := "decoder.net.pos_emb.emb.weight"): weights[name] * args["dim"] ** -0.5}
        assert (logits(args, other, tensors) - tensors["logits"]).abs().max() > 0.1


@pytest.mark.slow
@each_case
def test_each_tensor_counts(case: str) -> None:
    args, weights, tensors = golden(case)
    for name, tensor in weights.items():
        difference = (logits(args, weights | {name: -tensor}, tensors) - tensors["logits"]).abs().max()
        assert difference > 1e-2, name


@each_case
def test_greedy_tokens_are_those_of_the_old_release(case: str) -> None:
    args, weights, tensors = golden(case)
    model = wired(args, weights)
    for cache_kv in True, False:
        found = model.generate(None, context=tensors["context"], temperature=0, eos_token=[], cache_kv=cache_kv)
        assert torch.equal(found, tensors["greedy"])
    assert not torch.equal(
        model.generate(None, context=tensors["context"].flip(0), temperature=0, eos_token=[]), tensors["greedy"]
    )
    ended = (tensors["greedy"] == args["eos_token"]).int()
    expected = tensors["greedy"].masked_fill(ended.cumsum(dim=1) > ended, args["pad_token"])
    found = model.generate(None, context=tensors["context"], temperature=0)
    assert torch.equal(found, expected)
    assert not torch.equal(found, tensors["greedy"])
    _, scores = model.beam_search(None, context=tensors["context"], beams=2)
    assert scores.isfinite().all()


@each_case
def test_the_config_describes_the_model(case: str) -> None:
    args, weights, _ = golden(case)
    model = wired(args, weights)
    assert (model.config.bos_token, model.config.eos_token, model.config.pad_value) == (1, args["eos_token"], 0)
    assert model.config.sources == {"decoder": "LaTeX-OCR"}
    again = PalmE.from_config(PalmEConfig.from_dict(model.config.to_dict()))
    again.load_state_dict(model.state_dict())


class Convolution(nn.Module):
    """An encoder of grey images of any height and width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, 8, stride=8)

    def forward(self, img: Tensor) -> Tensor:
        """Return `(b, p, d)`."""
        return self.embed(img).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


def test_any_encoder_with_the_decoder_of_latex_ocr() -> None:
    args, weights, _ = golden("config")
    encoder, img = Convolution(args["dim"]), torch.randn(2, 1, 16, 40)
    model = PalmE.from_modules(encoder, load_decoder(weights, args))
    found = model.generate(img, temperature=0)
    assert torch.equal(found, wired(args, weights).generate(None, context=encoder(img), temperature=0))
    assert not torch.equal(found, model.generate(-img, temperature=0))


def test_the_state_dict_of_the_decoder_alone_and_args_as_attributes() -> None:
    args, weights, tensors = golden("config")
    alone = {name.removeprefix("decoder."): tensor for name, tensor in weights.items()}
    assert torch.equal(logits(argparse.Namespace(**args), alone, tensors), logits(args, weights, tensors))
    whole = {"encoder.norm.weight": torch.ones(3), **weights}
    assert torch.equal(logits(args, whole, tensors), logits(args, weights, tensors))


def test_half_precision_is_loaded_in_float32() -> None:
    args, weights, tensors = golden("config")
    half = {name: tensor.half() for name, tensor in weights.items()}
    rounded = {name: tensor.float() for name, tensor in half.items()}
    assert torch.equal(logits(args, half, tensors), logits(args, rounded, tensors))


LAST = "net.attn_layers.layers.5.1.net.2.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"decoder.{LAST}": None}, rf"a tensor is missing: {LAST}"),
        ({"decoder.net.extra": torch.ones(1)}, r"1 tensors are not supported, such as 'net\.extra'"),
        (
            {f"decoder.{LAST}": torch.ones(3)},
            rf"the shape of '{LAST}' is \(3,\): 'net\..*\.ff\.2\.bias' must be \(16,\)",
        ),
        ({f"decoder.{LAST}": torch.ones(16).int()}, rf"tensor '{LAST}' has dtype torch.int32, which is not supported"),
    ],
)
def test_weights_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    args, weights, _ = golden("config")
    changed = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=f"weights, with these args, cannot be loaded: {message}"):
        load_decoder(changed, args)


def test_weights_that_are_no_state_dict() -> None:
    with pytest.raises(TypeError, match=r"weights is a str, must be a state dict: read the file with torch\.load\("):
        load_decoder("weights.pth", golden("config")[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        *({name: True} for name in ("use_scalenorm", "use_rmsnorm", "use_rezero", "rotary_pos_emb", "macaron")),
        *({name: True} for name in ("position_infused_attn", "attn_collab_heads", "attn_gate_values", "residual_attn")),
        {"pre_norm": False},
        {"sandwich_coef": 1},
        {"attn_num_mem_kv": 2},
    ],
)
def test_options_that_are_not_converted(options: dict[str, Any]) -> None:
    args, weights, tensors = golden("config")
    ((name, value),) = options.items()
    message = (
        rf"args\.decoder_args\['{name}'\]={value} is not converted to today's x-transformers: only attn_dim_head, "
    )
    with pytest.raises(ValueError, match=message):
        load_decoder(weights, args | {"decoder_args": args["decoder_args"] | options})
    off = args["decoder_args"] | {name: name == "pre_norm"}
    assert torch.equal(logits(args | {"decoder_args": off}, weights, tensors), logits(args, weights, tensors))


@pytest.mark.parametrize("name", ["dim", "num_layers", "heads", "num_tokens", "max_seq_len", "bos_token", "pad_token"])
def test_arguments_that_are_missing(name: str) -> None:
    args, weights, _ = golden("config")
    del args[name]
    with pytest.raises(ValueError, match=f"args has no '{name}': pass the configuration that the model was trained"):
        load_decoder(weights, args)


def test_arguments_that_are_no_configuration() -> None:
    with pytest.raises(ValueError, match="args has no 'dim'"):
        load_decoder({}, "config.yaml")


def test_decoder_args_of_another_decoder() -> None:
    args, weights, _ = golden("config")
    without = args["decoder_args"] | {"cross_attend": False}
    with pytest.raises(ValueError, match=r"a tensor is missing: net\.attn_layers\.layers\.1\.1\.net\.0\.proj\.weight"):
        load_decoder(weights, args | {"decoder_args": without})
    with pytest.raises(ValueError, match=r"to_q\.weight' is \(16, 16\): '.*to_q\.weight' must be \(128, 16\)"):
        load_decoder(weights, args | {"decoder_args": None})
