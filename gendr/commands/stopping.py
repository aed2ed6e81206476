"""Ctrl-C and its kin: a run ends in order, whoever asks it to end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

# A terminal that closes and a system that shuts down ask as Ctrl-C does.
ASKING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


@contextlib.contextmanager
def as_interrupts() -> Iterator[None]:
    """Every request to end raises KeyboardInterrupt; what the caller ignores stays ignored."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with _handled(interrupt):
        yield


@contextlib.contextmanager
def delayed(asked: Callable[[], None]) -> Iterator[None]:
    """Inside the block a request calls `asked` and nothing else; a second one interrupts."""
    count = 0

    def remember(*_: Any) -> None:
        nonlocal count
        count += 1
        asked()
        if count > 1:
            raise KeyboardInterrupt

    with _handled(remember):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[..., None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    try:
        for number in ASKING:
            # None: set by something that is not Python, which could not be put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
