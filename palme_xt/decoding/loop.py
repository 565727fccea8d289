"""The decoding loop: greedy, sampled and beam search, over upstream's network and its key-value cache.

Letters in shapes: b batch, t tokens of a prompt, n new tokens, k beams, v vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from x_transformers.autoregressive_wrapper import align_right

from palme_xt.decoding.compiled import compiled_step
from palme_xt.decoding.request import Request, SamplingRequest, SearchRequest


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode and disable gradients. On exit, every module is back in its previous mode."""
    was_training = [module for model in models for module in model.modules() if module.training]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


class Texts:
    """A batch of texts that grow by one token per step, decoded by upstream's network with its cache where possible.

    Args:
        net: An `x_transformers.TransformerWrapper` in eval mode, or a module that passes a call on to one.
        request: A checked request. The texts begin with its prompts.
        context: `(b, p, d)`, or None for a network that does not cross-attend.
        pad_value: The id that pads shorter prompts on the left.
    """

    def __init__(self, net: Any, request: Request, context: Tensor | None, pad_value: int) -> None:
        self.net, self.compile, self.cache_kv = net, request.compile, request.cache_kv
        self.ids: Tensor = request.prompts  # type: ignore[assignment]  # (b, t), as `Request.check` left them
        seq_start_pos = None
        if request.prompt_lens is not None:
            seq_start_pos = self.ids.shape[1] - request.prompt_lens
            self.ids = align_right(self.ids, request.prompt_lens, pad_id=pad_value)
        self.inputs: dict[str, Any] = {
            "context": context,
            "context_mask": request.context_mask,
            "seq_start_pos": seq_start_pos,
        }
        self.cache: Any = None

    def next_logits(self) -> Tensor:
        """Return the logits `(b, v)` of the next token of each text."""
        cached = self.cache is not None
        # The compiler treats a length of 1 as a constant: its graph would serve that one step only.
        if cached and self.compile and self.cache.cache_length > 1:
            logits, self.cache = compiled_step(self.net, self.ids[:, -1:], self.cache, self.inputs)
            return logits
        logits, cache = self.net(
            self.ids[:, -1:] if cached else self.ids,
            **self.inputs,
            cache=self.cache,
            input_not_include_cache=cached,
            return_intermediates=True,
        )
        if self.cache_kv:
            self.cache = cache
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
            self.inputs = {name: None if value is None else value[rows] for name, value in self.inputs.items()}
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


def sample(texts: Texts, request: SamplingRequest, pad_value: int) -> Iterator[Tensor]:
    """Decode token by token. Texts that have ended leave the batch and cause no further computation.

    Yields:
        The tokens `(b,)` of each step, at most `seq_len` times, with `pad_value` for texts that have ended.

    Raises:
        ValueError: If the logits are nan.
    """
    batch = len(texts.ids)
    going = torch.arange(batch, device=texts.ids.device)
    for step in range(1, request.seq_len + 1):
        logits = texts.next_logits()
        if step == 1:
            _refuse_nan(logits)
        tokens = request.choose(logits)
        yield tokens.new_full((batch,), pad_value).index_copy(0, going, tokens)
        if step == request.seq_len:
            return
        texts.append(tokens)
        if request.eos_token is None:
            continue
        stays = (tokens != request.eos_token).nonzero()[:, 0]
        if len(stays) == 0:
            return
        if len(stays) < len(tokens):
            texts.select(stays)
            going = going[stays]


