"""The arguments of `generate`, `stream` and `beam_search`, written once and checked once."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from x_transformers.autoregressive_wrapper import FILTER_LOGITS_FN

from palme_xt.config import PalmEConfig, check_positive_int, check_token_id
from palme_xt.inputs import check_prompts

FilterLogits = Callable[..., Tensor]

P = ParamSpec("P")
Holder = TypeVar("Holder")
Arguments = TypeVar("Arguments")
Returned = TypeVar("Returned")


def takes_arguments_of(
    kind: Callable[P, Arguments],
) -> Callable[[Callable[[Holder, Arguments], Returned]], Callable[Concatenate[Holder, P], Returned]]:
    """Let a method that takes one object be called with the arguments of the object's class.

    Type checkers, editors and `help()` see those arguments, which are written in the class alone.
    """

    def decorate(method: Callable[[Holder, Arguments], Returned]) -> Callable[Concatenate[Holder, P], Returned]:
        @functools.wraps(method)
        def call(self: Holder, /, *args: P.args, **kwargs: P.kwargs) -> Returned:
            return method(self, kind(*args, **kwargs))

        call.__doc__ = method.__doc__ or kind.__doc__
        own = inspect.signature(method)
        itself = next(iter(own.parameters.values()))
        arguments = inspect.signature(kind).parameters.values()
        call.__signature__ = own.replace(parameters=[itself, *arguments])  # type: ignore[attr-defined]
        return call

    return decorate


@dataclass(eq=False)
class Request:
    """The arguments that all decoding methods share. `PalmE.generate` documents them."""

    img: Tensor | None
    prompts: Tensor | list[Tensor]
    seq_len: int
    _: KW_ONLY
    eos_token: int | None = None
    prompt_lens: Tensor | None = None
    restrict_to_max_seq_len: bool = True
    cache_kv: bool = True
    compile: bool = False
    context: Tensor | None = None
    context_mask: Tensor | None = None

    def check(self, config: PalmEConfig, batch: int | None, can_cache: bool) -> None:
        """Reject what the model cannot do, and bring prompts into the form `(b, t)` with `prompt_lens (b,)` or None.

        Args:
            config: The config of the model.
            batch: Number of images, or None if the model does not look at any.
            can_cache: Whether the model's cached steps are correct. If not, `cache_kv` becomes False.
        """
        self.prompts, self.prompt_lens = check_prompts(self.prompts, self.prompt_lens, batch, config)
        self._check_lengths(self.prompts.shape[1], config)
        if self.eos_token is not None:
            self.eos_token = check_token_id("eos_token", self.eos_token, config.num_tokens, "or pass None")
        if not isinstance(self.compile, bool):
            raise TypeError(f"compile={self.compile!r} must be True or False")
        if self.compile and not self.cache_kv:
            raise ValueError("compile=True needs the key-value cache: leave out cache_kv=False")
        if self.compile and not can_cache:
            raise ValueError(
                "compile=True needs the key-value cache, which cannot be used with this model: leave it out"
            )
        self.cache_kv = self.cache_kv and can_cache

    def _check_lengths(self, prompt_len: int, config: PalmEConfig) -> None:
        self.seq_len = check_positive_int("seq_len", self.seq_len, "it is the maximum number of new tokens")
        if prompt_len + self.seq_len > config.max_seq_len and (config.use_abs_pos_emb or self.restrict_to_max_seq_len):
            remedy = ": shorten one, or pass restrict_to_max_seq_len=False to extrapolate"
            if config.use_abs_pos_emb:
                remedy = ", and use_abs_pos_emb=True has no positions beyond: shorten one, or raise max_seq_len"
            found = f"prompt of {prompt_len} tokens + seq_len={self.seq_len} exceeds max_seq_len={config.max_seq_len}"
            raise ValueError(found + remedy)


@dataclass(eq=False, kw_only=True)
class SamplingRequest(Request):
    """The arguments of `PalmE.stream`."""

    temperature: float = 1.0
    filter_logits_fn: str | FilterLogits = "top_k"
    filter_kwargs: dict[str, Any] | None = None
    generator: torch.Generator | None = None
    _filter: FilterLogits = field(init=False)

    def check(self, config: PalmEConfig, batch: int | None, can_cache: bool) -> None:
        """Check the request as `Request.check` does, and the arguments of sampling."""
        super().check(config, batch, can_cache)
        _check_number("temperature", self.temperature, 0, "0 (greedy) or more, and finite")
        name = self.filter_logits_fn
        if isinstance(name, str) and name not in FILTER_LOGITS_FN:
            closest = difflib.get_close_matches(name, FILTER_LOGITS_FN, n=1, cutoff=0.0)[0]
            rule = f"must be one of {', '.join(FILTER_LOGITS_FN)}, or a function: did you mean {closest!r}?"
            raise ValueError(f"filter_logits_fn={name!r} {rule}")
        self._filter = FILTER_LOGITS_FN[name] if isinstance(name, str) else name
        if not callable(self._filter):
            raise TypeError(f"filter_logits_fn={name!r} must be a name or a function of logits (b, v)")

    def choose(self, logits: Tensor) -> Tensor:
        """Return the next token ids `(b,)` for logits `(b, v)`."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        filtered = self._filter(logits.float(), **self.filter_kwargs or {})
        # Shift the largest logit to 0 first: divided by a tiny temperature, it would become inf, and the softmax nan.
        below = filtered - filtered.amax(dim=-1, keepdim=True)
        probabilities = (below / max(self.temperature, torch.finfo(below.dtype).tiny)).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]


@dataclass(eq=False, kw_only=True)
class SearchRequest(Request):
    """The arguments of `PalmE.beam_search`."""

    beams: int = 4
    length_penalty: float = 0.0

    def check(self, config: PalmEConfig, batch: int | None, can_cache: bool) -> None:
        """Check the request as `Request.check` does, and the arguments of the search."""
        super().check(config, batch, can_cache)
        self.beams = check_positive_int("beams", self.beams, "1 decodes without a search")
        _check_number("length_penalty", self.length_penalty, -math.inf, "finite: use 0 to 2, for example")


@dataclass(eq=False, kw_only=True)
class GenerationRequest(SamplingRequest, SearchRequest):
    """The arguments of `PalmE.generate`."""

    beams: int = 1

    def check(self, config: PalmEConfig, batch: int | None, can_cache: bool) -> None:
        """Check the request as `Request.check` does, and reject arguments without effect."""
        super().check(config, batch, can_cache)
        if self.beams == 1 and self.length_penalty != 0:
            rule = "has no effect with beams=1: pass beams=4, for example, or leave it out"
            raise ValueError(f"length_penalty={self.length_penalty} {rule}")
        filters = self.filter_kwargs or self._filter is not FILTER_LOGITS_FN["top_k"]
        if self.beams > 1 and (filters or self.temperature not in (0, 1) or self.generator is not None):
            unused = f"temperature={self.temperature}, filter_logits_fn, filter_kwargs and generator have no effect"
            raise ValueError(f"beams={self.beams} does not sample, so {unused}: leave them out, or pass beams=1")


def _check_number(name: str, value: Any, least: float, rule: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")
    if not (value >= least and math.isfinite(value)):
        raise ValueError(f"{name}={value} must be {rule}")
