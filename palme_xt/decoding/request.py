"""The arguments of `generate`, `stream` and `beam_search`, written once and checked once."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from x_transformers.autoregressive_wrapper import FILTER_LOGITS_FN

from palme_xt.config import PalmEConfig, check_positive_int, did_you_mean
from palme_xt.inputs import check_prompts

FilterLogits = Callable[..., Tensor]
Images = Tensor | list[Any] | tuple[Any, ...] | None
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]

# Inputs with an entry for each token of a text, and their number of dimensions in that case.
_OF_TOKENS = {"condition": 3, "embed_ids": 2, "in_attn_cond": 3, "sum_embeds": 3}

P = ParamSpec("P")
Arguments = TypeVar("Arguments")
Returned = TypeVar("Returned")


def takes_arguments_of(
    kind: Callable[P, Arguments],
) -> Callable[[Callable[Concatenate[Any, Arguments, ...], Returned]], Callable[Concatenate[Any, P], Returned]]:
    """Let a method that takes one object be called with the arguments of the object's class.

    Type checkers, editors and `help()` see those arguments, which are written in the class alone. Keywords in the
    class's `PASSED_ON` reach the method itself. Any other keyword raises a TypeError.
    """
    arguments, passed_on = inspect.signature(kind).parameters, getattr(kind, "PASSED_ON", ())

    def decorate(method: Any) -> Any:
        @functools.wraps(method)
        def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            others = {name: kwargs.pop(name) for name in passed_on if name in kwargs}
            for name in kwargs.keys() - arguments.keys():
                unexpected = f"{method.__qualname__}() got an unexpected keyword argument {name!r}"
                raise TypeError(f"{unexpected}: {did_you_mean(name, [*arguments, *passed_on])}")
            return method(self, kind(*args, **kwargs), **others)

        call.__doc__ = method.__doc__ or kind.__doc__
        own = inspect.signature(method)
        itself, _, *rest = own.parameters.values()
        call.__signature__ = own.replace(parameters=[itself, *arguments.values(), *rest])  # type: ignore[attr-defined]
        return call

    return decorate


@dataclass(eq=False)
class Request:
    """The arguments that all decoding methods share. `PalmE.generate` documents them.

    Attributes:
        PASSED_ON: Further inputs of `x_transformers.TransformerWrapper` that methods pass on to it. For each of them, a
            test compares cached steps with reading the whole text, and prompts of different lengths with each alone.
    """

    PASSED_ON: ClassVar[tuple[str, ...]] = ("condition", "embed_ids", "in_attn_cond", "layers_execute_order")
    PASSED_ON += ("looped_steps", "max_looped_steps", "recycle_steps", "sum_embeds", "to_logits_kwargs")
    PASSED_ON += ("token_emb_kwargs", "transform_token_embeds")

    img: Images
    prompts: Tensor | Sequence[Tensor] | None = None
    seq_len: int = None  # type: ignore[assignment]  # an int from `check` on
    _: KW_ONLY
    eos_token: int | Sequence[int] | None = None
    prompt_lens: Tensor | None = None
    restrict_to_max_seq_len: bool = True
    cache_kv: bool = True
    compile: bool = False
    context: Tensor | None = None
    context_mask: Tensor | None = None
    image_embeds: Any = None
    logits_processor: LogitsProcessor | None = None
    eos_tokens: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.compile, bool):
            raise TypeError(f"compile={self.compile!r} must be True or False")
        if not (self.logits_processor is None or callable(self.logits_processor)):
            raise TypeError(f"logits_processor={self.logits_processor!r} must be a function of ids and logits")

    def check(self, config: PalmEConfig, batch: int | None, device: torch.device, can_cache: bool) -> None:
        """Reject what the model cannot do, and fill in its defaults.

        Afterwards, prompts have the form `(b, t)`, with `prompt_lens (b,)` or None, and `eos_tokens` holds the ids.

        Args:
            config: The config of the model.
            batch: Number of images, or None if the model does not look at any.
            device: The model's device.
            can_cache: Whether cached steps are wanted and correct. If not, `cache_kv` becomes False.
        """
        self.prompts, self.prompt_lens = check_prompts(self.prompts, self.prompt_lens, batch, config, device)
        prompt_len, most = self.prompts.shape[1], config.max_seq_len
        seq_len = max(1, most - prompt_len) if self.seq_len is None else self.seq_len
        self.seq_len = check_positive_int("seq_len", seq_len, "it is the maximum number of new tokens")
        if prompt_len + self.seq_len > most and self.restrict_to_max_seq_len:
            how = "slide a window over the text" if config.use_abs_pos_emb else "extrapolate"
            found = f"prompt of {prompt_len} tokens + seq_len={self.seq_len} exceeds max_seq_len={most}"
            raise ValueError(f"{found}: shorten one, or pass restrict_to_max_seq_len=False to {how}")
        self.eos_tokens = config.check_eos_token(self.eos_token).to(device)
        if self.compile and not can_cache:
            remedy = "compile, this model cannot use the cache" if self.cache_kv else "cache_kv=False"
            raise ValueError(f"compile=True needs the key-value cache: leave out {remedy}")
        self.cache_kv = can_cache

    def process(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Return what `logits_processor` makes of the logits, or log probabilities, `(b, v)` after texts `(b, t)`."""
        if self.logits_processor is None:
            return logits
        processed = self.logits_processor(ids, logits.float())
        if not isinstance(processed, Tensor) or processed.shape != logits.shape or processed.isnan().any():
            rule = f"must return logits {tuple(logits.shape)}, with -inf for tokens that are not allowed"
            raise ValueError(f"logits_processor {rule}, not {processed!r}")
        return processed


