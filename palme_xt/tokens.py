"""Encode text as UTF-8 bytes: a vocabulary that needs no training and covers every language."""

from collections.abc import Iterable, Sequence
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

BOS, EOS = 256, 257
NUM_TOKENS = 258


def encode(texts: Sequence[str], *, ignore_index: int = -100) -> Tensor:
    """Return token ids `(b, n)`, int64: BOS, the bytes, EOS, then `ignore_index` up to the longest text."""
    ids = [torch.tensor([BOS, *text.encode(), EOS]) for text in texts]
    return pad_sequence(ids, batch_first=True, padding_value=ignore_index)


def decode(ids: Iterable[int]) -> str:
    """Return the text of token ids up to the first EOS, without ids above 255; invalid UTF-8 becomes U+FFFD."""
    until_eos = takewhile(lambda token: token != EOS, ids)
    return bytes(token for token in until_eos if 0 <= token < 256).decode(errors="replace")


def printable(text: str) -> str:
    """Return the text on one line: each line break or other character that cannot be displayed becomes U+FFFD."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
