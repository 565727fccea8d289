"""One decoding step with upstream's key-value cache, as one compiled graph for any length."""

import contextlib
import copy
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from x_transformers.attend import Intermediates
from x_transformers.x_transformers import Attention, AttentionLayers, FeedForward, LayerIntermediates

Inputs = Mapping[str, Any]  # the other inputs of the network: context, context_mask, ...
Cached = list[tuple[Tensor | None, ...]]  # the keys, the values and the hidden state of each attention

# Attributes of upstream's layers by which an attention reads more of an earlier one than a region returns.
READ_OTHERS = "residual_attn", "cross_residual_attn", "add_value_residual"


def _cached(layer: Any) -> tuple[Tensor | None, ...]:
    # torch 2.15 traces every block again if a region returns None, or tuples in a tuple.
    return layer.cached_kv if layer.hybrid_hidden is None else (*layer.cached_kv, layer.hybrid_hidden)


def _fields(cached: Sequence[Tensor | None]) -> dict[str, Any]:
    return {"cached_kv": tuple(cached[:2]), "hybrid_hidden": cached[2] if len(cached) > 2 else None}


def _layer(kind: str, cached: Sequence[Tensor | None]) -> Intermediates:
    return Intermediates(layer_type=kind, **_fields(cached))


def _compiled_once(block: Callable[..., Any]) -> Callable[..., Any]:
    region: Any = torch.compiler.nested_compile_region
    # torch 2.12 to 2.15 raises a RuntimeError for the ninth block that differs from all others, unless it may keep
    # more of them. torch 2.9 has no such limit.
    kwargs = {"max_reuse_entries": sys.maxsize} if "max_reuse_entries" in inspect.signature(region).parameters else {}
    return region(block, **kwargs)  # type: ignore[no-any-return]


@_compiled_once
def _feed_forward(block: nn.Module, args: Any, kwargs: Any) -> Tensor:
    return block(*args, **kwargs)  # type: ignore[no-any-return]


@_compiled_once
def _attention(block: nn.Module, kind: str, cached: Any, args: Any, kwargs: Any) -> tuple[Tensor | None, ...]:
    out, new = block(*args, cache=_layer(kind, cached), **kwargs)
    return out, *_cached(new)


@dataclass
class _Grown:
    # In upstream's `Intermediates`, all else would be None, and a layer that reads it would be silently wrong.
    cached_kv: tuple[Tensor | None, ...]
    hybrid_hidden: Tensor | None


class _Region(nn.Module):
    """A block that is traced and compiled once for all blocks that compute the same with other weights."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        if cache is None:
            return _feed_forward(self.block, args, kwargs)
        out, *grown = _attention(self.block, cache.layer_type, _cached(cache), args, kwargs)
        return out, _Grown(**_fields(grown))


def in_regions(module: Any) -> Any:
    """Return a view of a network with the same weights, in which blocks that are alike are compiled once."""
    if isinstance(module, Attention | FeedForward):
        return _Region(module)
    if isinstance(module, AttentionLayers) and any(map(vars(module).get, READ_OTHERS)):
        return module
    view = copy.copy(module)
    view._modules = {name: child and in_regions(child) for name, child in module._modules.items()}
    return view


def _step(
    net: Any, tokens: Tensor, kinds: tuple[str, ...], cached: Cached, length: int, inputs: Inputs
) -> tuple[Tensor, Cached]:
    layers = list(map(_layer, kinds, cached))
    if "a" in kinds:  # a number would be another size for the compiler
        length = cached[kinds.index("a")][0].shape[-2]  # type: ignore[union-attr]
    cache = LayerIntermediates(attn_intermediates=layers, cache_length=length)
    logits, new = net(tokens, **inputs, cache=cache, input_not_include_cache=True, return_intermediates=True)
    return logits[:, -1], [_cached(layer) for layer in new.attn_intermediates if layer.layer_type == "a"]


def _matrix_vector(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    values = (x * weight).sum(dim=-1).view(*x.shape[:-1], -1)
    return values if bias is None else values + bias


def _find_vector_instructions() -> None:
    # torch 2.9 to 2.15 compiles a program to find out which vector instructions there are. This takes seconds, so
    # begin while the step is traced. Code generation then finds the result, or finds it out itself.
    with contextlib.suppress(ImportError):
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        pick_vec_isa()


@functools.cache
def _compiled(device: str, one_row: bool) -> Callable[..., tuple[Tensor, Cached]]:
    # torch 2.15: with `dynamic=True`, the scales of the modules are inputs of the graph, at first, and the step
    # is traced a second time to make them constants. There is no public setting. CUDA graphs are off, because torch
    # would record one for each length of the cache.
    traced_once: Callable[[Any], Any] = torch._dynamo.config.patch(specialize_float=True)
    if device == "cpu":
        threading.Thread(target=_find_vector_instructions, daemon=True).start()
    if device != "cpu" or not one_row:
        return traced_once(torch.compile(_step, fullgraph=True, dynamic=True))  # type: ignore[no-any-return]
    from torch._inductor.custom_graph_pass import CustomGraphPass  # imported here, because it takes a while

    class MatrixVector(CustomGraphPass):
        """Read each weight at the full memory bandwidth. MKL's product with one row reaches half of it."""

        def __call__(self, graph: torch.fx.Graph) -> None:
            for node in graph.find_nodes(op="call_function", target=torch._C._nn.linear):
                x = node.args[0].meta["example_value"]
                if x.shape.numel() == x.shape[-1]:
                    node.target = _matrix_vector

        def uuid(self) -> str:
            return "palme_xt matrix-vector product 1"

    # Otherwise, the normalised input row would be computed again for each row of the weight.
    realize = dict.fromkeys(("realize_reads_threshold", "realize_opcount_threshold", "realize_acc_reads_threshold"), 1)
    options: dict[str, Any] = {"pre_grad_custom_pass": MatrixVector(), **realize}
    return traced_once(torch.compile(_step, fullgraph=True, dynamic=True, options=options))  # type: ignore[no-any-return]


def compiled_step(net: Any, tokens: Tensor, cache: Any, inputs: Inputs) -> tuple[Tensor, LayerIntermediates]:
    """Run `net` on the next `tokens (b, 1)` after `cache`, and return their logits `(b, v)` and the longer cache.

    The graph is compiled at the first call for a network, and once more if a batch of one follows a larger one.
    """
    kinds = tuple(layer.layer_type for layer in cache.attn_intermediates)
    cached = [tuple(map(_as_returned, _cached(layer))) for layer in cache.attn_intermediates]
    step = _compiled(tokens.device.type, len(tokens) == 1)
    logits, grown = step(net, tokens.clone(), kinds, cached, cache.cache_length, inputs)
    self_attentions = iter(grown)
    layers = [
        _layer(kind, next(self_attentions) if kind == "a" else kept) for kind, kept in zip(kinds, cached, strict=True)
    ]
    return logits, LayerIntermediates(attn_intermediates=layers, cache_length=cache.cache_length + tokens.shape[1])


def _as_returned(kept: Tensor | None) -> Tensor | None:
    # A graph is specific to the strides, and to views or no views: the tensors of the prompt would need their own.
    if kept is None or (kept._base is None and kept.is_contiguous()):
        return kept
    return kept.clone(memory_format=torch.contiguous_format)
