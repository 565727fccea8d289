"""The strategies keep what is fixed, and draw the rest around it."""

from __future__ import annotations

import contextlib
import textwrap
import warnings
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from palme_xt import PalmE, PalmEConfig, strategies
from palme_xt.strategies import batches, configs

FIXED: list[dict[str, Any]] = [
    {},
    {"image_size": 30},
    {"image_size": 31},
    {"patch_size": 7},
    {"image_size": 30, "patch_size": 5},
    {"alibi_num_heads": 6},
    {"alibi_num_heads": 3, "decoder_kwargs": {"attn_kv_heads": 2, "attn_dim_head": 8}},
    {"alibi_num_heads": 5, "decoder_heads": 2},
    {"decoder_heads": 3, "encoder_heads": 5},
    {"encoder_kwargs": {"attn_kv_heads": 4, "attn_dim_head": 8}},
    {"cross_attend": True, "use_abs_pos_emb": True, "rotary_xpos": True, "decoder_kwargs": {"attn_dim_head": 8}},
    {"autoregressive_kwargs": {"pad_value": 100}},
    {"num_tokens": 1},
    {"max_seq_len": 3, "use_abs_pos_emb": True},
    {"decoder_kwargs": {"rel_pos_bias": True, "attn_dim_head": 8}},
]


@pytest.mark.parametrize("fixed", FIXED, ids=str)
def test_what_is_fixed_is_kept_and_the_rest_fits(fixed: dict[str, Any]) -> None:
    @settings(max_examples=4)
    @given(configs(**fixed), st.data())
    def run(config: PalmEConfig, data: st.DataObject) -> None:
        assert {name: getattr(config, name) for name in fixed} == fixed
        img, text = data.draw(batches(config))
        assert PalmE.from_config(config)(img if config.cross_attend else None, text).isfinite()

    run()


def test_every_field_is_drawn() -> None:
    others = {"_", "bos_token", "eos_token", "torch_layers", "sources", "external_encoder", "image_token"}
    others |= {"image_attention"}
    names = PalmEConfig.__dataclass_fields__.keys() - others
    drawn: dict[str, set[str]] = {name: set() for name in names}

    @settings(max_examples=40)
    @given(configs())
    def run(config: PalmEConfig) -> None:
        for name, values in drawn.items():
            values.add(str(getattr(config, name)))

    run()
    assert [name for name, values in drawn.items() if len(values) < 2] == []


IMPOSSIBLE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"image_size": 30, "patch_size": 4}, ValueError, "image_size=30 must be divisible by patch_size=4"),
    (
        {"alibi_num_heads": 3, "decoder_heads": 2, "alibi_pos_bias": True},
        ValueError,
        "alibi_num_heads=3 must be within",
    ),
    ({"image_size": 0}, ValueError, "image_size=0 must be a positive int"),
    ({"num_tokens": 4, "autoregressive_kwargs": {"pad_value": 4}}, ValueError, "must be a token id within 0"),
    ({"decoder_heads": 3, "decoder_kwargs": {"attn_kv_heads": 2}}, ValueError, "must divide decoder_heads=3"),
    (
        {"decoder_kwargs": {"rel_pos_bias": True}, "attn_flash": True},
        ValueError,
        "rejects Decoder.*flash attention not",
    ),
    ({"qk_norm": 1}, TypeError, "qk_norm=1 must be True or False"),
    ({"image": 30}, TypeError, "image"),
]


@pytest.mark.parametrize(("fixed", "kind", "message"), IMPOSSIBLE, ids=str)
def test_what_is_impossible_is_an_error_before_anything_is_drawn(
    fixed: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        configs(**fixed)


def test_no_warnings_before_anything_is_drawn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        configs(use_abs_pos_emb=True)
    assert torch.empty(0).device.type == "cpu"


@pytest.mark.parametrize("broken", [False, True])
def test_the_example_passes_and_notices_a_mistake(broken: bool) -> None:
    _, example = str(strategies.__doc__).split("the same model:\n", maxsplit=1)
    code = textwrap.dedent(example)
    namespace: dict[str, Any] = {}
    exec(code.replace("attn_qk_norm=True", "attn_qk_norm=False") if broken else code, namespace)
    run = settings(max_examples=5, phases=[Phase.generate])(namespace["test_my_wiring_is_the_same_model"])
    with pytest.raises(AssertionError) if broken else contextlib.nullcontext():
        run()
