"""Describe modules that were wired by hand as a config, for `PalmE.from_modules`."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper, ViTransformerWrapper
from x_transformers import x_transformers as upstream

from palme_xt.config import DEFAULT_DIM_HEAD, PalmEConfig
from palme_xt.wiring import DECODER, ENCODER, build

_NORMS = {"RMSNorm": "use_rmsnorm", "ScaleNorm": "use_scalenorm", "SimpleRMSNorm": "use_simple_rmsnorm"}
_AUTOREGRESSIVE = {"pad_value": 0, "ignore_index": -100, "mask_prob": 0.0}  # upstream's defaults


def describe(encoder: Any, decoder: Any) -> PalmEConfig:
    """Return the config of an encoder and a decoder that fit together.

    The 17 arguments are always read. Overrides are read if they show in the modules' attributes: channels, register
    tokens, head dimensions, key-value heads, norms, gated and bias-free feedforwards, tied embeddings, rotary positions
    without xPos, `pad_value`, `ignore_index`, `mask_prob`.

    Raises:
        TypeError: If `encoder` is not a `ViTransformerWrapper`, or `decoder` is not an `AutoregressiveWrapper` around a
            causal decoder.
        ValueError: If the decoder cross-attends to a context whose width is not that of the encoder.
    """
    _check_kind("encoder", encoder, ViTransformerWrapper)
    _check_kind("decoder", decoder, AutoregressiveWrapper)
    _check_kind("decoder.net", decoder.net, TransformerWrapper)
    _check_kind("decoder.net.attn_layers", decoder.net.attn_layers, Decoder)
    net, layers = decoder.net, decoder.net.attn_layers
    attention, cross_attention = _attentions(layers)
    width = encoder.attn_layers.dim
    if cross_attention is not None and cross_attention.to_k.in_features != width:
        raise ValueError(
            f"decoder takes a context of width {cross_attention.to_k.in_features}, must be {width}, the width of the "
            f"encoder: build the Decoder with cross_attn_dim_context={width}"
        )
    rel_pos = getattr(layers, "alibi", None) or layers.rel_pos
    alibi = isinstance(rel_pos, upstream.AlibiPositionalBias)
    return PalmEConfig(
        image_size=round(encoder.pos_embedding.shape[1] ** 0.5) * encoder.patch_size,
        patch_size=encoder.patch_size,
        encoder_dim=width,
        encoder_depth=_depth(encoder.attn_layers),
        encoder_heads=encoder.attn_layers.attn_heads,
        num_tokens=net.num_tokens,
        max_seq_len=net.max_seq_len,
        decoder_dim=layers.dim,
        decoder_depth=_depth(layers),
        decoder_heads=layers.attn_heads,
        alibi_num_heads=rel_pos.heads if alibi else min(4, layers.attn_heads),
        use_abs_pos_emb=not isinstance(net.pos_emb, upstream.always),
        cross_attend=layers.cross_attend,
        alibi_pos_bias=alibi,
        rotary_xpos=layers.rotary_pos_emb is not None and layers.rotary_pos_emb.scale is not None,
        attn_flash=attention.attend.flash,
        qk_norm=attention.qk_norm,
        **_overrides(encoder, decoder),
    )


def warn_unless_described(config: PalmEConfig, encoder: nn.Module, decoder: nn.Module) -> None:
    """Warn if a model built from `config` has different parameters than the modules."""
    quiet = {part: getattr(config, part) | {"verbose": False} for part in ("encoder_kwargs", "decoder_kwargs")}
    config = replace(config, **quiet)
    with torch.device("meta"):
        described = nn.ModuleDict({"encoder": build(ENCODER, config), "decoder": build(DECODER, config)})
    if different := different_shape(nn.ModuleDict({"encoder": encoder, "decoder": decoder}), described):
        name, found, built = different
        warnings.warn(
            f"the modules have overrides that cannot be read from them: {name} is {found}, but {built} in a model "
            "built from model.config; this model works, but PalmE.from_config(model.config) builds a different one",
            stacklevel=3,
        )


def different_shape(first: nn.Module, second: nn.Module) -> tuple[str, Any, Any] | None:
    """Return the first name in the state dicts whose shapes differ, and both shapes.

    Returns:
        The name and the shapes, with "missing" for a shape that one side lacks, or None if all shapes are equal.
    """
    ours, theirs = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (first, second))
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            return name, ours.get(name, "missing"), theirs.get(name, "missing")
    return None


def _check_kind(name: str, module: Any, kind: type) -> None:
    if not isinstance(module, kind):
        raise TypeError(f"{name} is a {type(module).__name__}, must be an x_transformers.{kind.__name__}")


def _attentions(layers: Any) -> tuple[Any, Any]:
    """Return the first self-attention, or else the first cross-attention, and the first cross-attention or None."""
    first: dict[str, Any] = {}
    for kind, (_, layer, _) in zip(layers.layer_types, layers.layers, strict=True):
        if kind in ("a", "c") and kind not in first:
            first[kind] = next(module for module in layer.modules() if isinstance(module, upstream.Attention))
    return first.get("a", first.get("c")), first.get("c")


def _depth(layers: Any) -> int:
    kinds = list(layers.layer_types)
    return max(1, kinds.count("a") or kinds.count("c"))


def _overrides(encoder: Any, decoder: Any) -> dict[str, Any]:
    """Return the five override dicts."""
    net, layers = decoder.net, decoder.net.attn_layers
    attention, cross_attention = _attentions(layers)
    rotary, absolute = layers.rotary_pos_emb, not isinstance(net.pos_emb, upstream.always)
    decoder_only = {
        "rotary_pos_emb": (rotary is not None and rotary.scale is None, False),
        "disable_abs_pos_emb": (rotary is None or not absolute, True),
        "cross_attn_qk_norm": ((cross_attention or attention).qk_norm, attention.qk_norm),
    }
    vit = {
        "channels": (encoder.patch_to_embedding[1].in_features // encoder.patch_size**2, 3),
        "num_register_tokens": (len(encoder.register_tokens) if encoder.has_register_tokens else 0, 0),
    }
    autoregressive = {name: (getattr(decoder, name), default) for name, default in _AUTOREGRESSIVE.items()}
    return {
        "vit_kwargs": _changed(vit),
        "encoder_kwargs": _changed(_of_layers(encoder.attn_layers)),
        "transformer_kwargs": _changed({"tie_embedding": (not isinstance(net.to_logits, nn.Module), False)}),
        "decoder_kwargs": _changed(_of_layers(layers) | decoder_only),
        "autoregressive_kwargs": _changed(autoregressive),
    }


def _of_layers(layers: Any) -> dict[str, tuple[Any, Any]]:
    """Return the overrides that encoders and decoders share, each with upstream's default."""
    attention, _ = _attentions(layers)
    values: dict[str, tuple[Any, Any]] = {
        "attn_dim_head": (layers.attn_dim_head, DEFAULT_DIM_HEAD),
        "attn_kv_heads": (attention.kv_heads, attention.heads),
    }
    for kind, keyword in _NORMS.items():
        values[keyword] = type(layers.final_norm).__name__ == kind, False
    feedforward = next((module for module in layers.modules() if isinstance(module, upstream.FeedForward)), None)
    if feedforward is not None:
        first = feedforward.ff[0]
        gated = isinstance(first, upstream.GLU)
        linear, activation = (first.proj, first.act) if gated else (first[0], first[1])
        values["ff_glu"] = gated, False
        values["ff_swish"] = isinstance(activation, nn.SiLU), False
        values["ff_no_bias"] = linear.bias is None, False
    return values


def _changed(values: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Return the values that differ from their defaults."""
    return {name: value for name, (value, default) in values.items() if value != default}
