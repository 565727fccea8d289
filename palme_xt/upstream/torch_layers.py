"""Torch's own layers in upstream's modules, for weights that x-transformers has no keyword for.

`source.py` prints `QuickGELU` and `use_torch_layers` into programs, which is why their lines have at most 88 columns.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from x_transformers import x_transformers as upstream

BIASED = ("to_q", "to_k", "to_v", "to_out", "to_logits")
NORMS = ("LayerNorm", "RMSNorm")


class QuickGELU(nn.Module):
    """The activation of OpenAI's CLIP, `x * sigmoid(1.702 x)`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activation of each entry."""
        return x * torch.sigmoid(1.702 * x)


# What makes a new one, for upstream's `ff_custom_activation`.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
}


def check_torch_layers(given: Any) -> None:
    """Reject anything but a dict of keywords of `use_torch_layers`, or "activation", for "encoder" and "decoder".

    Raises:
        ValueError, TypeError: With the name `torch_layers`.
    """
    rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "norm": (f"must be one of {', '.join(NORMS)}", lambda value: value in NORMS),
        "eps": ("must be a positive number", lambda value: isinstance(value, int | float) and value > 0),
        "bias": (f"must hold only {', '.join(BIASED)}", lambda value: type(value) is tuple and {*value} <= {*BIASED}),
        "activation": (f"must be one of {', '.join(ACTIVATIONS)}", lambda value: value in ACTIVATIONS),
        "patch_norm": ("must be True or False", lambda value: isinstance(value, bool)),
    }
    if not isinstance(given, Mapping):
        raise TypeError(f"torch_layers={given!r} must be a dict of dicts, for 'encoder' and 'decoder'")
    for part, layers in given.items():
        if part not in ("encoder", "decoder") or not isinstance(layers, Mapping):
            raise ValueError(f"torch_layers[{part!r}]={layers!r} must be a dict, for 'encoder' or 'decoder'")
        for name, value in layers.items():
            rule, kept = rules.get(name, (f"is unknown: use {', '.join(rules)}", lambda value: False))
            if not kept(value):
                raise ValueError(f"torch_layers[{part!r}][{name!r}]={value!r} {rule}")
            if part == "decoder" and name == "patch_norm":
                raise ValueError(f"torch_layers['decoder']['patch_norm']={value!r} is for the encoder: leave it out")


def use_torch_layers(
    part: Any,
    norm: str | None = None,
    eps: float = 1e-5,
    bias: Sequence[str] = (),
    patch_norm: bool = True,
) -> None:
    """Replace layers of an encoder or a decoder by torch's, with ones and zeros.

    Args:
        part: A `ViTransformerWrapper`, or an `AutoregressiveWrapper`.
        norm: "LayerNorm", which has a bias here, or "RMSNorm", for each norm of the
            residual stream. "RMSNorm" also stands for those without a gain, as in the
            norms of queries and keys. None keeps upstream's: without a bias, with a
            fixed eps.
        eps: What these norms add to the variance.
        bias: The projections that get a bias: "to_q", "to_k", "to_v" and "to_out" of
            each attention, and "to_logits".
        patch_norm: False removes the norms around the projection of the patches.
    """
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if norm and isinstance(child, upstream.LayerNorm | upstream.RMSNorm):
                (gain,) = child.parameters()
                setattr(module, name, getattr(nn, norm)(len(gain), eps=eps))
            elif norm == "RMSNorm" and isinstance(child, upstream.SimpleRMSNorm):
                size = round(child.scale**2)
                setattr(module, name, nn.RMSNorm(size, eps, elementwise_affine=False))
            elif name in bias:
                # With `attn_on_attn`, a gate follows the projection.
                linear: Any = child[0] if isinstance(child, nn.Sequential) else child
                linear.bias = nn.Parameter(torch.zeros(linear.out_features))
    if not patch_norm:
        part.patch_to_embedding[0] = part.patch_to_embedding[2] = nn.Identity()
