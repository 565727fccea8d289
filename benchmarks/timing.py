"""Time contestants in turns, so that a machine that slows down affects all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from benchmarks.device import CPU, Device

Contestant = Callable[[], object]


def medians(contestants: Mapping[str, Contestant], rounds: int, device: Device = CPU) -> dict[str, float]:
    """Return the median seconds of each contestant over `rounds` rounds, after the device's rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(device.warm_up + rounds):
        for name, contestant in contestants.items():
            taken = device.seconds(contestant)
            if number >= device.warm_up:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}
