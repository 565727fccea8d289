"""Where a model looks: the cross-attention of each token, and of each word, as maps over the image's patches."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from x_transformers.x_transformers import Attention

from palme_xt.decoding import evaluating
from palme_xt.inputs import check_batches, check_img, check_text
from palme_xt.model import PalmE


def cross_attention_maps(model: PalmE, img: Tensor, text: Tensor, layer: int = -1) -> Tensor:
    """How much the position that predicts each token attends to each patch, averaged over heads.

    Args:
        model: one that cross-attends, with or without `attn_flash`; left as it was.
        img: `(b, c, h, w)`, one image a text, as in `PalmE.encode`.
        text: `(b, n)` token ids, BOS first, n >= 2, without `ignore_index`.
        layer: which cross-attention, in the order in which they run; negative counts from the last. A block that runs
            several times counts each time.

    Returns:
        `(b, n - 1, rows, columns)`, float32, rows = columns = image_size / patch_size: the map at t - 1 is of the
        position that predicts token t. It sums to 1 where attention is a softmax over the patches alone. What else
        takes a share (memory key-values, a zero key, a sink) has no place in the image and is left out; the rest is
        not scaled up to 1.

    Raises:
        TypeError: `img`, `text` or `layer` is of the wrong type.
        ValueError: the model does not cross-attend, there is no such layer, `img` or `text` has the wrong shape or
            values, or memory tokens stand within the text.
    """
    config = model.config
    if not config.cross_attend:
        raise ValueError("model has cross_attend=False, must cross-attend: it never looks at an image")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer={layer!r} must be an int, not {type(layer).__name__}")
    check_img(img, config)
    if img.ndim != 4:
        raise ValueError(f"img has shape {tuple(img.shape)}, must be (b, c, h, w): pass one image for each text")
    check_text(text, config)
    check_batches(img, text)
    if (text == config.ignore_index).any():
        raise ValueError(
            f"text has ignore_index={config.ignore_index}, must hold token ids alone: pass texts of other lengths apart"
        )

    rows = config.image_size // config.patch_size
    net = model.decoder.net
    heard: list[tuple[Any, tuple[Tensor, ...], dict[str, Any]]] = []
    with evaluating(model):
        context = model.encode(img)
        if context.shape[1] != rows**2:
            raise ValueError(
                f"model encodes img to {context.shape[1]} embeddings, must be {rows}x{rows}, one for each patch: "
                "remove the hook that adds or drops some"
            )
        with contextlib.ExitStack() as hooks:
            for attention in filter(_crosses, net.attn_layers.modules()):
                hook = attention.attend.register_forward_pre_hook(lambda *call: heard.append(call), with_kwargs=True)
                hooks.enter_context(hook)
            net(text[:, :-1].long(), context=context)
        if not -len(heard) <= layer < len(heard):
            raise ValueError(
                f"layer={layer} must be within {-len(heard)}..{len(heard) - 1}: so many blocks cross-attend"
            )
        attend, (q, k, _), keywords = heard[layer]
        positions = net.num_memory_tokens + text.shape[1] - 1
        if q.shape[-2] != positions:
            raise ValueError(
                f"model attends from {q.shape[-2]} positions, must be {positions}, its memory tokens and text's: "
                "build it without memory_tokens_interspersed_every, which puts memory tokens within the text"
            )
        # Flash attention does not tell its weights. With the identity as values, they are what any attention returns.
        identity = torch.eye(k.shape[-2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        weights, _ = attend(q, k, identity, **keywords)
    # Memory keys come before the patches, memory tokens before the text.
    maps: Tensor = weights[:, :, 1 - text.shape[1] :, -(rows**2) :].float().mean(dim=1)
    return rearrange(maps, "b n (r c) -> b n r c", r=rows)


def _crosses(module: Any) -> bool:
    return isinstance(module, Attention) and not module.causal


def words(pieces: Sequence[str]) -> list[tuple[str, list[int]]]:
    """The words of a text, each with the indices of the tokens that wrote it.

    Args:
        pieces: the text that each generated token released in turn; '' from one that ends within a character, which
            then belongs to the next that releases any.

    Returns:
        What whitespace separates, in order. A token that wrote a part of several words counts for each.
    """
    found: list[tuple[str, list[int]]] = []
    waiting: list[int] = []
    within = False
    for index, piece in enumerate(pieces):
        waiting.append(index)
        for part in re.findall(r"\s+|\S+", piece):
            if part.isspace():
                within = False
                continue
            word, tokens = found.pop() if within else ("", [])
            found.append((word + part, tokens + waiting))
            within = True
        if piece:
            waiting = []
    return found


def word_maps(maps: Tensor, words: Sequence[tuple[str, Sequence[int]]]) -> Tensor:
    """The mean map of each word's tokens.

    Args:
        maps: `(n - 1, rows, columns)`, those of one text from `cross_attention_maps`.
        words: as the function `words` returns them.

    Returns:
        `(number of words, rows, columns)`.

    Raises:
        ValueError: a word is of a token that has no map.
    """
    for word, tokens in words:
        if not all(0 <= token < len(maps) for token in tokens):
            raise ValueError(
                f"words has {word!r} of tokens {list(tokens)}, must be within 0..{len(maps) - 1}, the maps that there "
                "are: pass the words and the maps of one text"
            )
    return torch.cat([maps[:0], *(maps[list(tokens)].mean(dim=0, keepdim=True) for _, tokens in words)])
