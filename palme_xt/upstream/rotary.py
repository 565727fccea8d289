"""Upstream's rotary positions, whose frequencies stay precise when the model is cast."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from x_transformers import x_transformers as upstream


class RotaryEmbedding(upstream.RotaryEmbedding):
    """`x_transformers.x_transformers.RotaryEmbedding`, whose buffers stay float32 at least.

    Args:
        rotary: The module to replace, whose whole state is taken over.
    """

    def __init__(self, rotary: upstream.RotaryEmbedding) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(rotary.__dict__)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # x-transformers 1.30 to 2.31.10: `.to(bfloat16)` leaves only 129 distinct angles for positions 500 to 999.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, precise in before.items():
            if torch.promote_types(self._buffers[name].dtype, torch.float32) != self._buffers[name].dtype:
                self._buffers[name] = precise.to(self._buffers[name].device, torch.float32)
        return self
