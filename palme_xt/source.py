"""A config as the program that a person would write: upstream's imports, and nothing that upstream defaults to."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.x_transformers import (
    Attention,
    AttentionLayers,
    FeedForward,
    TransformerWrapper,
    ViTransformerWrapper,
)

import palme_xt
from palme_xt.config import PalmEConfig
from palme_xt.frozen import to_json_types
from palme_xt.upstream import cached_decoder

WIDTH = 88  # ruff's and black's default line length


@dataclass
class Call:
    """A call to print, of keyword arguments in reading order."""

    name: str
    keywords: Mapping[str, Any]


def to_source(config: PalmEConfig, weights: str | None = None) -> str:
    """A self-contained Python program that builds the encoder and the decoder of `config`.

    Args:
        config: what to build.
        weights: a safetensors file that the program loads into them, as a run folder has; None for new weights.

    Returns:
        The text of the program, formatted as ruff does with its defaults. It imports torch and x_transformers, and
        safetensors for the weights.

    Raises:
        TypeError: an override that has no literal form.
    """
    for part in ("vit", "encoder", "transformer", "decoder", "autoregressive"):
        to_json_types(getattr(config, f"{part}_kwargs"), f"{part}_kwargs")
    encoder = Call(
        "ViTransformerWrapper",
        _needed(config.for_vit(), ViTransformerWrapper)
        | {"attn_layers": Call("Encoder", _layers(config.for_encoder()))},
    )
    decoder = Call(
        "AutoregressiveWrapper",
        {
            "net": Call(
                "TransformerWrapper",
                _needed(config.for_transformer(), TransformerWrapper)
                | {"attn_layers": Call("Decoder", _layers(config.for_decoder()))},
            )
        }
        | _needed(config.for_autoregressive(), AutoregressiveWrapper),
    )
    rotary = config.rotary_xpos or config.decoder_kwargs.get("rotary_pos_emb")
    own_decoder = bool(config.alibi_pos_bias and rotary)
    names = ["AutoregressiveWrapper", "Decoder", "Encoder", "TransformerWrapper", "ViTransformerWrapper"]
    if own_decoder:
        names.remove("Decoder")
    sections = [
        f'"""PalmE as an x-transformers program, printed by palme_xt {palme_xt.__version__}."""\n',
        _imports(names, own_decoder, weights),
        *([f"\n{inspect.getsource(cached_decoder.Decoder)}\n"] if own_decoder else []),
        _assign("encoder", encoder),
        _assign("decoder", decoder),
        *([_load(weights)] if weights else []),
        *([FORWARD] if config.cross_attend else []),
    ]
    return "\n".join(sections)


FORWARD = '''
def forward(img, text, **kwargs):
    """The loss of text `(b, n)` about images `(b, c, h, w)`."""
    context = encoder(img, return_embeddings=True)
    return decoder(text, context=context, **kwargs)
'''


def _imports(names: list[str], own_decoder: bool, weights: str | None) -> str:
    lines = []
    if own_decoder:
        lines += ["from typing import Any", "", "import torch", "import x_transformers"]
    if weights:
        lines += ["from safetensors.torch import load_file"]
    flat = f"from x_transformers import {', '.join(names)}"
    wrapped = "\n".join(["from x_transformers import (", *(f"    {name}," for name in names), ")"])
    return "\n".join([*lines, flat if len(flat) <= WIDTH else wrapped, ""])


def _load(weights: str) -> str:
    return f"""weights = load_file({json.dumps(weights)})
for prefix, module in {{"encoder.": encoder, "decoder.": decoder}}.items():
    names = [name for name in weights if name.startswith(prefix)]
    module.load_state_dict({{name.removeprefix(prefix): weights[name] for name in names}})
"""


def _needed(keywords: Mapping[str, Any], upstream: type) -> dict[str, Any]:
    """The keywords that differ from the defaults of `upstream`."""
    parameters = inspect.signature(upstream).parameters
    return {name: value for name, value in keywords.items() if not _same(parameters[name].default, value)}


def _layers(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of an Encoder or Decoder that differ from what upstream does without them."""
    defaults = {name: p.default for name, p in inspect.signature(AttentionLayers).parameters.items()}
    for prefix, layer in ("attn_", Attention), ("cross_attn_", Attention), ("ff_", FeedForward):
        for name, parameter in inspect.signature(layer).parameters.items():
            defaults.setdefault(prefix + name, parameter.default)
    # Not in a signature: the heads that ALiBi biases are all, and a context is as wide as the decoder.
    defaults |= {"alibi_num_heads": keywords["heads"], "cross_attn_dim_context": keywords["dim"]}
    # What `attn_` sets reaches cross-attention too: there, a default may be meant.
    inherited = {
        name for name in keywords if name.startswith("cross_attn_") and name.removeprefix("cross_") in keywords
    }
    unused = set()
    if not keywords.get("alibi_pos_bias"):
        unused.add("alibi_num_heads")
    if not keywords.get("cross_attend"):
        unused.add("cross_attn_dim_context")
    return {
        name: value
        for name, value in keywords.items()
        if name not in unused and (name in inherited or not _same(defaults[name], value))
    }


def _same(default: Any, value: Any) -> bool:
    return type(default) is type(value) and bool(default == value)


def _assign(name: str, value: Call) -> str:
    return f"{name} = {_render(value, indent=0, before=len(name) + 3, after=0)}\n"


def _render(value: Any, indent: int, before: int, after: int) -> str:
    """`value` on one line if it fits between so many characters before and after it, else one item a line."""
    if isinstance(value, Call):
        opening, closing = f"{value.name}(", ")"
        items = [("" if name == "net" else f"{name}=", item) for name, item in value.keywords.items()]
    elif isinstance(value, Mapping):
        opening, closing = "{", "}"
        items = [(f"{json.dumps(name)}: ", item) for name, item in value.items()]
    elif isinstance(value, tuple):
        opening, closing = "(", ",)" if len(value) == 1 else ")"
        items = [("", item) for item in value]
    else:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    flat = opening + ", ".join(name + _render(item, 0, -(10**6), 0) for name, item in items) + closing
    if indent + before + len(flat) + after <= WIDTH:
        return flat
    inner = indent + 4
    lines = [f"{' ' * inner}{name}{_render(item, inner, len(name), 1)}," for name, item in items]
    return "\n".join([opening, *lines, " " * indent + closing.lstrip(",")])
