"""The tree of x-transformers classes that a model consists of: written once, built here, printed by `source.py`."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

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
# Where the module of each part is in a model.
PATHS = {"vit": "encoder", "encoder": "encoder.attn_layers", "autoregressive": "decoder"}
PATHS |= {"transformer": "decoder.net", "decoder": "decoder.net.attn_layers"}


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
    if layers := config.torch_layers.get(PATHS[node.part]):
        from palme_xt.upstream.torch_layers import use_torch_layers  # imported here, because few models need it

        use_torch_layers(module, **{name: value for name, value in layers.items() if name != "activation"})
    return module
