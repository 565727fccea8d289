"""Hypothesis strategies for valid configs and inputs, and for arguments that each break one rule."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from palme_xt import PalmEConfig

DIM_HEAD = 8
QUIET = {"verbose": False}  # otherwise, upstream logs that there may be too few rotary dimensions


@st.composite
def configs(draw: st.DrawFn, /, **fixed: Any) -> PalmEConfig:
    """Draw a small valid config over all 17 arguments and common overrides, with the `fixed` arguments as given."""
    return PalmEConfig(**draw(arguments_of_configs(**fixed)))


@st.composite
def arguments_of_configs(draw: st.DrawFn, /, **fixed: Any) -> dict[str, Any]:
    """Draw the keywords of a small valid `PalmEConfig`."""
    patch_size = draw(st.sampled_from([2, 4]))
    decoder_heads = fixed.get("decoder_heads") or draw(st.sampled_from([1, 2, 4]))
    encoder_heads = fixed.get("encoder_heads") or draw(st.sampled_from([1, 2, 3]))
    num_tokens = draw(st.integers(8, 24))
    arguments: dict[str, Any] = {
        "image_size": patch_size * draw(st.integers(1, 3)),
        "patch_size": patch_size,
        "encoder_dim": draw(st.sampled_from([DIM_HEAD, 12, 16])),
        "encoder_depth": draw(st.integers(1, 2)),
        "encoder_heads": encoder_heads,
        "num_tokens": num_tokens,
        "max_seq_len": draw(st.integers(10, 16)),
        "decoder_dim": draw(st.sampled_from([DIM_HEAD, 12, 16])),
        "decoder_depth": draw(st.integers(2, 3)),
        "decoder_heads": decoder_heads,
        "alibi_num_heads": draw(st.integers(1, decoder_heads)),
        **{
            flag: draw(st.booleans())
            for flag in ("use_abs_pos_emb", "cross_attend", "alibi_pos_bias", "rotary_xpos", "attn_flash", "qk_norm")
        },
        "vit_kwargs": draw(
            _some_of(
                channels=st.sampled_from([1, 4]), num_register_tokens=st.integers(1, 3), post_emb_norm=st.just(True)
            )
        ),
        "encoder_kwargs": QUIET | draw(attn_layers(encoder_heads)),
        "transformer_kwargs": draw(
            _some_of(
                tie_embedding=st.just(True),
                post_emb_norm=st.just(True),
                emb_frac_gradient=st.just(0.5),
                l2norm_embed=st.just(True),
            )
        ),
        "decoder_kwargs": QUIET | draw(attn_layers(decoder_heads)),
        "autoregressive_kwargs": draw(
            _some_of(pad_value=st.integers(0, num_tokens - 1), ignore_index=st.sampled_from([-100, -1]))
        ),
    } | fixed
    if arguments["use_abs_pos_emb"] and arguments["rotary_xpos"] and draw(st.booleans()):
        arguments["decoder_kwargs"] = arguments["decoder_kwargs"] | {"disable_abs_pos_emb": False}
    if arguments["cross_attend"] and draw(st.booleans()):
        arguments["decoder_kwargs"] = arguments["decoder_kwargs"] | {"cross_attn_qk_norm": False}
    return arguments


def attn_layers(heads: int) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy of overrides for an encoder or a decoder: grouped queries, norms, gated feedforwards, ..."""
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    norms = st.sampled_from([{}, {"use_rmsnorm": True}, {"use_scalenorm": True}, {"use_simple_rmsnorm": True}])
    layers = _some_of(
        attn_num_mem_kv=st.integers(1, 2),
        attn_gate_values=st.just(True),
        ff_glu=st.just(True),
        ff_swish=st.just(True),
        ff_mult=st.integers(1, 3),
        ff_no_bias=st.just(True),
        sandwich_norm=st.just(True),
        shift_tokens=st.just(1),
    )
    # x-transformers up to 2.31.10 mixes values with residual values of all heads, which fails with key-value heads.
    values = st.one_of(
        st.builds(lambda kv_heads: {"attn_kv_heads": kv_heads}, st.sampled_from(divisors)),
        st.sampled_from([{}, {"add_value_residual": True}]),
    )
    dim_head = {"attn_dim_head": DIM_HEAD}
    return st.builds(lambda norm, value, layer: dim_head | norm | value | layer, norms, values, layers)


def _some_of(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keywords)


@st.composite
def batches(draw: st.DrawFn, config: PalmEConfig) -> tuple[Tensor, Tensor]:
    """Draw images `(b, c, h, w)` or `(b, m, c, h, w)` and texts `(b, n)` with some ignored ids, for `config`."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    b = draw(st.integers(1, 3))
    several = draw(st.sampled_from([(), (2,)]))
    img = torch.randn(b, *several, config.channels, config.image_size, config.image_size, generator=generator)
    n = draw(st.integers(2, 10))
    text = torch.randint(config.num_tokens, (b, n), generator=generator)
    ignored = torch.rand(b, n, generator=generator) < 0.2
    ignored[0, 1] = False
    return img, text.masked_fill(ignored, config.ignore_index)


def broken_arguments() -> st.SearchStrategy[tuple[dict[str, Any], type[Exception], str]]:
    """Return a strategy of keywords that break one rule of `PalmEConfig`, the error they raise, and its message."""
    sizes = st.sampled_from([argument.name for argument in fields(PalmEConfig) if argument.type == "int"])
    flags = st.sampled_from([argument.name for argument in fields(PalmEConfig) if argument.type == "bool"])
    not_positive = st.builds(
        lambda name, value: ({name: value}, ValueError, f"{name}={value} must be a positive int: use 1 or more"),
        sizes,
        st.integers(max_value=0),
    )
    no_int = st.builds(
        lambda name, value: ({name: value}, TypeError, f"{name}={value!r} must be a positive int, not "),
        sizes,
        st.one_of(st.booleans(), st.floats(), st.text(), st.none()),
    )
    no_bool = st.builds(
        lambda name, value: ({name: value}, TypeError, f"{name}={value!r} must be True or False, not "),
        flags,
        st.one_of(st.integers(), st.none(), st.text()),
    )
    no_divisor = st.builds(
        lambda patch_size, patches, extra: (
            {"patch_size": patch_size, "image_size": patch_size * patches + min(extra, patch_size - 1)},
            ValueError,
            f"must be divisible by patch_size={patch_size}: an image is cut into whole patches; use image_size=",
        ),
        st.integers(2, 64),
        st.integers(1, 8),
        st.integers(1, 63),
    )
    too_many_alibi_heads = st.builds(
        lambda heads, more: (
            {"decoder_heads": heads, "alibi_num_heads": heads + more},
            ValueError,
            f"alibi_num_heads={heads + more} must be within 1..decoder_heads={heads} when alibi_pos_bias is on",
        ),
        st.integers(1, 16),
        st.integers(1, 100),
    )
    kv_heads = st.builds(
        lambda part, kv_heads: (
            {f"{part}_kwargs": {"attn_kv_heads": kv_heads}},
            ValueError,
            f"{part}_kwargs['attn_kv_heads']={kv_heads} must divide {part}_heads=8",
        ),
        st.sampled_from(["encoder", "decoder"]),
        st.sampled_from([3, 5, 6, 7, 9, 16]),
    )
    return st.one_of(not_positive, no_int, no_bool, no_divisor, too_many_alibi_heads, kv_heads)
