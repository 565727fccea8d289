"""Insert cross-attention into a decoder that has none, without changing what it computes at first."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from x_transformers import x_transformers as upstream

from palme_xt.config import PalmEConfig
from palme_xt.parts import draw_inputs, undisturbed
from palme_xt.wiring import DECODER, build

_LAYERS = "net.attn_layers.layers."


def insert_cross_attention(config: PalmEConfig, decoder: Any) -> tuple[PalmEConfig, Any]:
    """Return the config with `cross_attend=True`, and a copy of the decoder with new cross-attention.

    The output projections of the new layers are zero, so that the logits do not depend on the context at first, as in
    Flamingo's gates (Alayrac et al. 2022, arXiv:2204.14198). A short text is run through both to check this.

    Args:
        config: The config that describes `decoder`.
        decoder: An `x_transformers.AutoregressiveWrapper`, which stays as it is.

    Raises:
        ValueError: If the logits differ, as they do in a decoder that normalises after each layer.
    """
    config = replace(config, cross_attend=True)
    weights = next(decoder.parameters())
    wider = build(DECODER, config).to(weights.device, weights.dtype).train(decoder.training)
    kinds = wider.net.attn_layers.layer_types
    places = [str(place) for place, kind in enumerate(kinds) if kind != "c"]

    def renamed(name: str) -> str:
        number, _, rest = name.removeprefix(_LAYERS).partition(".")
        return f"{_LAYERS}{places[int(number)]}.{rest}" if name.startswith(_LAYERS) else name

    wider.load_state_dict({renamed(name): value for name, value in decoder.state_dict().items()}, strict=False)
    for place, kind in enumerate(kinds):
        for module in wider.net.attn_layers.layers[place].modules() if kind == "c" else ():
            if isinstance(module, upstream.Attention):
                for parameter in module.to_out.parameters():
                    nn.init.zeros_(parameter)
            elif isinstance(module, upstream.LayerScale):
                nn.init.ones_(module.gamma)  # after a projection of zeros, a scale of zero would never learn
    if not _same_logits(wider, decoder, config.encoder_dim):
        rule = "it must normalise before its layers, add them to one plain residual stream, and have to_out"
        raise ValueError(f"cross_attend=True changes what the decoder computes: {rule}")
    trained = {renamed(name): parameter.requires_grad for name, parameter in decoder.named_parameters()}
    for name, parameter in wider.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    return config, wider


@torch.no_grad()
def _same_logits(wider: Any, decoder: Any, width: int) -> bool:
    (text,), _ = draw_inputs(decoder)
    weights = next(decoder.parameters())
    with undisturbed(wider), undisturbed(decoder):
        wider.eval()
        decoder.eval()
        text = text.clamp(min=0).to(weights.device)
        context = torch.randn(len(text), 4, width).to(weights)
        return torch.allclose(wider.net(text, context=context), decoder.net(text), rtol=1e-3, atol=1e-4, equal_nan=True)