@dataclass(eq=False, kw_only=True)
class SamplingRequest(Request):
    """The arguments of `PalmE.stream`."""

    temperature: float = 1.0
    filter_logits_fn: str | FilterLogits = "top_k"
    filter_kwargs: dict[str, Any] | None = None
    num_return_sequences: int = 1
    generator: torch.Generator | None = None
    _filter: FilterLogits = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("temperature", self.temperature, 0, "0 (greedy) or more, and finite")
        rule = "it is the number of texts of a sample"
        self.num_return_sequences = check_positive_int("num_return_sequences", self.num_return_sequences, rule)
        name, keywords = self.filter_logits_fn, self.filter_kwargs or {}
        self._filter = FILTER_LOGITS_FN.get(name, name) if isinstance(name, str) else name
        if not callable(self._filter):
            rule = f"must be one of {', '.join(FILTER_LOGITS_FN)}, or a function of logits (b, v)"
            raise ValueError(f"filter_logits_fn={name!r} {rule}: {did_you_mean(name, FILTER_LOGITS_FN)}")
        known = list(inspect.signature(self._filter).parameters)[1:] if isinstance(name, str) else keywords
        if unknown := [keyword for keyword in keywords if keyword not in known]:
            # top_k of older x-transformers took the share of tokens to drop.
            hint = "; instead of thres, pass frac_num_tokens=1-thres" if (name, *unknown) == ("top_k", "thres") else ""
            raise ValueError(f"filter_kwargs={keywords} must have the keywords of {name}: {', '.join(known)}{hint}")

    def choose(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Return the next token ids `(b,)` of texts `(b, t)`, for logits `(b, v)`."""
        logits = self.process(ids, logits)
        if self.logits_processor is not None and logits.amax(dim=-1).isneginf().any():
            raise ValueError("logits_processor returned -inf for all tokens of a text: it must allow at least one")
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
    early_stopping: bool | str = "never"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.beams = check_positive_int("beams", self.beams, "1 decodes without a search")
        _check_number("length_penalty", self.length_penalty, -math.inf, "finite: use 0 to 2, for example")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ValueError(f"early_stopping={self.early_stopping!r} must be False, True or 'never'")


@dataclass(eq=False, kw_only=True)
class GenerationRequest(SamplingRequest, SearchRequest):
    """The arguments of `PalmE.generate`."""

    beams: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        sampling = ("temperature", "filter_logits_fn", "filter_kwargs", "generator")
        for name in ("length_penalty", "early_stopping") if self.beams == 1 else sampling:
            value = getattr(self, name)
            # A temperature of 0 asks for the most likely text, as a beam search does.
            if value != getattr(GenerationRequest, name) and (name, value) != ("temperature", 0):
                raise ValueError(f"{name}={value!r} has no effect with beams={self.beams}: leave it out")
        if 1 < self.beams < self.num_return_sequences:
            raise ValueError(f"num_return_sequences={self.num_return_sequences} must be at most beams={self.beams}")


def check_network_inputs(inputs: Mapping[str, Any]) -> None:
    """Reject inputs of the network with an entry for each token of a text: they would not grow with the text."""
    for name, ndim in _OF_TOKENS.items():
        for value in tree_leaves(inputs.get(name)):
            if isinstance(value, Tensor) and value.ndim == ndim and value.shape[1] != 1:
                rule = "must have size 1 in dimension 1, and so hold for all tokens, because the text grows"
                raise ValueError(f"{name} has shape {tuple(value.shape)}, {rule}")


def _check_number(name: str, value: Any, least: float, rule: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")
    if not (value >= least and math.isfinite(value)):
        raise ValueError(f"{name}={value} must be {rule}")
