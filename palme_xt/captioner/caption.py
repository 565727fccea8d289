"""Caption images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from palme_xt.captioner.tokenizer import ByteTokenizer, Tokenizer
from palme_xt.model import PalmE

BYTES = ByteTokenizer()


def stream_caption(model: PalmE, img: Tensor, tokenizer: Tokenizer = BYTES, **how: Any) -> Iterator[str]:
    """Yield the caption of one image `(c, h, w)`, the same as from `caption`, piece by piece as it is decoded."""
    piece = tokenizer.pieces()
    start = torch.tensor([tokenizer.bos], device=img.device)
    how = {"temperature": 0.0} | how
    for (token,) in model.stream(img[None], start, model.config.max_seq_len - 1, eos_token=tokenizer.eos, **how):
        if text := piece(int(token)):
            yield text
    if text := piece(tokenizer.eos):
        yield text


def caption_ids(model: PalmE, img: Tensor, tokenizer: Tokenizer = BYTES, **how: Any) -> Tensor:
    """Return the token ids `(b, n)` of captions of images `(b, c, h, w)`, without BOS, with `pad_value` after EOS."""
    how = {"temperature": 0.0} | how
    start = torch.full((len(img), 1), tokenizer.bos, device=img.device)
    return model.generate(img, start, model.config.max_seq_len - 1, eos_token=tokenizer.eos, **how)


def caption(model: PalmE, img: Tensor, tokenizer: Tokenizer = BYTES, **how: Any) -> list[str]:
    """Return captions of images `(b, c, h, w)`, decoded greedily unless keywords of `PalmE.generate` say otherwise."""
    return [tokenizer.decode(row) for row in caption_ids(model, img, tokenizer, **how).tolist()]
