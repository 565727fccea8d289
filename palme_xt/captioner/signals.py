"""Handlers for SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal), in a training process and in its readers."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

GRACE_SECONDS = 2.0
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that SIGINT, SIGTERM or SIGHUP sets, instead of interrupting the process.

    A launcher and the terminal or job scheduler may both pass on the same request, so a second signal within
    `GRACE_SECONDS` has no effect. A later one is handled as it was before, which usually ends the process. A SIGHUP
    that is ignored, as nohup wants it, is still ignored.
    """
    requested = threading.Event()
    deadline = 0.0

    def handle(number: Any, frame: object) -> None:
        nonlocal deadline
        if not requested.is_set():
            requested.set()
            deadline = time.monotonic() + GRACE_SECONDS
        elif time.monotonic() > deadline:
            signal.signal(number, previous[number])
            signal.raise_signal(number)

    may_handle = threading.current_thread() is threading.main_thread()
    previous: dict[Any, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS if may_handle}
    for number, handler in previous.items():
        if (number.name, handler) != ("SIGHUP", signal.SIG_IGN):
            signal.signal(number, handle)
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_interrupts_until(done: Any) -> None:
    """Ignore all of these signals in this process until `done.value` is true; from then on SIGTERM ends the process.

    Signals reach all processes of a terminal or a job, but training needs its readers to finish the step.

    Args:
        done: A shared value that becomes true when the main process no longer needs this process.
    """

    def end(number: int, frame: object) -> None:
        if done.value:
            os._exit(0)

    for number in STOP_SIGNALS:
        signal.signal(number, end if number == signal.SIGTERM else signal.SIG_IGN)