def _best(ids: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` best of texts `(b, c, n)` with `scores (b, c)`, best first, and their scores."""
    scores, best = scores.topk(count, dim=1)
    return _take(ids, best), scores


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Return `values (b, c, n)` at `index (b, k)`, as `(b, k, n)`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def beam_search(texts: Texts, request: SearchRequest, pad_value: int) -> tuple[Tensor, Tensor]:
    """Decode the `beams` most likely texts of each sample that a beam search of that width finds.

    The score of a text is the sum of its tokens' log probabilities, divided by its length to the power
    `length_penalty`. The length is that of the new tokens, EOS included (as in Hugging Face's generate; Wu et al. 2016,
    arXiv:1609.08144, section 7, has a variant). A sample is done, and causes no further computation, once no unfinished
    text can reach a better score than the finished ones.

    Returns:
        Token ids `(k, b, seq_len)`, best first, with `pad_value` after EOS, and their scores `(k, b)`, float32. If a
        sample has fewer than k texts, the rest is padding with the score -inf.

    Raises:
        ValueError: If the logits are nan.
    """
    beams, seq_len, eos_token = request.beams, request.seq_len, request.eos_token
    batch, prompt_len = texts.ids.shape
    device = texts.ids.device
    # The best finished texts of each sample, best first, with the score -inf for missing ones.
    finished = torch.full((batch, beams, seq_len), pad_value, device=device)
    finished_scores = torch.full((batch, beams), -torch.inf, device=device)
    going = torch.arange(batch, device=device)  # indices of the samples that are still in `texts`
    scores = torch.zeros(batch, 1, device=device)  # (b, width) of the unfinished beams, best first
    for length in range(1, seq_len + 1):
        logits = texts.next_logits()
        if length == 1:
            _refuse_nan(logits)
        width, vocabulary = scores.shape[1], logits.shape[-1]
        log_probs = rearrange(logits.float().log_softmax(dim=-1), "(b w) v -> b w v", w=width)
        totals = rearrange(scores[..., None] + log_probs, "b w v -> b (w v)")
        # Take twice as many candidates as beams: if all of the best ones end here, enough others continue.
        scores, candidates = totals.topk(min(2 * beams, totals.shape[1]), dim=1)
        parents, tokens = candidates // vocabulary, candidates % vocabulary

        so_far = rearrange(texts.ids[:, prompt_len:], "(b w) n -> b w n", w=width)
        extended = torch.cat([_take(so_far, parents), tokens[..., None]], dim=-1)
        last = length == seq_len
        ends = torch.full_like(tokens, last, dtype=torch.bool) if eos_token is None else (tokens == eos_token) | last
        if last or eos_token is not None:
            padded = nn.functional.pad(extended, (0, seq_len - length), value=pad_value)
            ended_scores = (scores / length**request.length_penalty).masked_fill(~ends, -torch.inf)
            all_ids = torch.cat([finished[going], padded], dim=1)
            all_scores = torch.cat([finished_scores[going], ended_scores], dim=1)
            finished[going], finished_scores[going] = _best(all_ids, all_scores, beams)
        if last:
            break

        scores, best = scores.masked_fill(ends, -torch.inf).topk(min(beams, scores.shape[1]), dim=1)
        # From here on, the sum of log probabilities can only fall, and the length that divides it can only grow.
        longest = seq_len if request.length_penalty > 0 else length + 1
        reachable = scores[:, 0] / longest**request.length_penalty
        stays = (reachable > finished_scores[going].amin(dim=1)).nonzero()[:, 0]
        if len(stays) == 0:
            break
        parent_rows = parents.gather(1, best) + width * torch.arange(len(going), device=device)[:, None]
        same_samples = len(stays) == len(going) and best.shape[1] == width
        texts.select(rearrange(parent_rows[stays], "b w -> (b w)"), same_samples=same_samples)
        texts.append(rearrange(tokens.gather(1, best)[stays], "b w -> (b w)"))
        scores, going = scores[stays], going[stays]
    finished.masked_fill_(finished_scores.isneginf()[..., None], pad_value)
    return rearrange(finished, "b k n -> k b n"), rearrange(finished_scores, "b k -> k b")


def _refuse_nan(logits: Tensor) -> None:
    # Decoding from nan would silently return token 0.
    if logits.isnan().any():
        raise ValueError("the logits are nan: check img, context and the model's weights for nan and inf")
