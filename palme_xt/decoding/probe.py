"""Find out what decoding with a network can rely on, by trying it on a small copy of the network."""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from palme_xt.config import PalmEConfig

LENGTH = 16  # tokens of the texts that are tried
RANK = 8  # of the linear layers in the copy
TOLERANCE = 2e-4  # of the largest value. Rounding differs by up to 3e-5, and what is wrong differs by at least 1e-3.
WINDOWS = {"max_attend_past", "axial_dim", "max_dist", "max_pos"}  # attributes that matter only to longer texts

_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()


def is_right(net: Any, config: PalmEConfig, *, cached: bool, padded: bool, at_once: int = 1) -> bool:
    """Return whether a network computes the same for texts in a batch as for the whole of each text alone.

    It is tried once, and again if modules are replaced, or if the precision changes. The network, its hooks and the
    state of the random number generators are left alone. What crashes, or cannot be tried, counts as wrong.

    Args:
        net: An `x_transformers.TransformerWrapper`.
        config: The config of the model, for the context that it cross-attends to.
        cached: Read the last tokens step by step, with the key-value cache.
        padded: Pad one of the texts on the left.
        at_once: How many tokens such a step reads.
    """
    # In float64, upstream's float32 softmax turns the masked rows of a padded text into nan.
    dtype = torch.promote_types(next(net.parameters()).dtype, torch.float32)
    known, state = _KNOWN.setdefault(net, {}), (cached, padded, at_once, dtype, *map(id, net.modules()))
    if state not in known:
        with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(0)
            try:
                known[state] = _try(net, config, dtype, at_once, 2 if cached else 0, LENGTH // 2 if padded else 0)
            except Exception:
                known[state] = False
    return known[state]


def _try(net: Any, config: PalmEConfig, dtype: torch.dtype, at_once: int, steps: int, padding: int) -> bool:
    small, length = _small_copy(net, dtype), min(LENGTH, net.max_seq_len)
    ids = torch.randint(net.num_tokens, (2, length))
    # The texts become longer than the context, in case anything depends on which of the two is longer.
    inputs = {"context": torch.randn(2, length - 1, config.encoder_dim, dtype=dtype)} if config.cross_attend else {}
    if net.attn_layers.need_condition:
        inputs["condition"] = torch.randn(2, net.attn_layers.dim_condition, dtype=dtype)

    def read(rows: slice, start: int, unread: int, seq_start_pos: Tensor | None = None) -> Tensor:
        given: dict[str, Any] = {name: value[rows] for name, value in inputs.items()}
        given |= {"seq_start_pos": seq_start_pos, "return_intermediates": True}
        output, cache = small(ids[rows, start : length - unread], **given)
        outputs = [output]
        for place in range(length - unread, length, at_once):
            how = {"cache": cache, "cache_age": 0, "input_not_include_cache": True, **given}
            output, cache = small(ids[rows, place : place + at_once], **how)
            outputs.append(output)
        return torch.cat(outputs, dim=1)

    found = read(slice(None), 0, steps * at_once, torch.tensor([0, padding]) if padding else None)
    pairs = [(found[row, start:], read(slice(row, row + 1), start, 0)[0]) for row, start in ((0, 0), (1, padding))]
    return all(torch.allclose(a, b, rtol=0, atol=TOLERANCE * float(b.abs().max())) for a, b in pairs)


def _small_copy(net: nn.Module, dtype: torch.dtype) -> Any:
    """Return a copy of `net` on the CPU, in eval mode, with random weights, and without hooks.

    The weights are random so that no difference hides behind an initial zero. Linear layers get a low rank, and other
    parameters overlap in memory, so that the largest network takes little time and almost no memory.
    """
    memo: dict[int, Any] = {}
    for parameter in net.parameters():
        shape = parameter.shape
        numbers = torch.randn(sum(shape) + 1) * (shape[1] ** -0.5 if len(shape) == 2 else 1)
        memo[id(parameter)] = nn.Parameter(numbers.as_strided(shape, [1] * len(shape)))
    for module in net.modules():
        memo |= {id(value): {} for name, value in vars(module).items() if name.endswith("_hooks")}
        if isinstance(module, nn.Linear):
            layers = nn.Linear(module.in_features, RANK, bias=False), nn.Linear(RANK, module.out_features)
            for layer in layers:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            memo[id(module)] = nn.Sequential(*layers)
    small: Any = copy.deepcopy(net, memo).to("cpu", dtype).eval()
    for module in small.modules():
        for name in WINDOWS & vars(module).keys():
            setattr(module, name, getattr(module, name) and min(getattr(module, name), LENGTH // 4))
    if not isinstance(small.to_logits, nn.Module):
        small.to_logits = None  # tied embeddings, for which upstream refers to `net` itself
    return small
