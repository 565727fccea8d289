"""What `generate` and `stream` may be asked for: every check that is not about images or prompts."""

from __future__ import annotations

import difflib
import math
from typing import Any

import torch
from x_transformers.autoregressive_wrapper import FILTER_LOGITS_FN

from palme_xt.config import PalmEConfig
from palme_xt.decoding.loop import FilterLogits, Sampling


def check_lengths(prompt_len: int, seq_len: Any, restrict_to_max_seq_len: bool, config: PalmEConfig) -> None:
    """Refuse to decode nothing, or beyond `max_seq_len`."""
    if isinstance(seq_len, bool) or not isinstance(seq_len, int):
        raise TypeError(f"seq_len={seq_len!r} must be a positive int, not {type(seq_len).__name__}")
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be a positive int: how many new tokens to decode at most")
    if prompt_len + seq_len <= config.max_seq_len:
        return
    found = f"prompt of {prompt_len} tokens + seq_len={seq_len} exceeds max_seq_len={config.max_seq_len}"
    if config.use_abs_pos_emb:
        raise ValueError(
            f"{found}, and use_abs_pos_emb=True has no positions beyond: shorten one, or raise max_seq_len"
        )
    if restrict_to_max_seq_len:
        raise ValueError(f"{found}: shorten one, or pass restrict_to_max_seq_len=False to extrapolate")


def check_left_padding(config: PalmEConfig) -> None:
    """Refuse prompts of different lengths where x-transformers (up to 2.31.10) does not mask what pads them."""
    for part, name in ("transformer", "num_memory_tokens"), ("decoder", "attn_num_mem_kv"):
        value = getattr(config, f"{part}_kwargs").get(name)
        if value:
            raise ValueError(
                f"prompts must be of one length with {part}_kwargs[{name!r}]={value}: x-transformers does not mask the "
                "padding of shorter ones then; decode each length in a call of its own"
            )


def check_eos_token(eos_token: Any, config: PalmEConfig) -> None:
    """Refuse an EOS that is no token."""
    if eos_token is None:
        return
    if isinstance(eos_token, bool) or not isinstance(eos_token, int):
        raise TypeError(f"eos_token={eos_token!r} must be a token id or None, not {type(eos_token).__name__}")
    if not 0 <= eos_token < config.num_tokens:
        raise ValueError(f"eos_token={eos_token} must be a token id within 0..num_tokens-1={config.num_tokens - 1}")


def check_sampling(
    temperature: Any,
    filter_logits_fn: str | FilterLogits,
    filter_kwargs: dict[str, Any] | None,
    generator: torch.Generator | None,
) -> Sampling:
    """The way of choosing tokens that was asked for."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature={temperature!r} must be a number, not {type(temperature).__name__}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more, and finite")
    if isinstance(filter_logits_fn, str):
        if filter_logits_fn not in FILTER_LOGITS_FN:
            closest = difflib.get_close_matches(filter_logits_fn, FILTER_LOGITS_FN, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"filter_logits_fn={filter_logits_fn!r} must be one of {', '.join(FILTER_LOGITS_FN)}, or a function: "
                f"did you mean {closest!r}?"
            )
        filter_logits_fn = FILTER_LOGITS_FN[filter_logits_fn]
    if not callable(filter_logits_fn):
        raise TypeError(f"filter_logits_fn={filter_logits_fn!r} must be a name or a function of logits (b, v)")
    return Sampling(temperature, filter_logits_fn, filter_kwargs or {}, generator)


def check_beams(beams: Any, length_penalty: Any, sampling: Sampling | None = None) -> bool:
    """Whether `generate` is to search; refuse what would have no effect then, or otherwise."""
    if isinstance(beams, bool) or not isinstance(beams, int):
        raise TypeError(f"beams={beams!r} must be a positive int, not {type(beams).__name__}")
    if beams < 1:
        raise ValueError(f"beams={beams} must be a positive int: 1 decodes without a search")
    if isinstance(length_penalty, bool) or not isinstance(length_penalty, int | float):
        raise TypeError(f"length_penalty={length_penalty!r} must be a number, not {type(length_penalty).__name__}")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty={length_penalty} must be finite: 0 to 2 is usual")
    if sampling is None:
        return True
    if beams == 1 and length_penalty != 0:
        raise ValueError(
            f"length_penalty={length_penalty} has no effect with beams=1: pass beams=4, say, or leave it out"
        )
    samples = (
        sampling.temperature not in (0, 1)
        or sampling.filter_logits is not FILTER_LOGITS_FN["top_k"]
        or sampling.filter_kwargs
        or sampling.generator is not None
    )
    if beams > 1 and samples:
        raise ValueError(
            f"beams={beams} does not sample, so temperature={sampling.temperature}, filter_logits_fn, filter_kwargs "
            "and generator have no effect: leave them out, or pass beams=1"
        )
    return beams > 1


def check_compile(compile: Any, cache_kv: bool, can_cache: bool) -> None:
    """Refuse to compile a step that there is not.

    Raises:
        TypeError: `compile` is not a bool.
        ValueError: the whole text is read at each step, so that no step is like the one before.
    """
    if not isinstance(compile, bool):
        raise TypeError(f"compile={compile!r} must be True or False")
    if compile and not cache_kv:
        raise ValueError("compile=True needs the key-value cache: leave out cache_kv=False")
    if compile and not can_cache:
        raise ValueError("compile=True needs the key-value cache, which cannot be used with this model: leave it out")
