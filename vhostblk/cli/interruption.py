"""How a tool ends by a signal: its work is cancelled, what is open is closed, and then the signal ends the process.

So the shell, and make, see how it ended. The second signal ends it at once. Work that never lets the loop have a turn
cannot be cancelled: it is ended as it is, and nothing is closed, which images have to stand anyway. The same is true of
work that has not ended after a while: it waits for a disk, or a server, that does not answer. Signals that whoever has
started us wants to be ignored (nohup, jobs in the background) are.

Knows nothing about the work.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_ALSO_USED = (signal.SIGUSR1, signal.SIGALRM)
# Seconds that the loop may be without a turn.
_PATIENCE = 1.0
# Seconds that closing may take, in looks of that length.
_LOOKS = 30


def run_interruptible(work: Coroutine[Any, Any, int], last_words: Callable[[], None]) -> int:
    """Run the work of a tool on a loop of its own; returns its exit code.

    Args:
        last_words: called when it was interrupted and has closed everything.

    Context: the main thread.
    """
    found = {number: signal.getsignal(number) for number in (*_ENDING, *_ALSO_USED)}
    heeded = [number for number in _ENDING if found[number] is not signal.SIG_IGN]
    stopped_by: list[int] = []

    def end() -> None:
        last_words()
        sys.stdout.flush()
        signal.signal(stopped_by[0], signal.SIG_DFL)
        os.kill(os.getpid(), stopped_by[0])

    async def interruptible() -> int:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        turned = False
        looks = 0

        def turn() -> None:
            nonlocal turned
            turned = True

        def look(number: int, frame: object) -> None:
            nonlocal turned, looks
            looks += 1
            if turned and looks < _LOOKS:
                turned = False
                loop.call_soon_threadsafe(turn)
                return
            with suppress(RuntimeError):  # it may be in the middle of a line
                end()

        def heard() -> None:
            turn()
            task.cancel()

        def stop(number: int, frame: object) -> None:
            stopped_by.append(number)
            for other in heeded:
                signal.signal(other, signal.SIG_DFL)
            signal.signal(signal.SIGALRM, look)
            signal.setitimer(signal.ITIMER_REAL, _PATIENCE, _PATIENCE)
            loop.call_soon_threadsafe(heard)

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
        if stopped_by:
            end()  # whatever has failed on the way out, that is not why this ends
        raise
    finally:
        if stopped_by:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in found.items():
            signal.signal(number, handler)
