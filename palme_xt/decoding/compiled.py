"""One decoding step with upstream's key-value cache, as one compiled graph for any length."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from x_transformers.attend import Intermediates
from x_transformers.x_transformers import LayerIntermediates

Inputs = Mapping[str, Any]  # the other inputs of the network: context, context_mask, ...
Cached = list[tuple[Tensor, ...]]  # the keys and values of each attention


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
def _compiled(one_row_on_cpu: bool) -> Callable[..., tuple[Tensor, Cached]]:
    # torch 2.15: with `dynamic=True`, the scales of the modules are inputs of the graph, at first, and the step
    # is traced a second time to make them constants. There is no public setting. CUDA graphs are off, because torch
    # would record one for each length of the cache.
    traced_once: Callable[[Any], Any] = torch._dynamo.config.patch(specialize_float=True)
    if not one_row_on_cpu:
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
    cached = [tuple(map(_as_returned, layer.cached_kv)) for layer in cache.attn_intermediates]
    step = _compiled(len(tokens) == 1 and tokens.device.type == "cpu")
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
