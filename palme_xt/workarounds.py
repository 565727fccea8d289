"""Small subclasses for what x-transformers gets wrong. Each goes when `tests/test_workarounds.py` says it can."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import x_transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from x_transformers import x_transformers as upstream
from x_transformers.attend import Attend

from palme_xt.cached_decoder import Decoder as CachedDecoder


class Encoder(x_transformers.Encoder):
    """`x_transformers.Encoder`, whose modules pickle."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _leave_sdpa_context(self)


class Decoder(CachedDecoder):
    """`x_transformers.Decoder`, which decodes with a cache in every configuration, pickles, and keeps no ALiBi state.

    Arguments, parameters, buffers and full-sequence outputs are upstream's.
    """

    rel_pos: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _leave_sdpa_context(self)
        if isinstance(self.rel_pos, upstream.AlibiPositionalBias):
            slopes = kwargs.get("rel_pos_kwargs", {}).get("slopes")
            self.rel_pos = AlibiPositionalBias(self.rel_pos.heads, self.rel_pos.total_heads, slopes=slopes)


class AlibiPositionalBias(upstream.AlibiPositionalBias):
    """Upstream's bias, without state that changes in forward or is lost on the meta device."""

    slopes: Tensor

    def __init__(self, heads: int, total_heads: int, slopes: Any = None) -> None:
        super().__init__(heads, total_heads, slopes=slopes)
        self._slopes = tuple(self._get_slopes(heads) if slopes is None else slopes)
        self._dtype = self.slopes.dtype

    def forward(self, i: int, j: int) -> Tensor:
        """The bias `(total_heads, i, j)` of the last i of j positions as queries, all j as keys."""
        # x-transformers 1.30 to 2.31.10 keeps the longest bias in a buffer that grows in forward: one more compilation
        # for each length, and different buffers on the ranks of a data-parallel run. These are the same operations.
        query = torch.arange(j - i, j, device=self.slopes.device)
        key = torch.arange(j, device=self.slopes.device)
        bias = (-(key - query[:, None]).abs() * self.slopes).to(self._dtype)
        return F.pad(bias, (0, 0, 0, 0, 0, self.total_heads - self.heads))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # x-transformers 1.30 to 2.31.10: the slopes are in no state dict, so that after `to_empty` they hold garbage,
        # and bfloat16 rounds them. They are a function of the head count: make them anew, in float32 at least.
        super()._apply(fn, recurse)
        self._dtype = self.slopes.dtype
        precise = torch.promote_types(self._dtype, torch.float32)
        self.slopes = Tensor(self._slopes).view(-1, 1, 1).to(self.slopes.device, precise)
        return self


class TransformerWrapper(x_transformers.TransformerWrapper):
    """`x_transformers.TransformerWrapper`, whose copies with tied embeddings use their own embedding, and pickle."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # x-transformers 1.30 to 2.31.10: `to_logits` is then a lambda that holds on to this very instance, also in a
        # deepcopy of it. A bound method is copied and pickled with what it is bound to.
        if kwargs.get("tie_embedding") and not kwargs.get("return_only_embed"):
            self.to_logits = self._tied_logits

    def _tied_logits(self, t: Tensor) -> Tensor:
        logits: Tensor = t @ self.token_emb.emb.weight.t()
        scale = getattr(self, "tie_embedding_scale", None)  # since 2.30.5
        return logits if scale is None else logits * scale


def _leave_sdpa_context(layers: nn.Module) -> None:
    # x-transformers 1.42 to 2.31.10 enters `sdpa_kernel` in every flash attention, to allow the three backends that
    # torch allows anyway, through a partial that does not pickle. Where the user chose backends, they stay.
    default = {SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}
    for attend in layers.modules():
        if isinstance(attend, Attend) and attend.flash and set(attend.sdp_context_manager.args[0]) == default:
            attend.sdp_context_manager = contextlib.nullcontext
