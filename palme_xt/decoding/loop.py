"""The decoding loop, greedy and sampled, over upstream's network and its key-value cache.

Letters in shapes: b batch, t tokens of a prompt, v vocabulary.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from x_transformers.autoregressive_wrapper import align_right

from palme_xt.config import PalmEConfig
from palme_xt.decoding.request import Request, SamplingRequest


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and disable gradients. On exit, every module is back in its previous mode."""
    was_training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


class Texts:
    """A batch of texts that grow by one token per step, decoded by upstream's network with its cache where possible.

    With absolute positions, a text that is longer than `max_seq_len` is read through a sliding window, from its start
    at each step.

    Args:
        net: An `x_transformers.TransformerWrapper` in eval mode, or a module that passes a call on to one.
        request: A checked request. The texts begin with its prompts.
        inputs: The network's other inputs, such as `context (b, p, d)`. In nested dicts and lists too, tensors whose
            first dimension is b hold an entry for each sample.
        config: The config of the model.
    """

    def __init__(self, net: Any, request: Request, inputs: Mapping[str, Any], config: PalmEConfig) -> None:
        self.net, self.compile, self.cache_kv = net, request.compile, request.cache_kv
        self.window = config.max_seq_len if config.use_abs_pos_emb else sys.maxsize
        self.ids: Tensor = request.prompts  # type: ignore[assignment]  # (b, t), as `Request.check` left them
        seq_start_pos = None
        if request.prompt_lens is not None:
            seq_start_pos = self.ids.shape[1] - request.prompt_lens
            self.ids = align_right(self.ids, request.prompt_lens, pad_id=config.pad_value)
        self.inputs: dict[str, Any] = {**inputs, "context_mask": request.context_mask, "seq_start_pos": seq_start_pos}
        self.of_samples = tree_map(lambda value: isinstance(value, Tensor) and len(value) == len(self.ids), self.inputs)
        self.cache: Any = None
        self.regions: Any = None  # the same network, as it is compiled

    def next_logits(self) -> Tensor:
        """Return the logits `(b, v)` of the next token of each text."""
        ids, inputs, beyond = self.ids, self.inputs, self.ids.shape[1] - self.window
        if beyond > 0:
            self.cache, ids, start = None, ids[:, beyond:], inputs["seq_start_pos"]
            inputs = inputs | {"seq_start_pos": None if start is None else (start - beyond).clamp(min=0)}
        # Without the cache, all tokens are new. After it, several are if a conversation goes on.
        past = 0 if self.cache is None else self.cache.cache_length
        ids = ids[:, past:]
        # The compiler treats a length of 1 as a constant: its graph would serve that one step only.
        if past > 1 and self.compile and ids.shape[1] == 1:
            from palme_xt.decoding.compiled import compiled_step, in_regions  # imported here, because few calls need it

            self.regions = in_regions(self.net) if self.regions is None else self.regions
            logits, self.cache = compiled_step(self.regions, ids, self.cache, inputs)
            return logits
        # x-transformers 2.26.0 to 2.31.10 reads only the last `cache_age` of several tokens after the cache, by default
        # 1, and all of them if it is 0.
        how = {"cache": self.cache, "input_not_include_cache": past > 0, "cache_age": 0, "return_intermediates": True}
        logits, cache = self.net(ids, **inputs, **how)
        if self.cache_kv and beyond < 0:
            self.cache = cache
        if ids.shape[1] > 1 or past == 0:
            refuse_nan(logits[:, -1])
        return logits[:, -1]  # type: ignore[no-any-return]

    def append(self, tokens: Tensor) -> None:
        """Append `tokens (b,)`, one to each text."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)

    def select(self, rows: Tensor, *, same_samples: bool = False) -> None:
        """Keep the texts at the indices `rows`, in this order. A text may be kept several times.

        With `same_samples`, each text belongs to the same sample as the one that it replaces, so that the context and
        its cached keys stay as they are.
        """
        self.ids = self.ids[rows]
        if not same_samples:
            self.inputs = tree_map(lambda value, own: value[rows] if own else value, self.inputs, self.of_samples)
        if self.cache is not None:
            for layer in self.cache.attn_intermediates:
                if not (same_samples and layer.layer_type == "c"):
                    layer.cached_kv = tuple(None if kv is None else kv[rows] for kv in layer.cached_kv)


class SeparateTexts(Texts):
    """Texts of different lengths that are read one by one, for a network that does not ignore their padding.

    Args:
        texts: The same texts as a batch, of which nothing has been read yet.
    """

    def __init__(self, texts: Texts) -> None:
        self.ids, self.texts = texts.ids, []
        for row, start in enumerate(texts.inputs["seq_start_pos"].tolist()):
            text = copy.copy(texts)
            text.select(torch.tensor([row], device=texts.ids.device))
            text.ids, text.inputs = text.ids[:, start:], text.inputs | {"seq_start_pos": None}
            self.texts.append(text)

    def next_logits(self) -> Tensor:
        """Return the logits `(b, v)` of the next token of each text."""
        return torch.cat([text.next_logits() for text in self.texts])

    def append(self, tokens: Tensor) -> None:
        """Append `tokens (b,)`, one to each text."""
        super().append(tokens)
        for text, token in zip(self.texts, tokens.split(1), strict=True):
            text.append(token)

    def select(self, rows: Tensor, *, same_samples: bool = False) -> None:
        """Keep the texts at the indices `rows`, in this order. A text may be kept several times."""
        self.ids, self.texts = self.ids[rows], [copy.copy(self.texts[row]) for row in rows.tolist()]


def sample(start: Callable[[], Texts], request: SamplingRequest, pad_value: int) -> Iterator[Tensor]:
    """Decode token by token. Texts that have ended leave the batch and cause no further computation.

    Yields:
        The tokens of each step, `num_return_sequences` for each sample, at most `seq_len` times, with `pad_value` for
        texts that have ended.

    Raises:
        ValueError: If the logits are nan.
    """
    texts = start()
    rows = torch.arange(len(texts.ids), device=texts.ids.device)
    texts.select(rows.repeat_interleave(request.num_return_sequences))
    batch = len(texts.ids)
    going = torch.arange(batch, device=rows.device)
    for _ in range(request.seq_len):
        tokens = request.choose(texts.ids, texts.next_logits())
        yield tokens.new_full((batch,), pad_value).index_copy(0, going, tokens)
        texts.append(tokens)
        if len(request.eos_tokens) == 0:
            continue
        stays = torch.isin(tokens, request.eos_tokens, invert=True).nonzero()[:, 0]
        if len(stays) == 0:
            return
        if len(stays) < len(tokens):
            texts.select(stays)
            going = going[stays]


def refuse_nan(logits: Tensor) -> None:
    """Raise a ValueError if there is a nan."""
    # Decoding from nan would silently return token 0.
    if logits.isnan().any():
        raise ValueError("the logits are nan: check img, context and the model's weights for nan and inf")
