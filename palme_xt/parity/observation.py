"""Call a model's own forward, and keep what it computes: layers, outputs, gradients, and cached logits."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from palme_xt.parity.numbers import Numbers, first_tensor, leaves
from palme_xt.parts import Inputs, exactly, is_causal, undisturbed


class Call(NamedTuple):
    """A call of a `TransformerWrapper` of a Decoder.

    Attributes:
        net: The module.
        ids: The token ids `(b, n)` that it was given.
        context: Its arguments `context` and `context_mask`, as far as they were given.
        logits: What it returned, `(b, n, v)`.
    """

    net: Any
    ids: Tensor
    context: dict[str, Any]
    logits: Tensor


class Observation(NamedTuple):
    """What a forward computes.

    Attributes:
        layers: The first tensor that each module returned, in the order in which they finished, innermost first. Names
            are those in the state dict, followed by the number of the call if a module is called repeatedly.
        outputs: The leaves of the output, or nothing if none of them is a tensor.
        call: The first call of a decoder's net, or None if there was none.
    """

    layers: Numbers
    outputs: Numbers
    call: Call | None


def a_weight(model: nn.Module, default: Tensor) -> Tensor:
    """Return the first floating-point parameter or buffer, whose device and dtype stand for those of the model."""
    return next((t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()), default)


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Allow a model to be run in any mode: on exit, it has its modes, weights and buffers again.

    Inside, the random numbers are others than outside, there are no gradients, and a `PalmE` computes exactly as
    upstream does.
    """
    tensors = [(tensor, tensor.detach().clone()) for tensor in chain(model.parameters(), model.buffers())]
    with undisturbed(model), torch.no_grad(), exactly():
        try:
            yield
        finally:
            for tensor, before in tensors:
                tensor.copy_(before)


def observe(model: nn.Module, inputs: Inputs) -> Observation:
    """Call a model's forward in eval mode."""
    names = {module: name for name, module in model.named_modules()}
    layers: Numbers = {}
    times: Counter[str] = Counter()
    calls: list[Call] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is None:
            return
        name = names[module]
        times[name] += 1
        layers[name if times[name] == 1 else f"{name}#{times[name]}"] = tensor.clone()
        if is_causal(module) and not calls:
            context = {key: kwargs[key] for key in ("context", "context_mask") if kwargs.get(key) is not None}
            calls.append(Call(module, args[0] if args else kwargs["x"], context, tensor.clone()))

    # Not `register_module_forward_hook`: torch (2.15) never forgets such a hook that takes keywords, and then
    # `torch.compile` warns for the rest of the process.
    with ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_hook(keep, with_kwargs=True))
        output = _forward(model, inputs, training=False)
    layers.pop("", None)  # the model itself
    outputs = {} if first_tensor(output) is None else dict(leaves(output))
    return Observation(layers, outputs, calls[0] if calls else None)


def cached_logits(call: Call) -> Numbers:
    """Return the logits after each token of a text. Each step reads one more, with the cache of the previous steps."""
    outputs: Numbers = {}
    cache = None
    for n in range(1, call.ids.shape[1] + 1):
        step = call.ids[:, :n] if cache is None else call.ids[:, n - 1 : n]
        logits, new = call.net(
            step, **call.context, cache=cache, input_not_include_cache=cache is not None, return_intermediates=True
        )
        cache = new if call.net.can_cache_kv else None
        outputs[f"token {n}"] = logits[:, -1]
    return outputs


def gradients(model: nn.Module, inputs: Inputs) -> Numbers:
    """Return the gradients that a model's parameters get in training mode.

    They are those of the first differentiable output if it is a scalar, such as a loss, and otherwise of a fixed random
    projection of all differentiable outputs.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        output = _forward(model, inputs, training=True)
        tensors = [value for _, value in leaves(output) if isinstance(value, Tensor) and value.requires_grad]
        if not tensors or not named:
            return {}
        generator = torch.Generator().manual_seed(0)
        weighted = [(tensor * torch.randn(tensor.shape, generator=generator).to(tensor)).sum() for tensor in tensors]
        scalar: Any = tensors[0] if tensors[0].ndim == 0 else sum(weighted)
        found = torch.autograd.grad(scalar, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def _forward(model: nn.Module, inputs: Inputs, *, training: bool) -> Any:
    """Call forward with copies of the inputs on the model's device and in its dtype, and seeded random numbers."""

    def copy(tensor: Tensor) -> Tensor:
        like = a_weight(model, default=tensor)
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

    args, kwargs = tree_map_only(Tensor, copy, inputs)
    model.train(training)
    random.seed(0)
    torch.manual_seed(0)
    return model(*args, **kwargs)
