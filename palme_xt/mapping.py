"""Which x-transformers keyword each argument of PalmE sets, and which other keywords x-transformers accepts."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import palme_xt.upstream  # noqa: F401  # first: it warns of an unsupported release, whose import may fail

# isort: split
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.x_transformers import (
    Attention,
    AttentionLayers,
    FeedForward,
    TransformerWrapper,
    ViTransformerWrapper,
)

# For each part of the model: upstream's keyword -> the argument that sets it. This table is written once: the model is
# built from it, overrides are checked against it, and the README's table is tested against it.
MAPPING: dict[str, dict[str, str]] = {
    "vit": {
        "image_size": "image_size",
        "patch_size": "patch_size",
    },
    "encoder": {
        "dim": "encoder_dim",
        "depth": "encoder_depth",
        "heads": "encoder_heads",
    },
    "transformer": {
        "num_tokens": "num_tokens",
        "max_seq_len": "max_seq_len",
        "use_abs_pos_emb": "use_abs_pos_emb",
    },
    "decoder": {
        "dim": "decoder_dim",
        "depth": "decoder_depth",
        "heads": "decoder_heads",
        "cross_attend": "cross_attend",
        "cross_attn_dim_context": "encoder_dim",
        "alibi_pos_bias": "alibi_pos_bias",
        "alibi_num_heads": "alibi_num_heads",
        "rotary_xpos": "rotary_xpos",
        "attn_flash": "attn_flash",
        "attn_qk_norm": "qk_norm",
    },
    "autoregressive": {},
}

# What the composition itself passes, or upstream's Encoder and Decoder fix.
SET_BY_COMPOSITION = {
    "vit": "attn_layers",
    "encoder": "causal",
    "transformer": "attn_layers",
    "decoder": "causal",
    "autoregressive": "net",
}

WRAPPERS = {"vit": ViTransformerWrapper, "transformer": TransformerWrapper, "autoregressive": AutoregressiveWrapper}
LAYERS = {"attn_": Attention, "cross_attn_": Attention, "ff_": FeedForward}

# What `AttentionLayers.__init__` itself passes to every layer (x-transformers 2.26.0 to 2.31.10): given again behind a
# prefix, Python refuses the call.
_SET_BY_ATTENTION_LAYERS = {
    "attn_": {"dim", "dim_context", "heads", "causal", "qkv_receive_diff_residuals", "learned_value_residual_mix"}
    | {"rotate_num_heads", "output_proj_depth"},
    "cross_attn_": {"dim", "heads", "output_proj_depth"},
    "ff_": {"dim", "output_proj_depth"},
}


@cache
def upstream_keywords(part: str) -> dict[str, Any]:
    """Return the keywords that the installed x-transformers accepts for a part of the model, with their defaults."""
    keywords = _parameters(WRAPPERS.get(part, AttentionLayers))
    if part not in WRAPPERS:
        for prefix, layer in LAYERS.items():
            taken = _SET_BY_ATTENTION_LAYERS[prefix]
            keywords |= {prefix + name: default for name, default in _parameters(layer).items() if name not in taken}
    keywords.pop(SET_BY_COMPOSITION[part], None)
    return keywords


def argument_behind(part: str, keyword: str) -> str | None:
    """Return the argument that sets an upstream keyword, also one like `attn_heads`, which upstream derives itself."""
    arguments = MAPPING[part]
    for prefix, names in _SET_BY_ATTENTION_LAYERS.items():
        if keyword not in arguments and keyword.startswith(prefix) and keyword.removeprefix(prefix) in names:
            return arguments.get(keyword.removeprefix(prefix))
    return arguments.get(keyword)


def _parameters(upstream: type) -> dict[str, Any]:
    parameters = inspect.signature(upstream).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD}
