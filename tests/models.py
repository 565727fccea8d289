"""A small model and batches for it, for tests that are not about the configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from palme_xt import PalmE

SMALL: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "encoder_dim": 24,
    "encoder_depth": 2,
    "encoder_heads": 2,
    "num_tokens": 32,
    "max_seq_len": 16,
    "decoder_dim": 32,
    "decoder_depth": 2,
    "decoder_heads": 4,
    "alibi_num_heads": 2,
    "encoder_kwargs": {"attn_dim_head": 8, "verbose": False},
    "decoder_kwargs": {"attn_dim_head": 8, "verbose": False},
}


def small(seed: int = 0, **arguments: Any) -> PalmE:
    """Return a small model whose weights are large enough for every part to affect the logits."""
    for name in "encoder_kwargs", "decoder_kwargs":
        arguments[name] = SMALL[name] | arguments.get(name, {})
    torch.manual_seed(seed)
    model = PalmE(**SMALL | arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def batch(model: PalmE, b: int = 2, n: int = 10, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return images and texts for the model."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    img = torch.randn(b, config.channels, config.image_size, config.image_size, generator=generator)
    return img, torch.randint(config.num_tokens, (b, n), generator=generator)


def logits(model: nn.Module, img: Tensor | None, text: Tensor, **kwargs: Any) -> Tensor:
    """Return the logits `(b, n - 1, num_tokens)` of a full forward."""
    _, (values, _) = model(img, text, return_outputs=True, **kwargs)
    return values  # type: ignore[no-any-return]
