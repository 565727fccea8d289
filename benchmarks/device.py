"""The device that contestants run on: all that differs between a CPU and a GPU when time and memory are measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.machine import processor

Action = Callable[[], object]


class Device:
    """The CPU.

    Args:
        dtype: Name of the floating-point type of weights and images, or None for the usual one.

    Attributes:
        kind: What torch calls it.
        dtype: The floating-point type.
        warm_up: Rounds that are not counted.
        matrices: Sizes (m, k, n) of a matrix product that is large enough to show the highest rate.
        activities: What the profiler records.
        total: The column of a profile that it is sorted by.
    """

    kind = "cpu"
    usual = "float32"
    warm_up = 1
    matrices = (2048, 512, 2048)
    activities: tuple[ProfilerActivity, ...] = (ProfilerActivity.CPU,)
    total = "self_cpu_time_total"

    def __init__(self, dtype: str | None = None) -> None:
        self.dtype: torch.dtype = getattr(torch, dtype or self.usual)

    @property
    def dtype_name(self) -> str:
        """The name of the floating-point type."""
        return str(self.dtype).removeprefix("torch.")

    def describe(self) -> str:
        """Return the processor, and the floating-point type if it is not the usual one of a CPU."""
        return processor() if self.dtype == torch.float32 else f"{self.dtype_name}, {processor()}"

    def place(self, value: Any) -> Any:
        """Move a module or a tensor here, and cast its floating-point numbers."""
        cast = not isinstance(value, torch.Tensor) or value.is_floating_point()
        return value.to(self.kind, self.dtype) if cast else value.to(self.kind)

    def seconds(self, action: Action) -> float:
        """Run `action` and return how long that takes."""
        started = time.perf_counter()
        action()
        return time.perf_counter() - started

    def peak(self, action: Action) -> float:
        """Run `action` and return by how many MB the peak of the memory rises above what is in use before.

        On the CPU, that is the memory of this process on Linux, which counts in units of 1024 bytes. It never forgets a
        peak, so call this once, in a new process. (`getrusage` would include the process that started this one.)
        """
        before = _high_water_mark()
        action()
        return _high_water_mark() - before


class Cuda(Device):
    """A GPU, which works while the process goes on: it records events between which it counts the time itself."""

    kind = "cuda"
    usual = "bfloat16"
    warm_up = 3
    matrices = (8192, 8192, 8192)
    activities = (ProfilerActivity.CPU, ProfilerActivity.CUDA)
    total = "self_device_time_total"

    def describe(self) -> str:
        """Return the name of the GPU, its version of CUDA, the floating-point type, and the processor."""
        gpu = f"{torch.cuda.get_device_name()} with CUDA {torch.version.cuda}"
        return f"{gpu} in {self.dtype_name}, {processor()}"

    def seconds(self, action: Action) -> float:
        """Run `action` and return how long that takes, until the GPU has done all of it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def peak(self, action: Action) -> float:
        """Run `action` and return by how many MB the peak of the GPU's memory rises above what is in use before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6


CPU = Device()
KINDS = {device.kind: device for device in (Device, Cuda)}


def _high_water_mark() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
