"""Images to captions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from palme_xt.captioner.tokenizer import ByteTokenizer, Tokenizer
from palme_xt.model import PalmE

BYTES = ByteTokenizer()


def stream_caption(model: PalmE, img: Tensor, tokenizer: Tokenizer = BYTES, **how: Any) -> Iterator[str]:
    """The text that `caption` returns for one image `(c, h, w)`, piece by piece as it is decoded."""
    piece = tokenizer.pieces()
    start = torch.tensor([tokenizer.bos], device=img.device)
    how = {"temperature": 0.0} | how
    for (token,) in model.stream(img[None], start, model.config.max_seq_len - 1, eos_token=tokenizer.eos, **how):
        if text := piece(int(token)):
            yield text
    if text := piece(tokenizer.eos):
        yield text


def caption_ids(model: PalmE, img: Tensor, tokenizer: Tokenizer = BYTES, **how: Any) -> Tensor:
    """Token ids `(b, n)` of captions of images `(b, c, h, w)`, without BOS; after EOS comes the model's `pad_value`."""
    how = {"temperature": 0.0} | how
    start = torch.full((len(img), 1), tokenizer.bos, device=img.device)
    return model.generate(img, start, model.config.max_seq_len - 1, eos_token=tokenizer.eos, **how)


def caption(model: PalmE, img: Tensor, tokenizer: Tokenizer = BYTES, **how: Any) -> list[str]:
    """Captions of images `(b, c, h, w)`, greedily decoded, or as the keywords of `PalmE.generate` say."""
    return [tokenizer.decode(row) for row in caption_ids(model, img, tokenizer, **how).tolist()]
