"""Conversations: go on from a kept cache with more text and more images.

Letters in shapes: n tokens, m images, p embeddings of an image, d encoder_dim.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from palme_xt.decoding import loop
from palme_xt.decoding.probe import is_right
from palme_xt.decoding.request import SamplingRequest
from palme_xt.in_sentence import Sentences, encode_images
from palme_xt.inputs import check_prompts
from palme_xt.model import PalmE


class Conversation:
    """One text that grows in turns: what is read, and what the model answers. Each token passes the network once.

        conversation = Conversation(model)
        conversation.read(torch.tensor([bos, image_token, 5, 6]), img)  # img (1, c, h, w)
        tokens = conversation.answer(temperature=0.0)
        conversation.read(torch.tensor([7, image_token, 8]), other)
        for token in conversation.stream(seq_len=20): ...

    If upstream's cache is wrong for the model, each answer begins with reading the whole text again, and so it does
    with `image_attention="full"` if new images have been read.

    Args:
        model: The model.
        context: `(1, p, d)`, what `model.encode` returned, for a model that cross-attends.
        context_mask: `(1, p)`, bool, False where the context does not count.

    Attributes:
        ids: `(1, n)`, int64, the text so far, with one `image_token` for each image.

    Raises:
        TypeError, ValueError: If the context is missing, or is not as above.
    """

    def __init__(self, model: PalmE, context: Tensor | None = None, context_mask: Tensor | None = None) -> None:
        model._context(None, context, context_mask)  # checks them
        self.model, self._images = model, list[Tensor]()  # images (m, p, d) of each call of `read`
        self._context: dict[str, Any] = {"context": context, "context_mask": context_mask}
        self.ids = torch.zeros(1, 0, dtype=torch.long, device=next(model.parameters()).device)
        self._cache: Any = None

    def read(self, text: Tensor, img: Any = None, *, image_embeds: Tensor | None = None) -> None:
        """Append tokens to the text. The network reads them together with the next answer.

        Args:
            text: Token ids `(n,)`, with one `image_token` for each image.
            img: Images `(m, c, h, w)`, or a list of `(c, h, w)`. Only for a model with an `image_token`.
            image_embeds: `(m, p, d)`, what `model.encode` returned for the images, instead of `img`.

        Raises:
            TypeError, ValueError: If an argument is not as above. The conversation is then unchanged.
        """
        model, images = self.model, self._images
        ids, _ = check_prompts(text, None, 1, model.config, self.ids.device, name="text")
        with loop.evaluating(model):
            if img is not None or image_embeds is not None:
                given = [None if value is None else [value] for value in (img, image_embeds)]
                # The second call checks that all images have the same p.
                images = encode_images(model, None, [*images, *encode_images(model, *given)])
            if model.projection is not None:
                Sentences(model, ids, images[len(self._images) :] or None)  # checks the placeholders
        self.ids, self._images = torch.cat([self.ids, ids], dim=1), images

    def answer(self, seq_len: Any = None, **how: Any) -> Tensor:
        """Return what `stream` yields for the same arguments, `(n,)`, int64."""
        return torch.tensor([*self.stream(seq_len, **how)], dtype=torch.long, device=self.ids.device)

    def stream(self, seq_len: Any = None, **how: Any) -> Iterator[int]:
        """Append the answer of the model to the text, its EOS included, and yield its tokens as they are decoded.

        If the iterator is abandoned, the conversation goes on from the last token that it has yielded.

        Args:
            seq_len: Maximum number of tokens, an int. None decodes up to `max_seq_len`.
            **how: Other arguments of `PalmE.stream` for one text: `eos_token`, `temperature`, `filter_logits_fn`, ...

        Raises:
            TypeError, ValueError: As in `PalmE.stream`, immediately. The conversation is then unchanged.
        """
        model, embeds = self.model, [torch.cat(self._images)] if self._images else None
        request = SamplingRequest(None, self.ids, seq_len, **self._context, image_embeds=embeds, **how)
        if request.num_return_sequences != 1:
            raise ValueError(f"num_return_sequences={request.num_return_sequences} must be 1 in a conversation")
        texts = model._start(request, {})()
        if request.cache_kv and is_right(model.decoder.net, model.config, cached=True, padded=False, at_once=2):
            texts.cache = self._cache
        tokens = loop.sample(lambda: texts, request, model.config.pad_value)
        step = loop.evaluating(model)(lambda: next(tokens, None))

        def decode() -> Iterator[int]:
            for token in iter(step, None):
                self.ids, self._cache = torch.cat([self.ids, token[None]], dim=1), texts.cache
                yield int(token)

        return decode()
