"""One decoding step with upstream's key-value cache, as one compiled graph for any length."""

import copy
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from x_transformers.attend import Intermediates
from x_transformers.x_transformers import Attention, AttentionLayers, FeedForward, LayerIntermediates

Inputs = Mapping[str, Any]  # the other inputs of the network: context, context_mask, ...
Cached = list[tuple[Tensor, ...]]  # the keys and values of each attention

# Attributes of upstream's layers by which an attention reads more of an earlier one than a region returns.
READ_OTHERS = "residual_attn", "cross_residual_attn", "add_value_residual"


def _traced_once(block: Callable[..., Any]) -> Callable[..., Any]:
    region: Any = torch.compiler.nested_compile_region
    # torch 2.12 to 2.15 raises a RuntimeError for the ninth block that differs from all others, unless it may keep
    # more of them. torch 2.9 has no such limit.
    kwargs = {"max_reuse_entries": sys.maxsize} if "max_reuse_entries" in inspect.signature(region).parameters else {}
    return region(block, **kwargs)  # type: ignore[no-any-return]


@_traced_once
def _feed_forward(block: nn.Module, args: Any, kwargs: Any) -> Tensor:
    return block(*args, **kwargs)  # type: ignore[no-any-return]


@_traced_once
def _attention(block: nn.Module, kind: str, cached_kv: Any, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    out, new = block(*args, cache=Intermediates(cached_kv=cached_kv, layer_type=kind), **kwargs)
    return out, *new.cached_kv  # torch 2.15 traces every block again if the tuples are nested


@dataclass
class _Grown:
    cached_kv: tuple[Tensor, ...]


class _Region(nn.Module):
    """A block that is traced and compiled once for all blocks that compute the same with other weights."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        if cache is None:
            return _feed_forward(self.block, args, kwargs)
        out, *cached_kv = _attention(self.block, cache.layer_type, cache.cached_kv, args, kwargs)
        return out, _Grown(tuple(cached_kv))


def in_regions(module: Any) -> Any:
    """Return a view of a network with the same weights, in which blocks that are alike are compiled once."""
    if isinstance(module, Attention | FeedForward):
        return _Region(module)
    if isinstance(module, AttentionLayers) and any(map(vars(module).get, READ_OTHERS)):
        return module
    view = copy.copy(module)
    view._modules = {name: child and in_regions(child) for name, child in module._modules.items()}
    return view


def _step(net: Any, tokens: Tensor, kinds: tuple[str, ...], cached: Cached, inputs: Inputs) -> tuple[Tensor, Cached]:
    layers = [Intermediates(cached_kv=kv, layer_type=kind) for kind, kv in zip(kinds, cached, strict=True)]
    length = cached[kinds.index("a")][0].shape[-2]
    cache = LayerIntermediates(attn_intermediates=layers, cache_length=length)
    logits, new = net(tokens, **inputs, cache=cache, input_not_include_cache=True, return_intermediates=True)
    return logits[:, -1], [layer.cached_kv for layer in new.attn_intermediates if layer.layer_type == "a"]


def _matrix_vector(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    values = (x * weight).sum(dim=-1).view(*x.shape[:-1], -1)
    return values if bias is None else values + bias


@functools.cache
def _compiled(device: str, one_row: bool) -> Callable[..., tuple[Tensor, Cached]]:
    # torch 2.15: with `dynamic=True`, the scales of the modules are inputs of the graph, at first, and the step
    # is traced a second time to make them constants. There is no public setting. CUDA graphs are off, because torch
    # would record one for each length of the cache.
    traced_once: Callable[[Any], Any] = torch._dynamo.config.patch(specialize_float=True)
    if device == "cpu":
        # torch 2.15 compiles a test program to find out which vector instructions it may use, which takes seconds.
        # This does so while the step is traced, and the compiler later finds the result.
        from torch._inductor.cpu_vec_isa import pick_vec_isa  # imported here, because it takes a while

        threading.Thread(target=pick_vec_isa, daemon=True).start()
    if device != "cpu" or not one_row:
        return traced_once(torch.compile(_step, fullgraph=True, dynamic=True))  # type: ignore[no-any-return]
    from torch._inductor.custom_graph_pass import CustomGraphPass

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
    cached = [tuple(map(_as_returned, layer.cached_kv)) for layer in cache.attn_intermediates]
    step = _compiled(tokens.device.type, len(tokens) == 1)
    logits, grown = step(net, tokens.clone(), kinds, cached, inputs)
    self_attentions = iter(grown)
    layers = [
        Intermediates(cached_kv=next(self_attentions) if kind == "a" else kv, layer_type=kind)
        for kind, kv in zip(kinds, cached, strict=True)
    ]
    return logits, LayerIntermediates(attn_intermediates=layers, cache_length=cache.cache_length + tokens.shape[1])


def _as_returned(kv: Tensor) -> Tensor:
    # A graph is specific to the strides, and to views or no views: the tensors of the prompt would need their own.
    return kv if kv._base is None and kv.is_contiguous() else kv.clone(memory_format=torch.contiguous_format)
