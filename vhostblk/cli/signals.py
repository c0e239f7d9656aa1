"""Signals of the process, for an event loop that has much else to do.

asyncio's own way puts the number of a signal into the socket by which threads wake the loop. When thousands of them
have done so before the loop looks, the socket is full, and the signal is lost: SIGTERM, too. Here the fd only wakes,
and which signals there were is kept by their handlers.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

_ENOUGH = 4096


@contextmanager
def signals_handled(handlers: Mapping[signal.Signals, Callable[[], object]]) -> Iterator[None]:
    """Inside, call what belongs to a signal once or more after it has come.

    Context: the control loop, in the main thread.
    """
    loop = asyncio.get_running_loop()
    came: set[int] = set()
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def look() -> None:
        with suppress(BlockingIOError):
            os.read(reader, _ENOUGH)
        while came:
            handlers[signal.Signals(came.pop())]()

    # A full pipe wakes as well as any.
    old_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    old = {number: signal.signal(number, lambda it, _frame: came.add(it)) for number in handlers}
    for number in handlers:
        signal.siginterrupt(number, False)  # system calls that can go on behind a signal do
    loop.add_reader(reader, look)
    try:
        yield
    finally:
        loop.remove_reader(reader)
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_fd)
        os.close(reader)
        os.close(writer)
