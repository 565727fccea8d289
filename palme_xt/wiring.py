"""The tree of x-transformers classes that a model consists of: written once, built here, printed by `source.py`."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

from torch import nn
from x_transformers import ViTransformerWrapper

from palme_xt.config import PalmEConfig
from palme_xt.upstream.loss import AutoregressiveWrapper
from palme_xt.upstream.modules import Decoder, Encoder, TransformerWrapper


class Node(NamedTuple):
    """A class of x-transformers, or a subclass of the same name, and the modules that it holds.

    Attributes:
        part: The part of the config that holds its keywords.
        upstream: The class.
        modules: The nodes that are passed to it, by keyword.
    """

    part: str
    upstream: type
    modules: Mapping[str, "Node"] = {}


ENCODER = Node("vit", ViTransformerWrapper, {"attn_layers": Node("encoder", Encoder)})
_NET = Node("transformer", TransformerWrapper, {"attn_layers": Node("decoder", Decoder)})
DECODER = Node("autoregressive", AutoregressiveWrapper, {"net": _NET})
_WHOLE = {"vit": "encoder", "autoregressive": "decoder"}  # which of the model's two modules a node builds


def build(node: Node, config: PalmEConfig) -> Any:
    """Return the module of `node`, newly initialised.

    Raises:
        ValueError: If upstream rejects a value or a combination of values in the override dicts.
    """
    modules = {keyword: build(child, config) for keyword, child in node.modules.items()}
    keywords = config.keywords(node.part)
    try:
        module = node.upstream(**keywords, **modules)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in keywords.items())
        rejected = f"x-transformers {version('x-transformers')} rejects {node.upstream.__name__}({given})"
        raise ValueError(f"{rejected}: {str(error) or 'it gives no reason'}") from error
    if layers := config.torch_layers.get(_WHOLE.get(node.part, "")):
        from palme_xt.upstream.torch_layers import use_torch_layers  # imported here, because few models need it

        use_torch_layers(module, **{name: value for name, value in layers.items() if name != "activation"})
    return module


def name_encoder(encoder: Any, said: str | None) -> str | None:
    """Return the `external_encoder` of a config for what `PalmE(encoder=...)` is given.

    Args:
        encoder: A module, None for no encoder, or "config" for that of the config.
        said: The `external_encoder` that a config already has.

    Raises:
        TypeError: If `encoder` is none of these.
        ValueError: If the config says that the encoder is another one.
    """
    if encoder == "config" and said in (None, "none"):
        return said
    if not (encoder in (None, "config") or isinstance(encoder, nn.Module)):
        remedy = 'pass the model itself; for timm, timm.create_model(..., num_classes=0, global_pool="")'
        raise TypeError(f"encoder is a {type(encoder).__name__}, must be a torch.nn.Module or None: {remedy}")
    kind = type(encoder)
    name = {None: "none", "config": "not given"}.get(encoder, f"{kind.__module__}.{kind.__qualname__}")
    if said not in (None, name):
        remedy = "pass encoder=module, as it was when the config was made, because it is not built from the config"
        raise ValueError(f"encoder is {name}, must be what external_encoder={said!r} says: {remedy}")
    return name
