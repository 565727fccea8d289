"""Upstream's attention core, changed so that it accepts a bias that is already causal, and can be pickled."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from x_transformers import attend as upstream

EXTRA = 8  # dimensions: CUDA's flash attention takes multiples of eight
UNIT = 32.0  # of the biases there, so that 10**5 is finite in float16
DEFAULT_BACKENDS = {SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}


class Attend(upstream.Attend):
    """`x_transformers.attend.Attend`, whose flash attention respects `causal=False`, and which can be pickled.

    Args:
        attend: The module to replace, whose whole state is taken over.

    Attributes:
        bias_in_keys: Make `attn_bias (h, 1, j)`, the same for each query, part of the keys in causal flash attention.
            It has to be float64 and finite, there are as many queries as keys, and no masks.
    """

    bias_in_keys = False
    sdp_context_manager: Any

    def __init__(self, attend: upstream.Attend) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(attend.__dict__)
        # x-transformers 1.42 to 2.31.10 enters `sdpa_kernel` in every flash attention, to allow the three backends that
        # torch allows anyway, through a partial that cannot be pickled. Backends that the user chose are kept.
        if self.flash and set(self.sdp_context_manager.args[0]) == DEFAULT_BACKENDS:
            self.sdp_context_manager = contextlib.nullcontext
        self.sparse_topk = getattr(self.attn_fn, "keywords", {}).get("sparse_topk", 0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool | None = None, **kwargs: Any) -> Any:
        """Attend, for `q (b, h, i, d)`, `k` and `v (b, kvh, j, d)`, `mask (b, 1, i, j)`, `attn_bias (h, i, j)`.

        As in upstream, `mask` may also be `(b, j)`. `mask` and `attn_bias` are keyword-only.

        Raises:
            ValueError: If there are fewer keys than `attn_sparse_topk`.
        """
        if self.sparse_topk > k.shape[-2]:
            found = f"attn_sparse_topk={self.sparse_topk} with {k.shape[-2]} keys"
            raise ValueError(f"{found}, must be at most the number of keys: lower it, or pass a longer text or context")
        mask = kwargs.get("mask")
        bias: Any = kwargs.get("attn_bias")
        in_keys = bool(self.bias_in_keys and bias is not None and bias.shape[-2] < q.shape[-2])
        others = ("prev_attn", "attn_delta", "flash_pack_seq_kwargs")
        special = self.add_zero_kv or self.l2_distance or any(kwargs.get(name) is not None for name in others)
        if not in_keys and (not self.flash or causal is not False or special):
            return super().forward(q, k, v, causal=causal, **kwargs)
        # x-transformers 2.26 to 2.31.10: Attend.forward does not pass `causal` on to flash attention, which then copies
        # a bias for each sample of the batch to mask it.
        k, v = (repeat(t, "b h n d -> b (r h) n d", r=q.shape[1] // t.shape[1]) for t in (k, v))
        if mask is not None:
            mask = mask[:, None, None] if mask.ndim == 2 else mask
            return self.flash_attn(q, k, v, mask=mask, attn_bias=bias, causal=False)
        # x-transformers 2.26 to 2.31.10: `flash_attn` compares the numbers of queries and keys even where nothing is
        # causal, so that a graph exported with more text tokens than image patches rejects a shorter text.
        if self.scale is not None:
            q = q * (self.scale / q.shape[-1] ** -0.5)
        scale, width, causal = q.shape[-1] ** -0.5, v.shape[-1], False
        if in_keys:
            q, k, v = _with_bias_in_keys(q, k, v, bias[:, 0] / scale)
            bias, causal = None, True  # not `in_keys`, which is no bool where lengths are symbols
        bias = None if bias is None else bias.expand(*q.shape[:2], -1, -1)
        dropout = self.dropout if self.training else 0.0
        with self.sdp_context_manager():
            out = F.scaled_dot_product_attention(q, k, v, bias, dropout, is_causal=causal, scale=scale)
        return out[..., :width], upstream.Intermediates()


def _with_bias_in_keys(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v `(b, h, n, d)` with more dimensions, in which `q k^T` gets the bias `(h, n)` of the key.

    The bias at the position of the query is subtracted, so that the sum is small where attention is not negligible.
    """
    # A bias is larger and needs more digits than q and k: it becomes the sum of parts that are exact in the dtype. They
    # come before the other dimensions and in pairs, so that their differences are summed before anything else is added.
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    rest, parts = bias / UNIT, []
    for _ in range(EXTRA // 2):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1]
    exact = torch.stack(parts, dim=-1)
    unit = torch.full_like(exact, UNIT)
    pairs = ((unit, -exact), (exact, unit))
    of_queries, of_keys = (torch.stack(pair, dim=-1).flatten(-2).expand(q.shape[0], -1, -1, -1) for pair in pairs)
    # Flash attention takes only values that are as wide as the keys.
    return torch.cat((of_queries, q), dim=-1), torch.cat((of_keys, k), dim=-1), F.pad(v, (0, EXTRA))
