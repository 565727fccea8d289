"""The x-transformers keyword that each argument of PalmE sets, and the other keywords that x-transformers accepts."""

import inspect
from functools import cache
from typing import Any

import palme_xt.upstream  # noqa: F401  # first: it warns about an unsupported release, whose import may fail

# isort: split
from x_transformers import AutoregressiveWrapper, TransformerWrapper, ViTransformerWrapper
from x_transformers.x_transformers import Attention, AttentionLayers, FeedForward

# For each part of the model, upstream's keyword -> the argument that sets it. This table is written once: the model is
# built from it, overrides are checked against it, and the README's table is tested against it.
MAPPING: dict[str, dict[str, str]] = {
    "vit": {"image_size": "image_size", "patch_size": "patch_size"},
    "encoder": {"dim": "encoder_dim", "depth": "encoder_depth", "heads": "encoder_heads"},
    "transformer": {"num_tokens": "num_tokens", "max_seq_len": "max_seq_len", "use_abs_pos_emb": "use_abs_pos_emb"},
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

# Keywords that the composition itself passes, or that upstream's Encoder and Decoder fix.
SET_BY_COMPOSITION = ("attn_layers", "net", "causal")

_WRAPPERS = {"vit": ViTransformerWrapper, "transformer": TransformerWrapper, "autoregressive": AutoregressiveWrapper}
_LAYERS = {"attn_": Attention, "cross_attn_": Attention, "ff_": FeedForward}

# What `AttentionLayers.__init__` itself passes to every layer, as it does `output_proj_depth` (x-transformers 2.26.0 to
# 2.31.10). A keyword that repeats one of these behind its prefix is an error in Python, or silently wrong.
_SET_BY_ATTENTION_LAYERS = {
    "attn_": "dim dim_context heads causal qkv_receive_diff_residuals learned_value_residual_mix rotate_num_heads",
    "cross_attn_": "dim heads",
    "ff_": "dim",
}
_BARE = {prefix + name: name for prefix, names in _SET_BY_ATTENTION_LAYERS.items() for name in names.split()}
_BARE |= {f"{prefix}output_proj_depth": "output_proj_depth" for prefix in _LAYERS}


@cache
def upstream_keywords(part: str) -> dict[str, Any]:
    """Return the keywords of the installed x-transformers for a part of the model, with their defaults."""
    keywords = _parameters(_WRAPPERS.get(part, AttentionLayers))
    if part not in _WRAPPERS:
        for prefix, layer in _LAYERS.items():
            keywords |= {prefix + name: default for name, default in _parameters(layer).items()}
    return {name: default for name, default in keywords.items() if name not in (*SET_BY_COMPOSITION, *_BARE)}


def argument_behind(part: str, keyword: str) -> str | None:
    """Return the argument that sets an upstream keyword. `attn_heads` is set by what sets `heads`."""
    return MAPPING[part].get(_BARE.get(keyword, keyword))


def _parameters(constructor: type) -> dict[str, Any]:
    parameters = inspect.signature(constructor).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD}
