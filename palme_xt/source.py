"""Print a config as the program that a person would write: with upstream's classes, and without upstream's defaults."""

import inspect
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import palme_xt
from palme_xt.config import PalmEConfig, to_json_types
from palme_xt.mapping import MAPPING, upstream_keywords
from palme_xt.upstream import cached_decoder, torch_layers
from palme_xt.wiring import DECODER, ENCODER, Node

_WIDTH = 88  # ruff's and black's default line length

_FORWARD = '''
def forward(img, text, **kwargs):
    """Return the loss of text `(b, n)` about images `(b, c, h, w)`."""
    context = encoder(img, return_embeddings=True)
    return decoder(text, context=context, **kwargs)
'''

_FORWARD_IN_SENTENCE = '''
def forward(img, text, **kwargs):
    """Return the loss of text `(b, n)`, where {token} stands for an image `(c, h, w)`.

    Images are `(b, c, h, w)` or `(b, m, c, h, w)`. x-transformers must be 2.30.2 or later.
    """
    images = projection(encoder(img.flatten(0, -4), return_embeddings=True))
    ids = text.where(text != decoder.ignore_index, decoder.pad_value).flatten()
    counts = torch.where(ids == {token}, images.shape[1], 1)
    places = (ids == {token}).repeat_interleave(counts)
    embeds = decoder.net.token_emb(ids).repeat_interleave(counts, dim=0)
    embeds[places] = images.flatten(0, 1)
    embeds = embeds.unflatten(0, (len(text), -1))
    targets = text.flatten().repeat_interleave(counts)
    targets = targets.masked_fill(places, decoder.ignore_index).view(len(text), -1){mask}
    return decoder(targets, transform_token_embeds=lambda _: embeds, **kwargs)
'''

_MASKS = {"causal": ""}
_MASKS["full"] = """
    places = places.view(len(text), -1)
    image = (places.cumsum(dim=1) - 1) // images.shape[1]
    same = places[:, None] & places[..., None] & (image[:, None] == image[..., None])
    kwargs |= {"attn_mask": (same | torch.ones_like(same).tril())[:, None], "causal": False}"""

_LOAD = """weights = load_file({weights})
for prefix, module in {{{modules}}}.items():
    names = [name for name in weights if name.startswith(prefix)]
    module.load_state_dict({{name.removeprefix(prefix): weights[name] for name in names}})
"""


_PARTS = '"encoder.": encoder, "decoder.": decoder'
_PARTS_IN_SENTENCE = """
    "encoder.": encoder,
    "decoder.": decoder,
    "projection.": projection,
"""


class _Call(NamedTuple):
    """A call to print, with its keyword arguments in reading order."""

    name: str
    keywords: Mapping[str, Any]


class _Name(str):
    """An expression to print as it is."""


_ACTIVATIONS = {"gelu_tanh": 'nn.GELU(approximate="tanh")', "quick_gelu": "QuickGELU()", "relu": "nn.ReLU()"}
_CLASSES = ("AutoregressiveWrapper", "Decoder", "Encoder", "TransformerWrapper", "ViTransformerWrapper")
_IMPORTS = {  # by what the rest of a program then has
    "Sequence[": "from collections.abc import Sequence",
    "Any": "from typing import Any\n",
    "torch.": "import torch",
    "x_transformers.": "import x_transformers",
    "load_file(": "from safetensors.torch import load_file",
    "nn.": "from torch import nn",
    "": "from x_transformers import (\n{classes})",
    "upstream.": "from x_transformers import x_transformers as upstream",
}


