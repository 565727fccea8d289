"""Which config describes modules that were wired by hand: what `PalmE.from_modules` reads off them."""

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

NORMS = {"RMSNorm": "use_rmsnorm", "ScaleNorm": "use_scalenorm", "SimpleRMSNorm": "use_simple_rmsnorm"}


def describe(encoder: Any, decoder: Any) -> PalmEConfig:
    """The config of modules that fit together.

    The 17 arguments are always read. Of the overrides those are that show in the modules' attributes: channels,
    register tokens, head dimensions, key-value heads, norms, gated and bias-free feedforwards, tied embeddings, rotary
    without xPos, `pad_value`, `ignore_index`.

    Raises:
        TypeError: not a `ViTransformerWrapper`, or not an `AutoregressiveWrapper` around a causal decoder.
        ValueError: the decoder's cross-attention takes a context of another width than the encoder gives.
    """
    if not isinstance(encoder, ViTransformerWrapper):
        raise TypeError(f"encoder is a {type(encoder).__name__}, must be an x_transformers.ViTransformerWrapper")
    if not isinstance(decoder, AutoregressiveWrapper) or not isinstance(decoder.net, TransformerWrapper):
        raise TypeError(
            f"decoder is a {type(decoder).__name__}, must be an x_transformers.AutoregressiveWrapper around a "
            "TransformerWrapper"
        )
    net, layers = decoder.net, decoder.net.attn_layers
    if not isinstance(layers, Decoder):
        raise TypeError(f"decoder.net.attn_layers is a {type(layers).__name__}, must be an x_transformers.Decoder")
    self_attention, cross_attention = _attentions(layers)
    width = encoder.attn_layers.dim
    if cross_attention is not None and cross_attention.to_k.in_features != width:
        raise ValueError(
            f"decoder takes a context of width {cross_attention.to_k.in_features}, encoder gives {width}: they must be "
            f"the same, so build the Decoder with cross_attn_dim_context={width}"
        )
    self_attention = self_attention or cross_attention
    rel_pos = getattr(layers, "alibi", None) or layers.rel_pos
    alibi = isinstance(rel_pos, upstream.AlibiPositionalBias)
    rotary = layers.rotary_pos_emb
    has_abs_pos_emb = not isinstance(net.pos_emb, upstream.always)
    decoder_kwargs = _layer_overrides(layers)
    if rotary is not None and rotary.scale is None:
        decoder_kwargs["rotary_pos_emb"] = True
    if rotary is not None and has_abs_pos_emb:
        decoder_kwargs["disable_abs_pos_emb"] = False
    if cross_attention is not None and cross_attention.qk_norm != self_attention.qk_norm:
        decoder_kwargs["cross_attn_qk_norm"] = cross_attention.qk_norm
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
        use_abs_pos_emb=has_abs_pos_emb,
        cross_attend=layers.cross_attend,
        alibi_pos_bias=alibi,
        rotary_xpos=rotary is not None and rotary.scale is not None,
        attn_flash=self_attention.attend.flash,
        qk_norm=self_attention.qk_norm,
        vit_kwargs=_vit_overrides(encoder),
        encoder_kwargs=_layer_overrides(encoder.attn_layers),
        transformer_kwargs={} if isinstance(net.to_logits, nn.Module) else {"tie_embedding": True},
        decoder_kwargs=decoder_kwargs,
        autoregressive_kwargs=_unless({"pad_value": 0, "ignore_index": -100, "mask_prob": 0.0}, decoder),
    )


def _attentions(layers: Any) -> tuple[Any, Any]:
    by_kind: dict[str, Any] = {"a": None, "c": None}
    for kind, (_, layer, _) in zip(layers.layer_types, layers.layers, strict=True):
        if by_kind.get(kind, layer) is None:
            by_kind[kind] = next(module for module in layer.modules() if isinstance(module, upstream.Attention))
    return by_kind["a"], by_kind["c"]


def _depth(layers: Any) -> int:
    kinds = list(layers.layer_types)
    return max(1, kinds.count("a") or kinds.count("c"))


def _unless(defaults: dict[str, Any], module: Any) -> dict[str, Any]:
    return {name: getattr(module, name) for name, default in defaults.items() if getattr(module, name) != default}


def _vit_overrides(encoder: Any) -> dict[str, Any]:
    overrides = {}
    patch_dim = encoder.patch_to_embedding[1].in_features
    if patch_dim != 3 * encoder.patch_size**2:
        overrides["channels"] = patch_dim // encoder.patch_size**2
    if encoder.has_register_tokens:
        overrides["num_register_tokens"] = len(encoder.register_tokens)
    return overrides


def _layer_overrides(layers: Any) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    attention = next(found for found in _attentions(layers) if found is not None)
    if layers.attn_dim_head != DEFAULT_DIM_HEAD:
        overrides["attn_dim_head"] = layers.attn_dim_head
    if attention.kv_heads != attention.heads:
        overrides["attn_kv_heads"] = attention.kv_heads
    norm = type(layers.final_norm).__name__
    if norm in NORMS:
        overrides[NORMS[norm]] = True
    for feedforward in (module for module in layers.modules() if isinstance(module, upstream.FeedForward)):
        first = feedforward.ff[0]
        if isinstance(first, upstream.GLU):
            overrides["ff_glu"] = True
            linear, activation = first.proj, first.act
        else:
            linear, activation = first[0], first[1]
        if isinstance(activation, nn.SiLU):
            overrides["ff_swish"] = True
        if linear.bias is None:
            overrides["ff_no_bias"] = True
        break
    return overrides


def warn_unless_described(config: PalmEConfig, encoder: nn.Module, decoder: nn.Module) -> None:
    """Warn if `config` would build other parameters than the modules have."""
    quiet = {part: getattr(config, part) | {"verbose": False} for part in ("encoder_kwargs", "decoder_kwargs")}
    with torch.device("meta"):
        silent = replace(config, **quiet)
        described = nn.ModuleDict({"encoder": build(ENCODER, silent), "decoder": build(DECODER, silent)})
    modules = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    wanted, found = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (described, modules))
    for name in [*found, *wanted]:
        if wanted.get(name) != found.get(name):
            warnings.warn(
                f"the modules have overrides that cannot be read off them: {name} is {found.get(name, 'missing')}, "
                f"where model.config gives {wanted.get(name, 'none')}; the model works, but from_config builds another",
                stacklevel=3,
            )
            return
