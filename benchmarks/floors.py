"""Measure lower bounds for any implementation on a device, from its memory bandwidth and its matrix products."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.device import Action, Device


def _fastest_half(action: Action, device: Device, times: int = 9) -> float:
    seconds = [device.seconds(action) for _ in range(times)]
    return statistics.median(sorted(seconds)[: times // 2 + 1])


def bandwidth(device: Device) -> float:
    """Return the memory bandwidth of a device in bytes per second, measured with a sum over 1 GiB."""
    values = torch.ones(2**28, device=device.kind)
    return values.nbytes / _fastest_half(values.sum, device)


def weights_read_each_step(net: nn.Module) -> list[Tensor]:
    """Return the weight matrices of a decoder that a cached step reads completely.

    These are all except the token embedding and the keys and values of cross-attention, which are cached.
    """
    cross = [name for name, module in net.named_modules() if getattr(module, "causal", None) is False]
    cached = {f"{attention}.{projection}" for attention in cross for projection in ("to_k", "to_v")}
    linear = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    return [module.weight for name, module in linear.items() if name not in cached]


def step_floor(net: nn.Module, batch: int, device: Device) -> float:
    """Return the seconds to read all weights of a step at batch 1, or for their matrix products at larger batches."""
    weights = weights_read_each_step(net)
    if batch == 1:
        return sum(weight.nbytes for weight in weights) / bandwidth(device)
    inputs = [weight.new_ones(batch, weight.shape[1]) for weight in weights]
    with torch.no_grad():
        return _fastest_half(lambda: [torch.mm(x, w.T) for x, w in zip(inputs, weights, strict=True)], device)


def flops_floor(step: Action, device: Device) -> float:
    """Return the seconds for the floating-point operations of `step` at the rate of a large matrix product."""
    with FlopCounterMode(display=False) as counter:
        step()
    m, k, n = device.matrices
    a, b, out = (device.place(torch.randn(shape)) for shape in ((m, k), (k, n), (m, n)))
    seconds = _fastest_half(lambda: torch.mm(a, b, out=out), device, times=41)
    return float(counter.get_total_flops()) * seconds / (2 * m * k * n)
