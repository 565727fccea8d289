"""Build the model as a user of x-transformers wires it by hand, without palme_xt's mapping and wiring."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper, ViTransformerWrapper

from palme_xt import PalmEConfig


def one_head(heads: int, dim: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword that upstream needs to run a single head that is not as wide as the model."""
    return {"attn_project_out": True} if heads == 1 and overrides.get("attn_dim_head", 64) != dim else {}


class HandWired(nn.Module):
    def __init__(self, config: PalmEConfig) -> None:
        super().__init__()
        self.cross_attend = config.cross_attend
        self.encoder = ViTransformerWrapper(
            image_size=config.image_size,
            patch_size=config.patch_size,
            attn_layers=Encoder(
                dim=config.encoder_dim,
                depth=config.encoder_depth,
                heads=config.encoder_heads,
                **one_head(config.encoder_heads, config.encoder_dim, config.encoder_kwargs),
                **config.encoder_kwargs,
            ),
            **config.vit_kwargs,
        )
        self.decoder = AutoregressiveWrapper(
            TransformerWrapper(
                num_tokens=config.num_tokens,
                max_seq_len=config.max_seq_len,
                use_abs_pos_emb=config.use_abs_pos_emb,
                attn_layers=Decoder(
                    dim=config.decoder_dim,
                    depth=config.decoder_depth,
                    heads=config.decoder_heads,
                    cross_attend=config.cross_attend,
                    cross_attn_dim_context=config.encoder_dim,
                    alibi_pos_bias=config.alibi_pos_bias,
                    alibi_num_heads=config.alibi_num_heads,
                    rotary_xpos=config.rotary_xpos,
                    attn_flash=config.attn_flash,
                    attn_qk_norm=config.qk_norm,
                    **one_head(config.decoder_heads, config.decoder_dim, config.decoder_kwargs),
                    **config.decoder_kwargs,
                ),
                **config.transformer_kwargs,
            ),
            **config.autoregressive_kwargs,
        )

    def forward(self, img: Tensor, text: Tensor, **kwargs: Any) -> Any:
        if self.cross_attend:
            images = img if img.ndim == 4 else rearrange(img, "b m c h w -> (b m) c h w")
            embeddings = self.encoder(images, return_embeddings=True)
            kwargs["context"] = rearrange(embeddings, "(b m) p d -> b (m p) d", b=len(img))
        return self.decoder(text, **kwargs)