def to_source(config: PalmEConfig, weights: str | None = None) -> str:
    """Return a self-contained Python program that builds the encoder and the decoder of `config`.

    The program is formatted as ruff formats it by default. It imports torch and x_transformers, and safetensors for the
    weights.

    Args:
        config: The config of the model to build.
        weights: A safetensors file that the program loads, such as that of a run folder. With None, it loads none.

    Raises:
        ValueError: If the config is unproven (see `PalmE.from_modules`), or has an `external_encoder`.
        TypeError: If an override has no literal form.
    """
    if config.external_encoder is not None:
        wrong = f"external_encoder={config.external_encoder!r} cannot be printed, because no argument describes it"
        raise ValueError(f"{wrong}: print dataclasses.replace(config, external_encoder=None), and replace the ViT")
    for part in MAPPING:
        to_json_types(getattr(config, f"{part}_kwargs"), f"{part}_kwargs")
    # Upstream's own Decoder is enough if ALiBi and rotary positions are not both on.
    own_decoder = bool(config.alibi_pos_bias and (config.rotary_xpos or config.decoder_kwargs.get("rotary_pos_emb")))
    activations = [layers.get("activation") for layers in config.torch_layers.values()]
    used: list[Any] = [cached_decoder.Decoder] if own_decoder else []
    used += [torch_layers.QuickGELU] if "quick_gelu" in activations else []
    used += [torch_layers.use_torch_layers] if config.torch_layers else []
    definitions = "\n\n".join(map(inspect.getsource, used))
    projection, forward = [], _FORWARD if config.cross_attend else ""
    if config.image_token is not None:
        width = config.transformer_kwargs.get("emb_dim") or config.decoder_dim
        projection = [f"projection = nn.Linear({config.encoder_dim}, {width})\n"]
        forward = _FORWARD_IN_SENTENCE.format(token=config.image_token, mask=_MASKS[config.image_attention])
    modules = _PARTS_IN_SENTENCE if projection else _PARTS
    sections = [
        f'"""PalmE as an x-transformers program, printed by palme_xt {palme_xt.__version__}."""\n',
        _imports("".join([definitions, *projection, forward, _LOAD if weights else ""])),
        *([f"\n{definitions}\n"] if definitions else []),
        _assign("encoder", _call(ENCODER, config)),
        _assign("decoder", _call(DECODER, config)),
        *(f"{_render(_use_torch_layers(part, config), 0, 0, 0)}\n" for part in config.torch_layers),
        *projection,
        *([_LOAD.format(weights=json.dumps(weights), modules=modules)] if weights else []),
        *([forward] if forward else []),
    ]
    return "\n".join(sections)


def _call(node: Node, config: PalmEConfig) -> _Call:
    keywords, defaults = dict(config.keywords(node.part)), dict(upstream_keywords(node.part))
    # These defaults are in no signature: ALiBi biases all heads, and a context is as wide as the decoder.
    defaults |= {"alibi_num_heads": keywords.get("heads"), "cross_attn_dim_context": keywords.get("dim")}
    for flag, unused in {"alibi_pos_bias": "alibi_num_heads", "cross_attend": "cross_attn_dim_context"}.items():
        if not keywords.get(flag):
            keywords.pop(unused, None)

    if node.part == "decoder" and config.image_attention == "full":
        del keywords["attn_flash"]  # x-transformers 2.26.0 to 2.31.10: it is always causal

    def needed(name: str, value: Any) -> bool:
        # `attn_` keywords also reach cross-attention, where the default may be given to override them.
        inherited = name.startswith("cross_attn_") and name.removeprefix("cross_") in keywords
        return inherited or type(defaults[name]) is not type(value) or bool(defaults[name] != value)

    if activation := config.torch_layers.get(node.part, {}).get("activation"):
        keywords["ff_custom_activation"] = _Name(_ACTIVATIONS[activation])
    modules = {keyword: _call(child, config) for keyword, child in node.modules.items()}
    given = {name: value for name, value in keywords.items() if needed(name, value)}
    return _Call(node.upstream.__name__, modules | given if "net" in modules else given | modules)


def _use_torch_layers(part: str, config: PalmEConfig) -> _Call:
    layers = {name: value for name, value in config.torch_layers[part].items() if name != "activation"}
    return _Call("use_torch_layers", {"part": _Name(part), **layers})


def _imports(definitions: str) -> str:
    """Return the imports of a program with these definitions, which may define one of the classes itself."""
    classes = "".join(f"    {name},\n" for name in _CLASSES if f"class {name}(" not in definitions)
    return "\n".join(line for use, line in _IMPORTS.items() if use in definitions).format(classes=classes) + "\n"


def _assign(name: str, value: _Call) -> str:
    return f"{name} = {_render(value, indent=0, before=len(name) + 3, after=0)}\n"


def _render(value: Any, indent: int, before: int, after: int) -> str:
    """Return `value` on one line if it fits between `before` and `after` characters, otherwise one item per line."""
    if isinstance(value, _Name):
        return value
    if isinstance(value, _Call):
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
    if indent + before + len(flat) + after <= _WIDTH:
        return flat
    inner = indent + 4
    lines = [f"{' ' * inner}{name}{_render(item, inner, len(name), 1)}," for name, item in items]
    return "\n".join([opening, *lines, " " * indent + closing.lstrip(",")])
