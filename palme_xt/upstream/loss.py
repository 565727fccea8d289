"""The loss of upstream's autoregressive wrapper, without its copies of the logits."""

from typing import Any

import torch
import torch.nn.functional as F
import x_transformers
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from palme_xt.upstream.exact import Exact

LOGITS_IN_CACHE = 2**23  # numbers, 32 MB in float32: chunks are no faster for fewer
CHUNK = 512  # tokens


class AutoregressiveWrapper(Exact, x_transformers.AutoregressiveWrapper):
    """`x_transformers.AutoregressiveWrapper`, whose loss takes less time and memory.

    Upstream's own code handles any call with `return_outputs=True`, and any loss that adds terms to the cross entropy.
    """

    def forward(
        self,
        x: Tensor,
        return_outputs: bool = False,
        prepend_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what upstream returns, for token ids `x (b, n)`.

        With `input_not_include_cache`, which has no meaning for a loss, return what `net` returns. Decoding calls this
        module and not `net`, so that the hooks of this module run: they gather its weights if FSDP2 has sharded them.
        """
        if "input_not_include_cache" in kwargs:
            return self.net(x, **kwargs)
        more = self.net.looped or self.net.output_is_log_prob or self.add_attn_z_loss or self.add_continuous_pred_head
        if self.exact or return_outputs or more or self.mask_prob > 0 or prepend_embeds is not None:
            return super().forward(x, return_outputs=return_outputs, prepend_embeds=prepend_embeds, lens=lens, **kwargs)
        ignored = self.ignore_index
        if lens is not None:
            x = x.masked_fill(torch.arange(x.shape[1], device=x.device) >= lens[:, None], ignored)
        # x-transformers 2.29 to 2.31.10 computes the log softmax in several passes over copies of the logits. Earlier
        # releases copied them to leave out the last token. Here, the target of that token is ignored instead.
        targets = F.pad(x[:, 1:], (0, 1), value=ignored).flatten()
        x = torch.where(x == ignored, self.pad_value, x)
        if not self._in_chunks(x):
            logits, _ = self.net(x, return_intermediates=True, **kwargs)
            return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=ignored)
        embeddings, _ = self.net(x, return_embeddings=True, return_intermediates=True, **kwargs)
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, allow_retain_graph=True)
        weight = self.net.to_logits.weight
        return F.linear_cross_entropy(embeddings.flatten(0, 1), weight, targets, ignore_index=ignored, options=options)

    def _in_chunks(self, x: Tensor) -> bool:
        """Return whether torch (2.13 and later) can compute the loss in chunks here, and whether that is worth it."""
        net, linear = self.net, self.net.to_logits
        plain = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and linear.bias is None
        if not plain or linear._forward_hooks or linear._forward_pre_hooks or net._forward_hooks:
            return False
        if net.sigsoftmax_logits or net.squeeze_out_last_dim or net.to_mixture is not None:
            return False
        traced = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]
        if traced or torch._C._are_functorch_transforms_active() or torch.is_autocast_enabled(x.device.type):
            return False
        # In a graph for any length, an unknown size counts as small: a guard on it would cost one more graph.
        large = statically_known_true(x.numel() * net.num_tokens > LOGITS_IN_CACHE)
        return large and hasattr(F, "linear_cross_entropy")
