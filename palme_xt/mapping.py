"""What the five override dicts may hold: every keyword the installed x-transformers accepts, and no argument twice."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from palme_xt.upstream.versions import warn_if_unsupported

warn_if_unsupported()  # before anything of an unsupported release is imported, which may fail

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper  # noqa: E402
from x_transformers.x_transformers import (  # noqa: E402
    Attention,
    AttentionLayers,
    FeedForward,
    TransformerWrapper,
    ViTransformerWrapper,
)

# What the composition itself passes, or upstream's own Encoder and Decoder fix.
SET_BY_COMPOSITION = {
    "vit": {"attn_layers"},
    "encoder": {"causal"},
    "transformer": {"attn_layers"},
    "decoder": {"causal"},
    "autoregressive": {"net"},
}

# What `AttentionLayers.__init__` itself passes to every layer (x-transformers 2.26.0 to 2.31.10): given again behind a
# prefix, Python refuses the call.
SET_BY_ATTENTION_LAYERS = {
    "attn_": {
        "dim",
        "dim_context",
        "heads",
        "causal",
        "qkv_receive_diff_residuals",
        "learned_value_residual_mix",
        "rotate_num_heads",
        "output_proj_depth",
    },
    "cross_attn_": {"dim", "heads", "output_proj_depth"},
    "ff_": {"dim", "output_proj_depth"},
}


def _parameters(upstream: type) -> set[str]:
    named = inspect.signature(upstream).parameters.values()
    return {parameter.name for parameter in named if parameter.kind is not parameter.VAR_KEYWORD}


@cache
def known_overrides(part: str) -> frozenset[str]:
    """The keywords that `{part}_kwargs` may hold, read off the installed x-transformers' constructors."""
    if part in ("encoder", "decoder"):
        known = _parameters(AttentionLayers)
        for prefix, layer in ("attn_", Attention), ("cross_attn_", Attention), ("ff_", FeedForward):
            known |= {prefix + name for name in _parameters(layer) - SET_BY_ATTENTION_LAYERS[prefix]}
    else:
        wrappers = {
            "vit": ViTransformerWrapper,
            "transformer": TransformerWrapper,
            "autoregressive": AutoregressiveWrapper,
        }
        known = _parameters(wrappers[part])
    return frozenset(known - SET_BY_COMPOSITION[part])


def check_overrides(part: str, overrides: Any, arguments: Mapping[str, tuple[str, Any]]) -> None:
    """Refuse what cannot be an override.

    Args:
        part: `vit`, `encoder`, `transformer`, `decoder` or `autoregressive`.
        overrides: the user's `{part}_kwargs`.
        arguments: upstream's keyword -> (the argument that sets it, its value).

    Raises:
        TypeError: not a dict with str keys.
        ValueError: a keyword that an argument or the composition sets already, or that upstream does not know.
    """
    where = f"{part}_kwargs"
    if not isinstance(overrides, Mapping):
        raise TypeError(f"{where}={overrides!r} must be a dict of keywords for x-transformers")
    for key, value in overrides.items():
        if not isinstance(key, str):
            raise TypeError(f"{where} has the key {key!r}: keywords must be str, not {type(key).__name__}")
        setter = arguments.get(key) or _setter_behind_prefix(key, arguments)
        if setter:
            name, current = setter
            raise ValueError(
                f"{where}[{key!r}]={value!r} repeats the argument {name}={current!r}: set {name}, and leave "
                f"{key!r} out of {where}"
            )
        if key in SET_BY_COMPOSITION[part]:
            raise ValueError(f"{where}[{key!r}]={value!r} is set by PalmE itself: leave {key!r} out of {where}")
        known = known_overrides(part)
        if key not in known:
            closest = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{where}[{key!r}]={value!r} is not a keyword of the installed x-transformers: "
                f"did you mean {closest!r}?"
            )


def _setter_behind_prefix(key: str, arguments: Mapping[str, tuple[str, Any]]) -> tuple[str, Any] | None:
    """The argument that `attn_heads` or `ff_dim` would repeat: what upstream hands to each layer unprefixed."""
    for prefix, names in SET_BY_ATTENTION_LAYERS.items():
        if key.startswith(prefix) and key.removeprefix(prefix) in names:
            return arguments.get(key.removeprefix(prefix))
    return None
