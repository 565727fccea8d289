"""Show where a model looks: the cross-attention of each token or word, as maps over the patches of the image."""

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from x_transformers.x_transformers import Attention

from palme_xt.config import is_int
from palme_xt.decoding.loop import evaluating
from palme_xt.inputs import check_batches, check_text
from palme_xt.model import PalmE


def cross_attention_maps(model: PalmE, img: Tensor, text: Tensor, layer: int = -1) -> Tensor:
    """Return how much the position that predicts each token attends to each patch, averaged over heads.

    Args:
        model: A model that cross-attends, with or without `attn_flash`. It is not changed.
        img: Images `(b, c, h, w)`, one per text, as in `PalmE.encode`.
        text: Token ids `(b, n)`, BOS first, n >= 2, without `ignore_index`.
        layer: Index of the cross-attention in the order of execution. Negative indices count from the last. A block
            that runs several times counts each time.

    Returns:
        `(b, n - 1, rows, columns)`, float32, rows = columns = image_size / patch_size. The map at t - 1 is that of the
        position that predicts token t. It sums to 1 if attention is a softmax over the patches alone. Other keys
        (memory key-values, a zero key, a sink) have no place in the image: their share is left out, and the rest is
        not scaled up to 1.

    Raises:
        TypeError: If `img` or `text` has the wrong type.
        ValueError: If the model does not cross-attend, there is no such layer, `img` or `text` has the wrong shape or
            values, or memory tokens are placed within the text.
    """
    config = model.config
    if not config.cross_attend:
        raise ValueError("model has cross_attend=False, must be True: there are no maps without cross-attention")
    check_text(text, config)
    if (text == config.ignore_index).any():
        rule = "must hold only token ids: group texts by length"
        raise ValueError(f"text has ignore_index={config.ignore_index}, {rule}")
    rows = config.image_size // config.patch_size
    net = model.decoder.net
    calls: list[tuple[Any, tuple[Tensor, ...], dict[str, Any]]] = []
    with evaluating(model):
        context = model.encode(img)
        check_batches(context, text, img)
        if context.shape[1] != rows**2 or config.external_encoder is not None:
            found = f"model encodes img of shape {tuple(img.shape)} to {context.shape[1]} embeddings"
            remedy = "pass one image per text, without a hook that adds or drops embeddings, and use the config's ViT"
            raise ValueError(f"{found}, must be {rows}x{rows}, one per patch: {remedy}")
        with contextlib.ExitStack() as hooks:
            for module in net.attn_layers.modules():
                if isinstance(module, Attention) and not module.causal:
                    hook = module.attend.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
                    hooks.enter_context(hook)
            net(text[:, :-1].long(), context=context)
        if not (is_int(layer) and -len(calls) <= layer < len(calls)):
            rule = f"must be an int within {-len(calls)}..{len(calls) - 1}, one per cross-attention"
            raise ValueError(f"layer={layer!r} {rule}")
        attend, (q, k, _), keywords = calls[layer]
        positions = net.num_memory_tokens + text.shape[1] - 1
        if q.shape[-2] != positions:
            rule = f"must be {positions}, its memory tokens and text's"
            remedy = "build it without memory_tokens_interspersed_every"
            raise ValueError(f"model attends from {q.shape[-2]} positions, {rule}: {remedy}")
        # Flash attention does not return its weights, but with the identity as values, its output is the weights.
        identity = torch.eye(k.shape[-2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        weights, _ = attend(q, k, identity, **keywords)
    # Memory keys come before the patches, memory tokens before the text.
    maps: Tensor = weights[:, :, 1 - text.shape[1] :, -(rows**2) :].float().mean(dim=1)
    return rearrange(maps, "b n (r c) -> b n r c", r=rows)


def words(pieces: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Return the words of a text, each with the indices of the tokens that it comes from.

    Args:
        pieces: The text that each generated token completed, in order. A token that completed nothing, '', belongs to
            the next one that did.

    Returns:
        The words, separated by whitespace, in order. A token that wrote parts of several words belongs to each of them.
    """
    writers: list[list[int]] = []  # the tokens that wrote each character
    waiting: list[int] = []
    for index, piece in enumerate(pieces):
        waiting.append(index)
        writers += [waiting] * len(piece)
        if piece:
            waiting = []
    found = re.finditer(r"\S+", "".join(pieces))
    return [(word[0], sorted(set().union(*writers[word.start() : word.end()]))) for word in found]


def word_maps(maps: Tensor, words: Sequence[tuple[str, Sequence[int]]]) -> Tensor:
    """Return the mean map of each word's tokens.

    Args:
        maps: `(n - 1, rows, columns)`, the maps of one text from `cross_attention_maps`.
        words: The result of the function `words`.

    Returns:
        `(number of words, rows, columns)`.

    Raises:
        ValueError: If a token of a word has no map.
    """
    for word, tokens in words:
        if not all(0 <= token < len(maps) for token in tokens):
            rule = f"must be within 0..{len(maps) - 1}: pass the maps of the text"
            raise ValueError(f"words has {word!r} of tokens {tokens}, {rule}")
    return torch.cat([maps[:0], *(maps[list(tokens)].mean(dim=0, keepdim=True) for _, tokens in words)])
