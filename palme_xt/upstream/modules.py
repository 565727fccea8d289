"""Upstream's modules with the workarounds. `tests/upstream/test_modules.py` says when each of them can be removed."""

from typing import Any

import torch.nn.functional as F
import x_transformers
from torch import Tensor
from x_transformers import x_transformers as upstream

from palme_xt.upstream.alibi import AlibiPositionalBias
from palme_xt.upstream.attend import Attend
from palme_xt.upstream.cached_decoder import Decoder as CachedDecoder
from palme_xt.upstream.exact import Exact
from palme_xt.upstream.norm import LayerNorm
from palme_xt.upstream.rotary import RotaryEmbedding

MASKS = ("mask", "attn_mask", "self_attn_kv_mask", "mem_masks", "seq_start_pos", "additional_kv_mask")
LONGER = ("pos", "mems", "cache", "self_attn_additional_kv")  # with which keys are at other positions than queries
SPECIAL = ("num_mem_kv", "max_attend_past", "rel_proj_pos_bias", "add_zero_kv", "l2_distance", "flash_pack_seq")


class Encoder(x_transformers.Encoder):
    """`x_transformers.Encoder`, whose modules can be pickled, and which has no ALiBi state."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _replace_modules(self, kwargs)


class Decoder(Exact, CachedDecoder):
    """`x_transformers.Decoder`, which decodes with a cache in every configuration, pickles, and has no ALiBi state.

    Arguments, parameters, buffers and outputs are those of upstream. For a whole text without padding, masks, custom
    positions or memories, ALiBi is part of the keys of flash attention, whose memory is then linear in the length. The
    numbers differ from upstream's by rounding: for 128 to 32,768 tokens in float32, bfloat16 and float16, the error
    against float64 was measured to be no larger than that of upstream's bias.

    Attributes:
        alibi: The ALiBi bias, computed once for all layers. `rel_pos`, which upstream computes in each layer, is None.
    """

    rel_pos: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _replace_modules(self, kwargs)
        self.alibi: Any = None
        if isinstance(self.rel_pos, AlibiPositionalBias):
            attentions = [module for module in self.modules() if isinstance(module, upstream.Attention)]
            alike = {(module.num_mem_kv, module.attend.flash) for module in attentions if module.causal}
            if len(alike) == 1:
                self.alibi, self.rel_pos = self.rel_pos, None
                ((self._num_mem_kv, self._flash),) = alike
                parts = [part for module in attentions if module.causal for part in (module, module.attend)]
                self._plain = self._flash and not any(getattr(part, name, None) for part in parts for name in SPECIAL)
                for part in parts[1::2]:
                    part.bias_in_keys = self._plain

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what upstream returns, for `x (b, n, d)` and the same keywords.

        Raises:
            ValueError: If `attn_bias` is given with ALiBi, which upstream rejects as well.
        """
        kwargs = self.by_keyword(args, kwargs)
        if self.alibi is not None:
            if kwargs.get("attn_bias") is not None:
                raise ValueError("attn_bias is given to a decoder with ALiBi: build it with alibi_pos_bias=False")
            kwargs.update(self._alibi_arguments(x, kwargs))
        return super().forward(x, **kwargs)

    def _alibi_arguments(self, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        # x-transformers 1.30 to 2.31.10 computes the bias in each layer, and masks a copy of it for each sample.
        # Padding has to be masked for each sample. Without padding, one causal bias serves all samples.
        causal = all(kwargs.get(name) is None for name in (*MASKS, "causal"))
        whole = causal and x.shape[1] > 1 and all(kwargs.get(name) is None for name in LONGER)
        # The device "mps" has no float64, and "meta" no autocast.
        if self._plain and whole and not self.exact and x.device.type not in ("mps", "meta"):
            return {"attn_bias": self.alibi.row(x.shape[1])}
        masked = False  # whether later keys are masked in the bias
        if kwargs.get("pos") is not None:
            bias = self.alibi.forward_custom_pos(kwargs["pos"])
        else:
            i, mems, cache = x.shape[1], kwargs.get("mems"), kwargs.get("cache")
            past = mems[0].shape[1] if mems and mems[0] is not None else 0
            if cache is not None:
                past += cache.cache_length
                i = min(i, kwargs.get("cache_age", 1) or i)
            masked = self._flash and i > 1 and causal
            bias = self.alibi.causal(i, past + i) if masked else self.alibi(i, past + i)
        bias = F.pad(bias, (self._num_mem_kv, 0))
        return {"attn_bias": bias, "causal": False} if masked else {"attn_bias": bias}


def _replace_modules(layers: Any, kwargs: dict[str, Any]) -> None:
    """Replace the modules of an encoder or a decoder, which was built with `kwargs`, by those with the workarounds."""
    for module in [*layers.modules()]:
        if isinstance(module, upstream.Attention):
            module.attend = Attend(module.attend)
        for name, child in module.named_children():
            if type(child) is upstream.LayerNorm:
                setattr(module, name, LayerNorm(child))
    if layers.rotary_pos_emb is not None:
        layers.rotary_pos_emb = RotaryEmbedding(layers.rotary_pos_emb)
    if isinstance(layers.rel_pos, upstream.AlibiPositionalBias):
        slopes = kwargs.get("rel_pos_kwargs", {}).get("slopes")
        layers.rel_pos = AlibiPositionalBias(layers.rel_pos.heads, layers.rel_pos.total_heads, slopes=slopes)


class TransformerWrapper(x_transformers.TransformerWrapper):
    """`x_transformers.TransformerWrapper`, whose copies with tied embeddings use their own, and can be pickled."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # x-transformers 1.30 to 2.31.10: with tied embeddings, `to_logits` is a lambda that refers to this instance,
        # even in a deepcopy of it. A bound method is copied and pickled together with its instance.
        if kwargs.get("tie_embedding") and not kwargs.get("return_only_embed"):
            self.to_logits = self._tied_logits

    def _tied_logits(self, t: Tensor) -> Tensor:
        logits: Tensor = t @ self.token_emb.emb.weight.t()
        scale = getattr(self, "tie_embedding_scale", None)  # since 2.30.5
        return logits if scale is None else logits * scale
