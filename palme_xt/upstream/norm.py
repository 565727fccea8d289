"""Upstream's layer norm in one pass, which keeps one tensor less for the backward pass."""

import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers import x_transformers as upstream

from palme_xt.upstream.exact import Exact


class LayerNorm(Exact, upstream.LayerNorm):
    """`x_transformers.x_transformers.LayerNorm`, with the same parameters. Its numbers differ from those by rounding.

    Args:
        norm: The module to replace, whose whole state is taken over.
    """

    def __init__(self, norm: upstream.LayerNorm) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(norm.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x (..., d)`, normalised over d and multiplied by `gamma (d,)`."""
        if self.exact:
            return super().forward(x)  # type: ignore[no-any-return]
        # x-transformers 2.26 to 2.31.10 multiplies in a second pass, and autograd keeps what the first one returns.
        return F.layer_norm(x, x.shape[-1:], self.gamma + float(self.unit_offset), None, self.ln.eps)
