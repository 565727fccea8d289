"""Time contestants in turns, so that a machine that slows down affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Contestant = Callable[[], object]


def medians(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, float]:
    """Return the median seconds of each contestant over `rounds` rounds, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            started = time.perf_counter()
            contestant()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}
