"""The decoding loop: greedy, sampled and beam search, over upstream's network and its key-value cache.

Letters in shapes: b batch, t tokens of a prompt, n new tokens, k beams, v vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from x_transformers.autoregressive_wrapper import align_right

from palme_xt.config import PalmEConfig
from palme_xt.decoding.compiled import compiled_step

FilterLogits = Callable[..., Tensor]

# x-transformers 2.26.0 to 2.31.10: with these `decoder_kwargs`, and in a looped network, a cached step computes other
# logits than the whole text does, or crashes. The whole text is read at each step then.
WRONG_WITH_CACHE = (
    "shift_tokens",
    "orthog_residual",
    "mv_split_residual",
    "attn_use_rel_proj_pos_bias",
    "attn_data_dependent_alibi",
)


def wrong_with_cache(config: PalmEConfig) -> list[str]:
    """The overrides of `config` that upstream's cache is wrong for."""
    wrong = [name for name in WRONG_WITH_CACHE if config.decoder_kwargs.get(name)]
    if config.rotary_xpos and config.decoder_kwargs.get("attn_num_mem_kv"):
        wrong.append("attn_num_mem_kv")  # xPos scales by the distance from the middle, memory keys have none
    return wrong


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards, whatever happens, every module is in the mode that it was in."""
    was_training = [module for model in models for module in model.modules() if module.training]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module in was_training:
            module.training = True


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients."""
    with eval_mode(model), torch.no_grad():
        yield


