"""A guest that has no rest: it works, leaves, comes back, and changes everything that may be changed meanwhile.

A thread with a client of its own. It knows what its part of the disk must contain, across all connections and
daemons. What happens when is decided by a seeded generator; what the others do meanwhile is not.

Knows nothing of how daemons end: it goes on with whoever listens.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tests.restarts import ReturningClient
from tests.soak.daemons import BAD_SECTORS, SIZE, Daemon, Disk, LongLived
from vhostblk.client.client import FEATURES
from vhostblk.client.memory_copy import LOG_PAGE, MemoryCopy
from vhostblk.client.queue import Pending
from vhostblk.client.shared_memory import SharedMemory, SharedRegion
from vhostblk.client.workload import Workload
from vhostblk.errors import SessionError
from vhostblk.virtio.features import Feature

__all__ = ["RestlessClient", "SoakGuest"]

_SPAN = 4 << 20  # requests meet, and a round ends with a look at every byte
_DEPTH = 24
_REGION = 4 << 20
_MOST_REGIONS = 8
_MOST_REQUESTS = 120  # between two disturbances
_SECONDS = 120.0
_TRY_AGAIN = 0.002  # seconds
_LEAST_SIZE = 16 << 20


class RestlessClient(ReturningClient):
    """A client that does something else now and then, and that goes on with the next daemon when one has gone."""

    path: str
    disturb: Callable[[], None]
    choice: random.Random
    failed: threading.Event
    copy: MemoryCopy | None = None
    """While the daemon logs what it writes."""
    sessions = 1
    _until_next = _MOST_REQUESTS
    _is_ready = False

    def begin(
        self, path: str, seed: int, disturb: Callable[[], None], failed: threading.Event
    ) -> None:
        """Begin to be restless."""
        self.path = path
        self.failed = failed
        self.choice = random.Random(seed)
        self.disturb = disturb
        self._is_ready = True

    def submit(self, *arguments: Any, **options: Any) -> Pending:
        """As `Client.submit`; before it, with others in flight, anything may happen."""
        self._until_next -= 1
        if self._until_next < 0 and self._is_ready:
            self._until_next = self.choice.randint(1, _MOST_REQUESTS)
            self.attempt(self.disturb)
        return super().submit(*arguments, **options)

    def attempt(self, action: Callable[[], None]) -> bool:
        """Do something that needs a daemon; False: it has gone meanwhile, and the next one is there."""
        try:
            action()
        except SessionError:
            self.come_back()
            return False
        return True

    def come_back(self) -> None:
        """Connect to whoever listens, now or soon."""
        self.abandon()
        self.forget_copy()
        deadline = time.monotonic() + _SECONDS
        while True:
            try:
                self.reconnect(self.path)
                self.sessions += 1
                return
            except (FileNotFoundError, ConnectionRefusedError, SessionError):
                _wait_for_daemon(self.path, deadline, self.failed)

    def forget_copy(self) -> None:
        """The log is gone with the daemon that wrote it, so the next one must not be told to log."""
        if self.copy is not None:
            self.copy.close()
            self.copy = None
            self.memory.written = None
        self.control.features &= ~Feature.VHOST_F_LOG_ALL
        self._logs_rings = False

    def restart_queue(self, index: int) -> None:
        """Stop a ring with requests in it, and start it again."""
        self.restart_queues([index], lambda: None)

    def restart_queues(self, indices: Sequence[int], action: Callable[[], None]) -> None:
        """Stop rings, do something, and start them again; they are to run again if the daemon goes meanwhile."""
        self._interrupted.update(indices)
        bases = [self.stop_queue(index) for index in indices]
        action()
        for index, base in zip(indices, bases, strict=True):
            self.start_queue(index, base)
            self._interrupted.discard(index)


class SoakGuest:
    """See the module.

    Args:
        daemon: which one.
        disk: which of its disks.
        seed: of the choices.
        failed: set when something is wrong, which ends all.

    Context: `run` in a thread of its own, everything else while it does not run.
    """

    def __init__(self, daemon: Daemon, disk: Disk, seed: int, failed: threading.Event) -> None:
        self.name = disk.name
        self.counts: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._daemon = daemon
        self._disk = disk
        self._choice = random.Random(seed)
        self._failed = failed
        self._load: Workload | None = None
        self._size = SIZE
        actions: dict[Callable[[], None], int] = {
            self._leave_and_come_back: 3,
            self._plug: 8,
            self._unplug: 8,
            self._log: 4,
            self._restart_queue: 4,
        }
        if disk.kind == "raw" and isinstance(daemon, LongLived):
            actions[self._resize] = 4
        self._actions, self._weights = list(actions), list(actions.values())

    @property
    def work(self) -> tuple[int, int, int]:
        """Requests, those that failed, bytes that were compared."""
        if self._load is None:
            return 0, 0, 0
        counts = self._load.counts
        return sum(counts.requests.values()), sum(counts.errors.values()), counts.compared

    def run(self, until: float) -> None:
        """One round: work until that time, look at every byte, and leave."""
        try:
            self._round(until)
        except BaseException as error:
            self.failure = error
            self._failed.set()

    def _round(self, until: float) -> None:
        while time.monotonic() < until and not self._failed.is_set():
            with self._connect() as client:
                self._client = client
                for _ in range(self._choice.randint(1, 6)):
                    self._some_work()
                    if time.monotonic() > until or self._failed.is_set():
                        break
                client.attempt(self._end_log)
                self._work.verify()
            self.counts["guests: sessions, those after an end included"] += client.sessions
            if client.copy is not None:
                client.forget_copy()

    @property
    def _work(self) -> Workload:
        assert self._load is not None
        return self._load

    def _connect(self) -> RestlessClient:
        """A guest that boots: its rings are new, and of any kind."""
        choose = self._choice
        packed = choose.random() < 0.5
        deadline = time.monotonic() + _SECONDS
        while True:
            memory = SharedMemory([_REGION] * choose.randint(2, 4), spread=True, gap=1 << 30)
            try:
                client = RestlessClient.connect(
                    self._disk.socket,
                    queues=choose.randint(1, 4),
                    queue_size=choose.choice([64, 128, 256]),
                    features=FEATURES | (Feature.VIRTIO_F_RING_PACKED if packed else 0),
                    memory=memory,
                    memory_one_by_one=choose.choice([True, False]),
                    timeout=_SECONDS,
                )
                break
            except (FileNotFoundError, ConnectionRefusedError, SessionError):
                _wait_for_daemon(self._disk.socket, deadline, self._failed)
        assert isinstance(client, RestlessClient)
        self.counts[f"guests: booted with {'packed' if packed else 'split'} rings"] += 1
        client.begin(str(self._disk.socket), choose.randrange(1 << 30), self._disturb, self._failed)
        if self._load is None:
            self._load = Workload(
                client,
                seed=choose.randrange(1 << 30),
                span=(0, _SPAN),
                depth=_DEPTH,
                max_length=64 << 10,
                allow_errors=self._disk.kind == "faulty",
            )
            assert all(sector * 512 < _SPAN for sector in BAD_SECTORS)
        self._load.client = client
        return client

    def _some_work(self) -> None:
        if self._choice.random() < 0.15:
            self._migrate()
        else:
            self._work.run(self._choice.choice([50, 100, 300]))
        self._client.attempt(self._notice_size)

    # ---------------------------------------------------------------- with requests in flight

    def _disturb(self) -> None:
        (action,) = self._choice.choices(self._actions, self._weights)
        action()

    def _leave_and_come_back(self) -> None:
        self._client.come_back()
        self.counts["guests: left with requests in flight"] += 1

    def _plug(self) -> None:
        if self._client.copy is None and len(self._client.memory.regions) < _MOST_REGIONS:
            self._client.add_memory(_REGION)
            self.counts["guests: memory added"] += 1

    def _unplug(self) -> None:
        client = self._client
        if client.copy is not None or len(client.memory.regions) <= 2:
            return
        free = [region for region in client.memory.regions if self._is_free(region)]
        if free:
            client.remove_memory(self._choice.choice(free))
            self.counts["guests: memory removed"] += 1

    def _is_free(self, region: SharedRegion) -> bool:
        free = self._client.memory._free
        return any(a <= region.gpa and region.end <= b for a, b in free)

    def _log(self) -> None:
        """Begin to log, look at the log, or end it."""
        client = self._client
        if client.copy is None:
            self._begin_log()
        elif self._choice.random() < 0.7:
            client.copy.round()
        else:
            self._end_log()

    def _begin_log(self) -> None:
        client = self._client
        client.copy = MemoryCopy(client)
        client.copy.start()
        self.counts["guests: log turned on"] += 1

    def _end_log(self) -> None:
        copy = self._client.copy
        if copy is not None:
            copy.stop()
            self._client.forget_copy()

    def _restart_queue(self) -> None:
        self._client.restart_queue(self._choice.randrange(len(self._client.queues)))
        self.counts["guests: rings stopped and started"] += 1

    def _resize(self) -> None:
        """Behind what is used."""
        assert isinstance(self._daemon, LongLived)
        self._notice_size()
        size = self._choice.randrange(_LEAST_SIZE, 4 * SIZE, 1 << 20)
        if size != self._size:
            self._size = size
            self._daemon.resize(self._disk, size)
            self.counts["guests: resized"] += 1

    def _notice_size(self) -> None:
        if isinstance(self._daemon, LongLived) and self._disk.kind == "raw":
            # A message may have gone with the connection that it was for.
            while self._client.read_config().capacity * 512 != self._size:
                self._client.wait_config_change(_SECONDS)

    # ---------------------------------------------------------------- with nothing in flight

    def _migrate(self) -> None:
        """Copy memory while requests are made; in the end nothing may be missing."""
        client = self._client
        if not client.attempt(self._end_log) or not client.attempt(self._begin_log):
            return
        copy = client.copy
        client.memory.written = set()
        self._work.run(self._choice.choice([50, 200]))
        everything = range(len(client.queues))
        if client.copy is copy and client.attempt(
            lambda: client.restart_queues(everything, self._compare)
        ):
            self.counts["guests: copies of memory compared"] += 1
            client.attempt(self._end_log)

    def _compare(self) -> None:
        client = self._client
        copy = client.copy
        assert copy is not None
        copy.round()
        for page in client.memory.written or ():
            copy.copy(page)
        for queue in client.queues:  # the guest's part, and what this is too coarse to tell from it
            start, end = queue._area.gpa, queue._area.gpa + queue._area.length
            for page in range(start & -LOG_PAGE, end, LOG_PAGE):
                copy.copy(page)
        wrong = copy.differences()
        assert not wrong, f"{len(wrong)} pages were written and not marked: {wrong[:8]}"


def _wait_for_daemon(path: object, deadline: float, failed: threading.Event) -> None:
    assert time.monotonic() < deadline, f"nobody listens on {path}"
    assert not failed.wait(_TRY_AGAIN), "the soak has ended"
