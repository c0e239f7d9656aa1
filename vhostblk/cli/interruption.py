"""How a tool ends by a signal: its work is cancelled, what is open is closed, and then the signal ends the process.

So the shell, and make, see how it ended. The second signal ends it at once. Signals that whoever has started us wants
to be ignored (nohup, jobs in the background) are.

Knows nothing about the work.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def run_interruptible(work: Coroutine[Any, Any, int], last_words: Callable[[], None]) -> int:
    """Run the work of a tool on a loop of its own; returns its exit code.

    Args:
        last_words: called when it was interrupted and has closed everything.

    Context: the main thread.
    """
    found = {number: signal.getsignal(number) for number in (*_ENDING, signal.SIGUSR1)}
    heeded = [number for number in _ENDING if found[number] is not signal.SIG_IGN]
    stopped_by: list[int] = []

    async def interruptible() -> int:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def stop(number: int, frame: object) -> None:
            stopped_by.append(number)
            for other in heeded:
                signal.signal(other, signal.SIG_DFL)
            loop.call_soon_threadsafe(task.cancel)

        # The loop's own way imports what takes as long to read as a whole short run.
        for number in heeded:
            signal.signal(number, stop)
        return await work

    # As in QEMU's tools, where it is blocked: whoever asks for progress that there is none of does no harm.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Whatever has to be closed is opened in there: until then, and afterwards, they end a run as they end any program.
    for number in heeded:
        signal.signal(number, signal.SIG_DFL)
    try:
        return asyncio.run(interruptible())
    except (Exception, asyncio.CancelledError):
        if not stopped_by:
            raise
        # Whatever has failed on the way out, that is not why this ends.
        last_words()
        sys.stdout.flush()
        signal.signal(stopped_by[0], signal.SIG_DFL)
        os.kill(os.getpid(), stopped_by[0])
        raise
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)