@dataclasses.dataclass
class Sampling:
    """How one token is chosen from the logits `(b, v)` of the next.

    Attributes:
        temperature: 0 takes the most likely token.
        filter_logits: what upstream calls a `filter_logits_fn`; not called at temperature 0.
        filter_kwargs: its keywords.
        generator: source of the randomness; torch's own if None.
    """

    temperature: float
    filter_logits: FilterLogits
    filter_kwargs: dict[str, Any]
    generator: torch.Generator | None = None

    def choose(self, logits: Tensor) -> Tensor:
        """Token ids `(b,)`."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        filtered = self.filter_logits(logits.float(), **self.filter_kwargs)
        # The largest becomes 0 first: divided by a tiny temperature, it would become inf, and the softmax nan.
        below = filtered - filtered.amax(dim=-1, keepdim=True)
        probabilities = (below / max(self.temperature, torch.finfo(below.dtype).tiny)).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]


class Rows:
    """A batch of texts that grow by a token a step, read by upstream's network from its cache where it can.

    Args:
        net: an `x_transformers.TransformerWrapper` in eval mode.
        prompts: `(b, t)` token ids.
        prompt_lens: `(b,)` how many of them count, from the left; all of them if None.
        pad_value: the id that stands before shorter prompts.
        cache_kv: keep keys and values where the network can. Without, every step reads the whole text again.
        context: `(b, p, d)`, or None for a network that does not cross-attend.
        context_mask: `(b, p)`, True where the context counts.
        compile: compile the step that reads one token from the cache.
    """

    def __init__(
        self,
        net: Any,
        prompts: Tensor,
        prompt_lens: Tensor | None,
        *,
        pad_value: int,
        cache_kv: bool,
        context: Tensor | None,
        context_mask: Tensor | None,
        compile: bool = False,
    ) -> None:
        self.net = net
        self.compile = compile
        self.seq_start_pos = None
        if prompt_lens is not None:
            self.seq_start_pos = prompts.shape[1] - prompt_lens
            prompts = align_right(prompts, prompt_lens, pad_id=pad_value)
        self.text = prompts
        self.context = context
        self.context_mask = context_mask
        self.cache_kv = cache_kv and net.can_cache_kv
        self.cache: Any = None

    def next_logits(self) -> Tensor:
        """Logits `(b, v)` of the next token of each text."""
        cached = self.cache is not None
        # A length of 1 is a constant to the compiler: its graph would serve that one step.
        if cached and self.compile and self.cache.cache_length > 1:
            logits, self.cache = compiled_step(
                self.net, self.text[:, -1:], self.cache, self.context, self.context_mask, self.seq_start_pos
            )
            return logits
        logits, cache = self.net(
            self.text[:, -1:] if cached else self.text,
            context=self.context,
            context_mask=self.context_mask,
            seq_start_pos=self.seq_start_pos,
            cache=self.cache,
            input_not_include_cache=cached,
            return_intermediates=True,
        )
        if self.cache_kv:
            self.cache = cache
        return logits[:, -1]  # type: ignore[no-any-return]

    def append(self, tokens: Tensor) -> None:
        """Let each text grow by one of `tokens (b,)`."""
        self.text = torch.cat([self.text, tokens[:, None]], dim=1)

    def select(self, rows: Tensor, *, same_samples: bool = False) -> None:
        """Go on with these `rows`, in this order; one may be there several times.

        With `same_samples`, each of them is of the sample whose place it takes, and what belongs to samples stays.
        """
        self.text = self.text[rows]
        if not same_samples:
            self.seq_start_pos = None if self.seq_start_pos is None else self.seq_start_pos[rows]
            self.context = None if self.context is None else self.context[rows]
            self.context_mask = None if self.context_mask is None else self.context_mask[rows]
        if self.cache is not None:
            for layer in self.cache.attn_intermediates:
                if not (same_samples and layer.layer_type == "c"):
                    layer.cached_kv = tuple(None if kv is None else kv[rows] for kv in layer.cached_kv)


def sample(rows: Rows, seq_len: int, sampling: Sampling, *, eos_token: int | None, pad_value: int) -> Iterator[Tensor]:
    """Decode token by token; texts that have ended are dropped from the batch, and cost nothing more.

    Yields:
        The tokens `(b,)` of each step, at most `seq_len` times; `pad_value` for texts that have ended.

    Raises:
        ValueError: the logits are nan.
    """
    batch = len(rows.text)
    going = torch.arange(batch, device=rows.text.device)
    for step in range(seq_len):
        logits = rows.next_logits()
        if step == 0:
            refuse_nan(logits)
        tokens = sampling.choose(logits)
        yield tokens.new_full((batch,), pad_value).index_copy(0, going, tokens)
        if step + 1 == seq_len:
            return
        rows.append(tokens)
        if eos_token is None:
            continue
        stays = (tokens != eos_token).nonzero()[:, 0]
        if len(stays) == 0:
            return
        if len(stays) < len(tokens):
            rows.select(stays)
            going = going[stays]


@dataclasses.dataclass
class Hypotheses:
    """The best finished texts of each sample, best first: `tokens (b, k, n)`, and `scores (b, k)`, -inf for none."""

    tokens: Tensor
    scores: Tensor

    def add(self, tokens: Tensor, scores: Tensor) -> None:
        """Keep the k best of those here and of `tokens (b, c, n)` with `scores (b, c)`."""
        all_scores = torch.cat([self.scores, scores], dim=1)
        self.scores, best = all_scores.topk(self.scores.shape[1], dim=1)
        all_tokens = torch.cat([self.tokens, tokens], dim=1)
        self.tokens = take(all_tokens, best)


def take(values: Tensor, index: Tensor) -> Tensor:
    """`values (b, c, n)` at `index (b, k)`, as `(b, k, n)`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def beam_search(
    rows: Rows, seq_len: int, beams: int, *, eos_token: int | None, pad_value: int, length_penalty: float
) -> tuple[Tensor, Tensor]:
    """Decode the `beams` most likely texts of each sample that a beam search of that width finds.

    The score of a text is the sum of its tokens' log probabilities over its length to the power `length_penalty`, the
    length being that of the new tokens, EOS included (Wu et al. 2016, arXiv:1609.08144, section 7, has a variant;
    Hugging Face's generate has this one). A sample is done, and costs nothing more, once no text that goes on can still
    come to a better score than those that it has.

    Returns:
        Token ids `(b, k, n)` with n <= seq_len, `pad_value` after EOS, and their scores `(b, k)`, float32, best first.
        Where a sample has fewer than k texts at all, the rest is padding with the score -inf.

    Raises:
        ValueError: the logits are nan.
    """
    batch, prompt_len = rows.text.shape
    device = rows.text.device
    finished = Hypotheses(
        torch.full((batch, beams, seq_len), pad_value, device=device),
        torch.full((batch, beams), -torch.inf, device=device),
    )
    going = torch.arange(batch, device=device)  # which sample each of the b samples still in `rows` is
    scores = torch.zeros(batch, 1, device=device)  # (b, width) of the beams that go on, best first
    for length in range(1, seq_len + 1):
        logits = rows.next_logits()
        if length == 1:
            refuse_nan(logits)
        width, vocabulary = scores.shape[1], logits.shape[-1]
        log_probs = rearrange(logits.float().log_softmax(dim=-1), "(b w) v -> b w v", w=width)
        totals = rearrange(scores[..., None] + log_probs, "b w v -> b (w v)")
        # Twice as many as there are beams: were all the best to end here, as many others would go on.
        scores, candidates = totals.topk(min(2 * beams, totals.shape[1]), dim=1)
        parents, tokens = candidates // vocabulary, candidates % vocabulary

        so_far = rearrange(rows.text[:, prompt_len:], "(b w) n -> b w n", w=width)
        texts = torch.cat([take(so_far, parents), tokens[..., None]], dim=-1)
        last = length == seq_len
        ends = torch.full_like(tokens, last, dtype=torch.bool) if eos_token is None else (tokens == eos_token) | last
        if last or eos_token is not None:
            here = Hypotheses(finished.tokens[going], finished.scores[going])
            padded = nn.functional.pad(texts, (0, seq_len - length), value=pad_value)
            here.add(padded, (scores / length**length_penalty).masked_fill(~ends, -torch.inf))
            finished.tokens[going], finished.scores[going] = here.tokens, here.scores
        if last:
            break

        scores, best = scores.masked_fill(ends, -torch.inf).topk(min(beams, scores.shape[1]), dim=1)
        # A score only sinks from here on, and the length that divides it only grows.
        reachable = scores[:, 0] / (seq_len if length_penalty > 0 else length + 1) ** length_penalty
        stays = (reachable > finished.scores[going].amin(dim=1)).nonzero()[:, 0]
        if len(stays) == 0:
            break
        parent_rows = parents.gather(1, best) + width * torch.arange(len(going), device=device)[:, None]
        same_samples = len(stays) == len(going) and best.shape[1] == width
        rows.select(rearrange(parent_rows[stays], "b w -> (b w)"), same_samples=same_samples)
        rows.append(rearrange(tokens.gather(1, best)[stays], "b w -> (b w)"))
        scores, going = scores[stays], going[stays]
    none = finished.scores.isneginf()[..., None]
    return finished.tokens.masked_fill(none, pad_value), finished.scores


def refuse_nan(logits: Tensor) -> None:
    """Decoding nan would silently give token 0.

    Raises:
        ValueError: there is nan in the logits.
    """
    if logits.isnan().any():
        raise ValueError("the logits are nan: img, context or the model's weights hold nan or inf; look for them there")
