"""`PalmE.from_modules` adopts modules that were wired by hand as they are, and reads the config from them."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

from benchmarks.hand_wired import HandWired
from palme_xt import PalmE, PalmEConfig
from palme_xt.strategies import QUIET, configs
from tests.models import batch, small


@given(configs())
def test_the_17_arguments_are_read_off_the_modules(config: PalmEConfig) -> None:
    hand_wired = HandWired(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about overrides that do not show, tested below
        model = PalmE.from_modules(hand_wired.encoder, hand_wired.decoder)
    assert model.encoder is hand_wired.encoder
    assert model.decoder is hand_wired.decoder
    dropped = config.rotary_xpos and "disable_abs_pos_emb" not in config.decoder_kwargs
    expected = replace(
        config,
        alibi_num_heads=config.alibi_num_heads if config.alibi_pos_bias else min(4, config.decoder_heads),
        use_abs_pos_emb=config.use_abs_pos_emb and not dropped,
    )
    for name in PalmEConfig.__dataclass_fields__:
        if not name.endswith("_kwargs") and name != "_":
            assert getattr(model.config, name) == getattr(expected, name), name
    img, text = batch(model)
    assert torch.equal(model(img, text), hand_wired(img, text))


SHOWN: list[dict[str, Any]] = [
    {},
    {"vit_kwargs": {"channels": 1, "num_register_tokens": 3}},
    {"decoder_kwargs": {"attn_kv_heads": 2, "use_rmsnorm": True, "ff_glu": True, "ff_swish": True}},
    {"encoder_kwargs": {"ff_no_bias": True, "use_scalenorm": True}},
    {"transformer_kwargs": {"tie_embedding": True}},
    {"rotary_xpos": False, "decoder_kwargs": {"rotary_pos_emb": True}},
    {"decoder_kwargs": {"cross_attn_qk_norm": False}},
    {"autoregressive_kwargs": {"pad_value": 5, "ignore_index": -1}},
    {"use_abs_pos_emb": True, "decoder_kwargs": {"disable_abs_pos_emb": False}},
]


@pytest.mark.parametrize("arguments", SHOWN, ids=str)
def test_overrides_that_show_are_read(arguments: dict[str, Any]) -> None:
    source = small(**arguments).config
    hand_wired = HandWired(source)
    model = PalmE.from_modules(hand_wired.encoder, hand_wired.decoder)
    quiet = {name: getattr(model.config, name) | QUIET for name in ("encoder_kwargs", "decoder_kwargs")}
    assert replace(model.config, **quiet) == source


def test_overrides_that_do_not_show_cause_a_warning() -> None:
    hand_wired = HandWired(small(decoder_kwargs={"attn_num_mem_kv": 2}).config)
    message = (
        r"the modules have overrides that cannot be read from them: decoder\.net\.attn_layers\.layers\.0\.1\.mem_k is "
        r"\(4, 2, 8\), but missing in a model built from model\.config"
    )
    with pytest.warns(UserWarning, match=message):
        PalmE.from_modules(hand_wired.encoder, hand_wired.decoder)


def test_an_adopted_model_also_decodes_where_upstreams_cache_crashes() -> None:
    source = small()
    hand_wired = HandWired(source.config)
    hand_wired.load_state_dict(source.state_dict())
    model = PalmE.from_modules(hand_wired.encoder, hand_wired.decoder)
    img, text = batch(model, n=3)
    expected = source.generate(img, text, 6, temperature=0.0)
    assert torch.equal(model.generate(img, text, 6, temperature=0.0), expected)


def test_modules_that_do_not_fit_are_rejected() -> None:
    model = small()
    with pytest.raises(TypeError, match=r"encoder is a Linear, must be an x_transformers\.ViTransformerWrapper"):
        PalmE.from_modules(nn.Linear(2, 2), model.decoder)
    with pytest.raises(TypeError, match=r"decoder is a TransformerWrapper, must be an x_transformers\.Autoreg"):
        PalmE.from_modules(model.encoder, model.decoder.net)
    message = "decoder takes a context of width 40, must be 24, the width of the encoder"
    with pytest.raises(ValueError, match=re.escape(message)):
        PalmE.from_modules(model.encoder, small(encoder_dim=40).decoder)
