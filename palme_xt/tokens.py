"""Text as bytes: a vocabulary that needs no training and knows every language."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

BOS = 256
EOS = 257
NUM_TOKENS = 258


def encode(texts: Sequence[str], *, ignore_index: int = -100) -> Tensor:
    """Token ids `(b, n)`, int64: BOS, the UTF-8 bytes, EOS, then `ignore_index` up to the longest of `texts`."""
    ids = [torch.tensor([BOS, *text.encode(), EOS]) for text in texts]
    return pad_sequence(ids, batch_first=True, padding_value=ignore_index)


def decode(ids: Iterable[int]) -> str:
    """The text of token ids up to the first EOS; what is no byte is skipped, what is no UTF-8 becomes U+FFFD."""
    text = bytearray()
    for token in ids:
        if token == EOS:
            break
        if 0 <= token < 256:
            text.append(token)
    return text.decode(errors="replace")


def printable(text: str) -> str:
    """The text on one line: what no terminal or picture can show, line breaks too, becomes U+FFFD."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
