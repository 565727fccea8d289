"""The 17 arguments: one list of names and defaults, validated, frozen, and equal after a round trip through JSON."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palme_xt import PalmE, PalmEConfig
from palme_xt.mapping import MAPPING
from palme_xt.strategies import configs

Broken = tuple[dict[str, Any], type[Exception], str]

CONTRACT = {
    "image_size": 256,
    "patch_size": 32,
    "encoder_dim": 512,
    "encoder_depth": 6,
    "encoder_heads": 8,
    "num_tokens": 20000,
    "max_seq_len": 1024,
    "decoder_dim": 512,
    "decoder_depth": 6,
    "decoder_heads": 8,
    "alibi_num_heads": 4,
    "use_abs_pos_emb": False,
    "cross_attend": True,
    "alibi_pos_bias": True,
    "rotary_xpos": True,
    "attn_flash": True,
    "qk_norm": True,
}
OTHERS = ["bos_token", "eos_token", "torch_layers", "sources", "external_encoder", "image_token", "image_attention"]
OVERRIDES = ["vit_kwargs", "encoder_kwargs", "transformer_kwargs", "decoder_kwargs", "autoregressive_kwargs"]


@pytest.mark.parametrize("constructor", [PalmE, PalmEConfig])
def test_the_signature_is_the_public_contract(constructor: type) -> None:
    parameters = inspect.signature(constructor).parameters
    own = ["encoder"] if constructor is PalmE else []
    assert list(parameters) == [*CONTRACT, *OVERRIDES, *OTHERS, *own]
    assert {name: parameters[name].default for name in CONTRACT} == CONTRACT
    assert {parameters[name].kind for name in CONTRACT} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert {parameters[name].kind for name in [*OVERRIDES, *OTHERS, *own]} == {inspect.Parameter.KEYWORD_ONLY}


def test_help_shows_the_arguments() -> None:
    assert "image_size: 'int' = 256" in str(inspect.signature(PalmE.__init__))
    for name in [*CONTRACT, *OVERRIDES, *OTHERS]:
        assert f"        {name}: " in (PalmEConfig.__doc__ or ""), name


def test_arguments_are_positional_or_keyword() -> None:
    small = dict(CONTRACT, image_size=8, patch_size=4, encoder_dim=16, decoder_dim=16, encoder_depth=1, decoder_depth=1)
    assert PalmE(*small.values()).config == PalmE(**small).config == PalmEConfig(**small)  # type: ignore[arg-type]


def test_every_argument_lands_somewhere() -> None:
    assert {name for arguments in MAPPING.values() for name in arguments.values()} == set(CONTRACT)


def test_the_five_keyword_dicts_of_the_defaults() -> None:
    config = PalmEConfig(vit_kwargs={"channels": 1}, autoregressive_kwargs={"pad_value": 3})
    assert config.keywords("vit") == {"image_size": 256, "patch_size": 32, "channels": 1}
    assert config.keywords("encoder") == {"dim": 512, "depth": 6, "heads": 8}
    assert config.keywords("transformer") == {"num_tokens": 20000, "max_seq_len": 1024, "use_abs_pos_emb": False}
    assert config.keywords("decoder") == {
        "dim": 512,
        "depth": 6,
        "heads": 8,
        "cross_attend": True,
        "cross_attn_dim_context": 512,
        "alibi_pos_bias": True,
        "alibi_num_heads": 4,
        "rotary_xpos": True,
        "attn_flash": True,
        "attn_qk_norm": True,
    }
    assert config.keywords("autoregressive") == {"pad_value": 3}


@given(configs())
def test_a_config_is_the_same_after_json(config: PalmEConfig) -> None:
    again = PalmEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


@given(configs())
def test_a_config_is_an_ordinary_dataclass(config: PalmEConfig) -> None:
    plain = dataclasses.asdict(config)
    assert list(plain) == [argument.name for argument in dataclasses.fields(config)]
    assert PalmEConfig(**plain) == PalmEConfig(**json.loads(json.dumps(plain))) == config
    assert dataclasses.replace(config) == copy.copy(config) == config
    assert dataclasses.replace(config, num_tokens=99).num_tokens == 99 != config.num_tokens


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.int16])
def test_ints_of_numpy_are_stored_as_ints(kind: Any) -> None:
    config = PalmEConfig(
        image_size=kind(64),
        patch_size=kind(16),
        decoder_kwargs={"attn_kv_heads": kind(2), "attn_dim_head": kind(8)},
        autoregressive_kwargs={"pad_value": kind(3), "ignore_index": kind(5)},
    )
    same = PalmEConfig(
        image_size=64,
        patch_size=16,
        decoder_kwargs={"attn_kv_heads": 2, "attn_dim_head": 8},
        autoregressive_kwargs={"pad_value": 3, "ignore_index": 5},
    )
    assert config == same
    assert repr(config) == repr(same)
    assert PalmEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("value", [np.float64(64), np.bool_(True), np.array(64), torch.tensor(64)])
def test_what_numpy_and_torch_do_not_count_as_an_int_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(f"image_size={value!r} must be a positive int, not ")):
        PalmEConfig(image_size=value)


def test_a_config_has_what_the_trainer_of_transformers_needs() -> None:
    config = PalmEConfig(decoder_kwargs={"ff_glu": True})
    before = hash(config)
    config.use_cache = False  # type: ignore[attr-defined]
    assert config == PalmEConfig(decoder_kwargs={"ff_glu": True})
    assert hash(config) == before
    assert not hasattr(config, "use_cache")
    assert PalmEConfig.from_dict(json.loads(config.to_json_string())) == config


@pytest.mark.parametrize("name", ["image_size", "image_sise", "decoder_kwargs", "use_cach"])
def test_no_other_attribute_can_be_set(name: str) -> None:
    message = f"cannot assign to '{name}': build another with dataclasses.replace(config, ...)"
    with pytest.raises(dataclasses.FrozenInstanceError, match=re.escape(message)):
        setattr(PalmEConfig(), name, 64)


@pytest.mark.parametrize(("eos_token", "ids"), [(None, []), (3, [3]), ([3, 5], [3, 5])])
def test_bos_and_eos_are_the_same_after_json(eos_token: int | list[int] | None, ids: list[int]) -> None:
    config = PalmEConfig(bos_token=1, eos_token=eos_token)
    again = PalmEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert config != PalmEConfig(bos_token=2, eos_token=eos_token)
    assert config != PalmEConfig(bos_token=1, eos_token=[4])
    assert again.check_eos_token(None).tolist() == ids
    assert again.check_eos_token([7]).tolist() == [7]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bos_token": 20000}, ValueError, "bos_token=20000 must be a token id within 0..num_tokens-1=19999"),
        ({"bos_token": [1]}, TypeError, "bos_token=(1,) must be a token id, not tuple: or pass None"),
        ({"eos_token": -1}, ValueError, "eos_token=-1 must be a token id within 0..num_tokens-1=19999: or pass None"),
        ({"eos_token": [1, "</s>"]}, TypeError, "eos_token='</s>' must be a token id, not str: or pass None"),
    ],
)
def test_bos_and_eos_are_token_ids(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        PalmEConfig(**arguments)


def test_lists_and_tuples_mean_the_same() -> None:
    with_list = PalmEConfig(decoder_kwargs={"custom_layers": ["a", "c", "f"]})
    assert with_list == PalmEConfig(decoder_kwargs={"custom_layers": ("a", "c", "f")})
    assert with_list.keywords("decoder")["custom_layers"] == ("a", "c", "f")
    assert with_list.to_dict()["decoder_kwargs"]["custom_layers"] == ["a", "c", "f"]


def test_configs_that_differ_are_not_equal() -> None:
    assert PalmEConfig() != PalmEConfig(num_tokens=100)
    assert PalmEConfig() != PalmEConfig(decoder_kwargs={"ff_glu": True})


def test_a_config_is_frozen_all_the_way_down() -> None:
    mine = {"ff_glu": True}
    config = PalmEConfig(decoder_kwargs=mine)
    mine["ff_glu"] = False
    assert config.decoder_kwargs == {"ff_glu": True}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.image_size = 64  # type: ignore[misc]
    for change in (
        lambda: config.decoder_kwargs.update(ff_glu=False),
        lambda: config.decoder_kwargs.__setitem__("ff_glu", False),
        lambda: config.decoder_kwargs.pop("ff_glu"),
    ):
        with pytest.raises(TypeError, match=re.escape("a config is frozen: build another with dataclasses.replace")):
            change()
    config.keywords("decoder")["ff_glu"] = False
    assert config.keywords("decoder")["ff_glu"] is True


@st.composite
def broken_arguments(draw: st.DrawFn) -> Broken:
    """Draw keywords that break one rule of `PalmEConfig`, the error they raise, and its message."""
    sizes, flags = (
        [item.name for item in dataclasses.fields(PalmEConfig) if item.type == kind] for kind in ("int", "bool")
    )
    size, flag = draw(st.sampled_from(sizes)), draw(st.sampled_from(flags))
    not_positive = draw(st.integers(max_value=0))
    no_int = draw(st.one_of(st.booleans(), st.floats(), st.text(), st.none()))
    no_bool = draw(st.one_of(st.integers(), st.none(), st.text()))
    few, many = draw(st.integers(1, 16)), draw(st.integers(2, 64))
    heads = {"decoder_heads": few, "alibi_num_heads": few + many}
    too_many = f"alibi_num_heads={few + many} must be within 1..decoder_heads={few} when alibi_pos_bias is on"
    part, kv = draw(st.sampled_from(["encoder", "decoder"])), draw(st.sampled_from([3, 5, 6, 7, 9, 16]))
    broken: list[Broken] = [
        ({size: not_positive}, ValueError, f"{size}={not_positive} must be a positive int: use 1 or more"),
        ({size: no_int}, TypeError, f"{size}={no_int!r} must be a positive int, not "),
        ({flag: no_bool}, TypeError, f"{flag}={no_bool!r} must be True or False, not "),
        ({"patch_size": many, "image_size": many * few + 1}, ValueError, f"must be divisible by patch_size={many}: "),
        (heads, ValueError, too_many),
        ({f"{part}_kwargs": {"attn_kv_heads": kv}}, ValueError, f"['attn_kv_heads']={kv} must divide {part}_heads=8"),
    ]
    return draw(st.sampled_from(broken))


@given(broken_arguments())
def test_a_broken_argument_is_named(broken: Broken) -> None:
    arguments, error, message = broken
    with pytest.raises(error, match=re.escape(message)):
        PalmEConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"image_size": 100},
            ValueError,
            "image_size=100 must be divisible by patch_size=32: an image is cut into whole patches; use image_size=96",
        ),
        (
            {"encoder_kwargs": {"dim": 3}},
            ValueError,
            "encoder_kwargs['dim']=3 repeats the argument encoder_dim=512: set encoder_dim, and leave 'dim' out of "
            "encoder_kwargs",
        ),
        ({"decoder_kwargs": {"attn_qk_norm": False}}, ValueError, "repeats the argument qk_norm=True: set qk_norm"),
        ({"decoder_kwargs": {"cross_attn_dim_context": 4}}, ValueError, "repeats the argument encoder_dim=512"),
        ({"decoder_kwargs": {"attn_heads": 4}}, ValueError, "repeats the argument decoder_heads=8"),
        ({"decoder_kwargs": {"ff_dim": 4}}, ValueError, "repeats the argument decoder_dim=512"),
        ({"decoder_kwargs": {"attn_dim_context": 16}}, ValueError, "is not a keyword of the installed x-transformers"),
        ({"encoder_kwargs": {"ff_output_proj_depth": 2}}, ValueError, "is not a keyword of the installed x-trans"),
        ({"decoder_kwargs": {"ff_depth": 2}}, ValueError, "is not a keyword of the installed x-transformers"),
        ({"vit_kwargs": {"patch_size": 16}}, ValueError, "repeats the argument patch_size=32"),
        ({"transformer_kwargs": {"num_tokens": 16}}, ValueError, "repeats the argument num_tokens=20000"),
        (
            {"decoder_kwargs": {"attn_kv_head": 2}},
            ValueError,
            "decoder_kwargs['attn_kv_head']=2 is not a keyword of the installed x-transformers: did you mean "
            "'attn_kv_heads'?",
        ),
        ({"encoder_kwargs": {"ff_gluu": True}}, ValueError, "did you mean 'ff_glu'?"),
        ({"vit_kwargs": {"channel": 1}}, ValueError, "did you mean 'channels'?"),
        ({"transformer_kwargs": {"tie_embeddings": True}}, ValueError, "did you mean 'tie_embedding'?"),
        ({"autoregressive_kwargs": {"padvalue": 1}}, ValueError, "did you mean 'pad_value'?"),
        ({"vit_kwargs": {"attn_layers": None}}, ValueError, "is set by PalmE itself: leave 'attn_layers' out"),
        ({"decoder_kwargs": {"causal": False}}, ValueError, "is set by PalmE itself: leave 'causal' out"),
        ({"autoregressive_kwargs": {"net": None}}, ValueError, "is set by PalmE itself: leave 'net' out"),
        ({"decoder_kwargs": [("ff_glu", True)]}, TypeError, "must be a dict of keywords for x-transformers"),
        (
            {"decoder_kwargs": {1: True}},
            ValueError,
            "decoder_kwargs[1]=True is not a keyword of the installed x-transf",
        ),
        *(
            (
                {"transformer_kwargs": {name: value}},
                ValueError,
                f"transformer_kwargs['{name}']={value} removes the logits",
            )
            for name, value in [("use_cls_token", True), ("average_pool_embed", True), ("num_output_heads", 2)]
        ),
        ({"vit_kwargs": {"channels": 0}}, ValueError, "vit_kwargs['channels']=0 must be a positive int: use 1 or more"),
        (
            {"autoregressive_kwargs": {"ignore_index": None}},
            TypeError,
            "autoregressive_kwargs['ignore_index']=None must be an int",
        ),
        (
            {"num_tokens": 10, "autoregressive_kwargs": {"pad_value": 10}},
            ValueError,
            "autoregressive_kwargs['pad_value']=10 must be a token id within 0..num_tokens-1=9",
        ),
    ],
)
def test_the_message_says_what_to_do(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    for constructor in PalmEConfig, PalmE:
        with pytest.raises(error, match=re.escape(message)):
            constructor(**arguments)


def test_alibi_heads_are_not_checked_where_there_is_no_alibi() -> None:
    assert PalmEConfig(alibi_pos_bias=False, alibi_num_heads=99).alibi_num_heads == 99


def test_what_only_upstream_can_refuse_is_reported_with_its_keywords() -> None:
    message = (
        r"x-transformers [\d.]+ rejects Decoder\(.*attn_sigmoid=True.*\): sigmoid attention not available for flash"
    )
    with pytest.raises(ValueError, match=message):
        PalmE(decoder_kwargs={"attn_sigmoid": True})


def test_a_refusal_without_a_reason_is_said_to_have_none() -> None:
    with pytest.raises(ValueError, match=r"rejects AutoregressiveWrapper\(mask_prob=2\): it gives no reason"):
        PalmE(autoregressive_kwargs={"mask_prob": 2})
    with pytest.raises(ValueError, match=r"rejects ViTransformerWrapper\(.*emb_dropout=1.5.*\): dropout probability"):
        PalmE(vit_kwargs={"emb_dropout": 1.5})


def test_dropped_absolute_positions_are_warned_of() -> None:
    message = re.escape(
        "use_abs_pos_emb=True has no effect with rotary_xpos=True: x-transformers drops absolute positions when the "
        'decoder has rotary or relative ones; to keep both, pass decoder_kwargs={"disable_abs_pos_emb": False}'
    )
    with pytest.warns(UserWarning, match=message):
        config = PalmEConfig(use_abs_pos_emb=True, encoder_depth=1, decoder_depth=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PalmE.from_config(config)  # the config has already warned


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_abs_pos_emb": True, "decoder_kwargs": {"disable_abs_pos_emb": False}},
        {"use_abs_pos_emb": True, "rotary_xpos": False},
        {"use_abs_pos_emb": False},
    ],
)
def test_kept_absolute_positions_are_not_warned_of(arguments: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PalmEConfig(**arguments)


def test_from_dict_names_the_closest_argument() -> None:
    with pytest.raises(
        ValueError, match=re.escape("'image_sise' is not an argument of PalmEConfig: did you mean 'image_size'?")
    ):
        PalmEConfig.from_dict({"image_sise": 64})


def test_to_dict_names_what_json_cannot_hold() -> None:
    with pytest.raises(TypeError, match=re.escape("decoder_kwargs['ff_mult']=inf has no JSON form: only None, bool")):
        PalmEConfig(decoder_kwargs={"ff_mult": float("inf")}).to_dict()
    config = PalmEConfig(decoder_kwargs={"attn_custom_attn_fn": max})
    with pytest.raises(
        TypeError, match=re.escape("decoder_kwargs['attn_custom_attn_fn']=<built-in function max> has no JSON form")
    ):
        config.to_dict()


def test_from_config_keeps_the_config() -> None:
    config = PalmEConfig(image_size=8, patch_size=4, encoder_depth=1, decoder_depth=1, vit_kwargs={"channels": 1})
    assert PalmE.from_config(config).config == config
