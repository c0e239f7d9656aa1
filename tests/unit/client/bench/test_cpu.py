"""The CPU time of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

from vhostblk.client.bench.cpu import cpu_seconds


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_threads_that_have_ended_are_counted() -> None:
    before, exact_before = cpu_seconds(os.getpid()), time.process_time()
    assert before is not None
    thread = threading.Thread(target=spin, args=(0.05,))
    thread.start()
    thread.join()
    after, exact_after = cpu_seconds(os.getpid()), time.process_time()
    assert after is not None
    assert 0.05 <= after - before <= exact_after - exact_before + 0.01


def test_process_that_is_gone_has_none() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert cpu_seconds(process.pid) is None
    assert cpu_seconds(0) is None
