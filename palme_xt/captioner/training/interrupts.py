"""Ctrl-C and SIGTERM as a wish to stop, not as an exception in the middle of a step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

SECONDS = 2.0


@contextlib.contextmanager
def told_to_stop() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; one that comes more than `SECONDS` later does what it did before.

    Those that come sooner are the same wish, told twice: by the terminal or the job, and by the launcher.
    """
    told = threading.Event()
    before: dict[int, Any] = {}
    first = 0.0

    def tell(number: int, frame: object) -> None:
        nonlocal first
        if not told.is_set():
            told.set()
            first = time.monotonic()
        elif time.monotonic() > first + SECONDS:
            restore()
            signal.raise_signal(number)

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


def ignore_interrupts_until(done: Any) -> None:
    """For processes that help: a signal reaches all of a terminal or a job, and the training still needs their help.

    Args:
        done: a shared value, true once it does not. From then on SIGTERM ends this process.
    """

    def end(number: int, frame: object) -> None:
        if done.value:
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
