"""The workaround that `source.py` also prints into programs, which is why its lines have at most 88 columns."""

from typing import Any

import torch
import x_transformers


class Decoder(x_transformers.Decoder):
    """Decode with a key-value cache when ALiBi and rotary positions are both on.

    x-transformers 1.42.7 to 2.31.10: computing rotary positions in forward rebinds
    `pos`, which sends ALiBi down its path for custom positions: an (n, n) bias for the
    one query of a cached step. Passing in the same rotary embedding leaves `pos` alone.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what upstream returns, for `x (b, n, d)` and the same arguments."""
        kwargs = self.by_keyword(args, kwargs)
        rotary = self.rotary_pos_emb
        given = any(kwargs.get(name) is not None for name in ("rotary_pos_emb", "pos"))
        if rotary is not None and not given:
            mems, cache = kwargs.get("mems"), kwargs.get("cache")
            offset = kwargs.get("seq_pos_offset")
            mem_len = mems[0].shape[1] if mems and mems[0] is not None else 0
            if offset is None:
                offset = 0 if cache is None else cache.cache_length
            pos = torch.arange(x.shape[1] + mem_len + offset, device=x.device)
            kwargs["rotary_pos_emb"] = rotary(pos - mem_len)
        return super().forward(x, **kwargs)

    @staticmethod
    def by_keyword(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of `forward` that follow `x`, all of them by keyword."""
        names = x_transformers.Decoder.forward.__code__.co_varnames[2:]
        return dict(zip(names, args, strict=False)) | kwargs if args else kwargs
