"""Ctrl-C and SIGTERM as a wish to stop, not as an exception in the middle of a step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def told_to_stop() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, once; whichever comes second does what it did before."""
    told = threading.Event()
    before: dict[int, Any] = {}

    def tell(number: int, frame: object) -> None:
        told.set()
        restore()

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    if threading.current_thread() is threading.main_thread():
        for number in signal.SIGINT, signal.SIGTERM:
            before[number] = signal.signal(number, tell)
    try:
        yield told
    finally:
        restore()


def ignore_interrupts(worker: int) -> None:
    """For processes that help: a signal reaches all of a terminal or a job, and the training still needs their help."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)
