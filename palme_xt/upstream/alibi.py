"""Upstream's ALiBi bias without state, and the bias of a causal text computed once for all layers and samples."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers import x_transformers as upstream


class AlibiPositionalBias(upstream.AlibiPositionalBias):
    """Upstream's bias, without state that changes in forward or is lost on the meta device."""

    slopes: Tensor

    def __init__(self, heads: int, total_heads: int, slopes: Any = None) -> None:
        super().__init__(heads, total_heads, slopes=slopes)
        self._slopes = tuple(self._get_slopes(heads) if slopes is None else slopes)
        self._dtype = self.slopes.dtype

    def forward(self, i: int, j: int) -> Tensor:
        """Return the bias `(total_heads, i, j)` of the last i of j positions as queries and all j as keys."""
        # x-transformers 1.30 to 2.31.10 keeps the longest bias in a buffer that grows in forward, which causes one more
        # compilation for each length, and different buffers on the ranks of a data-parallel run. The operations here
        # are the same, except that heads without a bias have slope 0 instead of being added by a copy.
        query = torch.arange(j - i, j, device=self.slopes.device)
        key = torch.arange(j, device=self.slopes.device)
        slopes = F.pad(self.slopes, (0, 0, 0, 0, 0, self.total_heads - self.heads))
        bias: Tensor = -(key - query[:, None]).abs() * slopes
        return bias.to(self._dtype)

    def causal(self, i: int, j: int) -> Tensor:
        """Return the bias of `forward`, with later keys masked by the value that upstream's flash attention uses."""
        bias: Tensor = self(i, j)
        later = torch.arange(j, device=bias.device) > torch.arange(j - i, j, device=bias.device)[:, None]
        return bias.masked_fill_(later, -torch.finfo(bias.dtype).max // 2)

    def row(self, n: int) -> Tensor:
        """Return a bias `(total_heads, 1, n)`, float64, that is equal to `causal(n, n)` up to a number for each query.

        Softmax ignores that number: in a causal row, `-slope * (i - j)` is `slope * j` less `slope * i`.
        """
        slopes = F.pad(self.slopes, (0, 0, 0, 0, 0, self.total_heads - self.heads))
        return slopes.double() * torch.arange(n, device=slopes.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # x-transformers 1.30 to 2.31.10: no state dict has the slopes, so they hold garbage after `to_empty`, and
        # bfloat16 rounds them. They depend only on the number of heads: compute them again, in float32 at least.
        super()._apply(fn, recurse)
        self._dtype = self.slopes.dtype
        precise = torch.promote_types(self._dtype, torch.float32)
        self.slopes = Tensor(self._slopes).view(-1, 1, 1).to(self.slopes.device, precise)
        return self
