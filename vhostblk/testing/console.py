"""Collects what a guest says on its serial ports, and waits for words in it with a deadline.

One thread reads all the streams of a guest until each has ended: QEMU would stand still if nobody
emptied its console's pipe. It never blocks a reader of the text collected so far.

This module knows nothing of QEMU: a stream is any file descriptor.
"""

from __future__ import annotations

import os
import selectors
import threading
import time

__all__ = ["Transcript", "pump"]


class Transcript:
    """The bytes of one stream so far.

    Context: `append` and `end` from the pump's thread, everything else from any thread.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._bytes = bytearray()
        self._ended = False

    def append(self, chunk: bytes) -> None:
        """Adds what has just been read."""
        with self._changed:
            self._bytes += chunk
            self._changed.notify_all()

    def end(self) -> None:
        """Tells those who wait that there will be no more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        """Whether the stream has ended."""
        with self._changed:
            return self._ended

    def __len__(self) -> int:
        with self._changed:
            return len(self._bytes)

    def text(self, start: int = 0, stop: int | None = None) -> str:
        """What has been said from byte `start` up to byte `stop`."""
        with self._changed:
            return self._bytes[start:stop].decode("utf-8", "replace")

    def wait_for(self, wanted: bytes, *, start: int, deadline: float) -> int | None:
        """Waits until `wanted` has been said from byte `start` on.

        Args:
            deadline: in terms of `time.monotonic()`.

        Returns:
            The index of the byte after `wanted`; None if the deadline passed or the stream ended.
        """
        with self._changed:
            while True:
                at = self._bytes.find(wanted, start)
                if at >= 0:
                    return at + len(wanted)
                remaining = deadline - time.monotonic()
                if self._ended or remaining <= 0:
                    return None
                self._changed.wait(remaining)


def pump(streams: dict[int, Transcript], name: str) -> threading.Thread:
    """Starts a thread that reads each descriptor into its transcript until all have ended.

    Args:
        streams: the descriptors are borrowed; close them only after the thread has been joined.
    """
    thread = threading.Thread(target=_pump, args=(streams,), name=name, daemon=True)
    thread.start()
    return thread


def _pump(streams: dict[int, Transcript]) -> None:
    with selectors.DefaultSelector() as selector:
        for fd, transcript in streams.items():
            selector.register(fd, selectors.EVENT_READ, transcript)
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    chunk = os.read(key.fd, 65536)
                except OSError:  # ECONNRESET from a socket whose other end was killed
                    chunk = b""
                if chunk:
                    key.data.append(chunk)
                else:
                    selector.unregister(key.fd)
                    key.data.end()
