"""PalmE: a vision transformer whose patch embeddings a causal text decoder cross-attends to."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from palme_xt.config import PalmEConfig
from palme_xt.inputs import check_batches, check_context, check_img, check_text
from palme_xt.signature import with_arguments_of
from palme_xt.wiring import build_decoder, build_encoder


class PalmE(nn.Module):
    """A vision-language model from 17 arguments; `PalmEConfig` documents them and the five override dicts.

    Letters in shapes: b batch, m images a sample, c channels, h and w pixels, n tokens, p patches of an image,
    d encoder_dim.

    Attributes:
        config: the `PalmEConfig` it was built from.
        encoder: an `x_transformers.ViTransformerWrapper`.
        decoder: an `x_transformers.AutoregressiveWrapper` around the `TransformerWrapper` at `decoder.net`, whose
            layers at `decoder.net.attn_layers` are an `x_transformers.Decoder`. State dicts of the same modules wired
            by hand load below `encoder.` and `decoder.` as they are.
    """

    config: PalmEConfig

    @with_arguments_of(PalmEConfig)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = PalmEConfig(*args, **kwargs)
        self.encoder = build_encoder(self.config)
        self.decoder = build_decoder(self.config)
        if not self.config.cross_attend:
            # A parameter that needs a gradient and never gets one makes DistributedDataParallel wait for it.
            self.encoder.requires_grad_(False)

    @classmethod
    def from_config(cls, config: PalmEConfig) -> PalmE:
        """The model that `config` describes, newly initialised."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="use_abs_pos_emb")  # the config has said so already
            return cls(**{argument.name: getattr(config, argument.name) for argument in fields(config)})

    def encode(self, img: Tensor) -> Tensor:
        """Patch embeddings of images, the context that the decoder cross-attends to.

        Args:
            img: `(b, c, h, w)`, or `(b, m, c, h, w)` for m images a sample; floating point, in whatever range the model
                was trained on; cast to the encoder's dtype.

        Returns:
            `(b, p, d)`, or `(b, m * p, d)`: the m images' embeddings one after another.

        Raises:
            TypeError: `img` is not a floating-point tensor.
            ValueError: `img` has the wrong shape.
        """
        check_img(img, self.config)
        img = img.to(self.encoder.pos_embedding.dtype)
        images = img if img.ndim == 4 else rearrange(img, "b m c h w -> (b m) c h w")
        embeddings: Tensor = self.encoder(images, return_embeddings=True)
        return rearrange(embeddings, "(b m) p d -> b (m p) d", b=img.shape[0])

    def forward(self, img: Tensor | None, text: Tensor, **kwargs: Any) -> Any:
        """The loss of predicting each token of `text` from the tokens before it and the image.

        Text may be longer than `max_seq_len` unless `use_abs_pos_emb` is on: ALiBi and xPos exist to extrapolate.

        Args:
            img: as in `encode`. Not looked at, and may be None, with `cross_attend=False`; None as well where
                `context=` passes embeddings that `encode` has made before.
            text: `(b, n)` token ids, of an integer dtype, n >= 2. Positions that hold `ignore_index` (-100) are no
                targets; as inputs they are read as `pad_value`.
            **kwargs: whatever `x_transformers.AutoregressiveWrapper.forward` takes: `return_outputs`, `lens`,
                `context_mask`, ...

        Returns:
            What upstream returns: the scalar loss, in nats a token, or `(loss, (logits, cache))` with
            `return_outputs=True`, logits `(b, n - 1, num_tokens)`.

        Raises:
            TypeError: `img` or `text` is not a tensor of the right dtype.
            ValueError: `img` or `text` has the wrong shape or values, or their batch sizes differ.
        """
        check_text(text, self.config, kwargs.get("lens"))
        context = self._context(img, text, kwargs.pop("context", None))
        if context is not None:
            kwargs["context"] = context
        elif kwargs.get("context_mask") is not None:
            raise ValueError("context_mask is for models that cross-attend: leave it out with cross_attend=False")
        return self.decoder(text.long(), **kwargs)

    def _context(self, img: Tensor | None, text: Tensor, context: Tensor | None) -> Tensor | None:
        if not self.config.cross_attend:
            if context is not None:
                raise ValueError("context is for models that cross-attend: leave it out with cross_attend=False")
            return None
        if img is not None and context is None:
            check_img(img, self.config)
            check_batches(img, text)
            return self.encode(img)
        if context is not None and img is None:
            check_context(context, self.config)
            check_batches(context, text, source_name="context")
            return context
        found = "neither img nor context is" if img is None else "both img and context are"
        raise ValueError(
            f"{found} given: a model with cross_attend=True needs either img, or context=model.encode(img)"
        )
