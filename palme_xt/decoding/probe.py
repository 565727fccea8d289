"""Find out what decoding with a network can rely on, by trying it on a small copy of the network."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from palme_xt.config import PalmEConfig

LENGTH = 16  # tokens of the longest text that is tried
IDS = 32  # token ids that occur in the texts
RANK = 8  # of the copy's linear layers
TOLERANCE = 2e-4  # of the largest value. Rounding causes differences of 1e-5, and what is wrong, of 2e-3 and more.


class Probe:
    """What decoding with a network can rely on. Each property is tried once, when it is first asked for.

    It is tried on a copy that has the network's modules, but other weights: random ones, so that no difference hides
    behind an initial zero. Linear layers have a low rank, so that a try takes about as long as decoding four tokens,
    whatever the size of the network. The network itself, its hooks and the state of the random number generators are
    left alone. What crashes, or cannot be tried, is not relied on.

    Args:
        net: An `x_transformers.TransformerWrapper`.
        config: The config of the model, for the context that it cross-attends to.
    """

    def __init__(self, net: Any, config: PalmEConfig) -> None:
        self._can_cache_kv = net.can_cache_kv
        self._dtype = _precise(net)
        self._length = min(LENGTH, net.max_seq_len)
        self._start = self._length // 2  # of the shorter text, after its padding
        self._small: Any = None
        with torch.random.fork_rng(devices=[]), contextlib.suppress(Exception):
            torch.manual_seed(0)
            self._ids = torch.randint(min(IDS, net.num_tokens), (2, self._length))
            # The texts become longer than the context, in case anything depends on which of the two is longer.
            context = torch.randn(2, self._length - 1, config.encoder_dim, dtype=self._dtype)
            self._inputs = {"context": context} if config.cross_attend else {}
            if net.attn_layers.need_condition:
                self._inputs["condition"] = torch.randn(2, net.attn_layers.dim_condition, dtype=self._dtype)
            self._small = _small_copy(net, self._dtype)

    @cached_property
    def cache(self) -> bool:
        """Whether steps that read one token from the cache compute the same as reading the whole text."""
        return self._holds(lambda: self._can_cache_kv and _same(self._read(slice(None), steps=2)[0], self._alone[0]))

    @cached_property
    def padding(self) -> bool:
        """Whether texts that are padded on the left compute the same as each of them alone."""

        def holds() -> bool:
            short = self._read(slice(1, 2), self._start)
            for steps in (0, 2) if self.cache else (0,):
                padded = self._read(slice(None), steps=steps, seq_start_pos=torch.tensor([0, self._start]))
                if not (_same(padded[0], self._alone[0]) and _same(padded[1, self._start :], short[0])):
                    return False
            return True

        return self._holds(holds)

    @cached_property
    def _alone(self) -> Tensor:
        return self._read(slice(0, 1))

    def _read(self, rows: slice, start: int = 0, steps: int = 0, seq_start_pos: Tensor | None = None) -> Tensor:
        """Return the outputs for all tokens from `start` on, the last of which are read in `steps` from the cache."""
        inputs = {name: value[rows] for name, value in self._inputs.items()}
        values, cache = [], None
        for token in range(self._length - steps - 1, self._length):
            ids = self._ids[rows, token if values else start : token + 1]
            output, cache = self._small(
                ids,
                **inputs,
                seq_start_pos=seq_start_pos,
                cache=cache,
                input_not_include_cache=bool(values),
                return_intermediates=True,
            )
            values.append(output)
        return torch.cat(values, dim=1)

    def _holds(self, check: Callable[[], bool]) -> bool:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), contextlib.suppress(Exception):
            return check()
        return False


_PROBES: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Probe]] = weakref.WeakKeyDictionary()


def probe(net: nn.Module, config: PalmEConfig) -> Probe:
    """Return the probe of a network. There is a new one if the network's modules or precision have changed."""
    state = _precise(net), [id(module) for module in net.modules()]
    known = _PROBES.get(net)
    if known is None or known[0] != state:
        known = _PROBES[net] = state, Probe(net, config)
    return known[1]


def _precise(net: nn.Module) -> torch.dtype:
    # In float64, upstream's float32 softmax turns the masked rows of a padded text into nan.
    return torch.promote_types(next(net.parameters()).dtype, torch.float32)


def _same(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def _small_copy(net: nn.Module, dtype: torch.dtype) -> Any:
    """Return a copy of `net` on the CPU, in eval mode, with random weights and without hooks."""
    memo: dict[int, Any] = {}
    for module in net.modules():
        memo |= {id(value): OrderedDict() for name, value in vars(module).items() if name.endswith("_hooks")}
        if isinstance(module, nn.Linear):
            layers = nn.Linear(module.in_features, RANK, bias=False), nn.Linear(RANK, module.out_features)
            for layer in layers:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            memo[id(module)] = nn.Sequential(*layers)
        elif isinstance(module, nn.Embedding):
            memo[id(module.weight)] = _random((min(IDS, module.num_embeddings), module.embedding_dim))
    for parameter in net.parameters():
        memo.setdefault(id(parameter), _random(parameter.shape))
    small: Any = copy.deepcopy(net, memo).to("cpu", dtype).eval()
    if not isinstance(small.to_logits, nn.Module):
        small.to_logits = None  # tied embeddings, for which upstream refers to the network itself
    return small


def _random(shape: tuple[int, ...]) -> nn.Parameter:
    # The values overlap in memory, so that the largest parameter takes almost none.
    numbers = torch.randn(sum(shape) + 1, dtype=torch.float32)
    values = numbers * shape[1] ** -0.5 if len(shape) == 2 else numbers
    return nn.Parameter(values.as_strided(shape, [1] * len(shape)), requires_grad=False)
