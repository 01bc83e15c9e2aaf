"""One writer per name: `with lease(store, "nightly-msrs"):`.

The lease is the file `locks/<name>.json` of the store, created once, renewed by a heartbeat three times per term, taken
over only when it has expired or its process on this machine is dead; each step is a compare-and-swap, so of two that
try one wins. The clocks of machines that share a store must agree to within a few seconds.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from models.errors import LeaseHeld
from tasks.store import Store

_held: list[Lease] = []


@contextmanager
def lease(store: Store, name: str, seconds: float = 60.0) -> Iterator[Lease]:
    """Hold `name` while the block runs.

    Raises LeaseHeld at once when another run holds it; says which.
    """
    held = Lease(store, name, seconds)
    held.take()
    _held.append(held)
    try:
        yield held
    finally:
        _held.remove(held)
        held.release()


def check_leases() -> None:
    """Raise LeaseHeld when a lease of this process was lost; long loops ask before they start more work."""
    for held in list(_held):
        held.check()


class Lease:
    """A name, its term in seconds, and the heartbeat that renews it."""

    def __init__(self, store: Store, name: str, seconds: float):
        self.blobs, self.name, self.seconds = store.blobs, name, seconds
        self.file = f"locks/{name}.json"
        self.owner = uuid.uuid4().hex
        self.since = datetime.now(UTC).isoformat(timespec="seconds")
        self.tag: str | None = None
        self.lost = False
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"lease {name}", daemon=True)

    def take(self) -> None:
        for _ in range(10):
            self.tag = self.blobs.create(self.file, self._record(self.seconds))
            found = None if self.tag else self.blobs.tagged(self.file)
            if found:
                data, tag = found
                self._refuse_if_alive(json.loads(data))
                self.tag = self.blobs.swap(self.file, self._record(self.seconds), tag)
            if self.tag:
                self._heart.start()
                return
        raise LeaseHeld(f"The lease {self.name!r} changes hands all the time; try again in {self.seconds:.0f} s.")

    def check(self) -> None:
        if self.lost:
            raise LeaseHeld(f"The lease {self.name!r} was lost to another run; this one stops. What is done is kept.")

    def release(self) -> None:
        """Stop the heartbeat and let the next one in; a lease that was lost is left as it is."""
        self._stop.set()
        self._heart.join()
        if not self.lost:
            with suppress(Exception):  # a store that is away: the term runs out by itself
                self.blobs.swap(self.file, self._record(0), self.tag)

    def _beat(self) -> None:
        expires = time.monotonic() + self.seconds
        while not self.lost and not self._stop.wait(self.seconds / 3):
            start = time.monotonic()
            try:
                tag = self.blobs.swap(self.file, self._record(self.seconds), self.tag)
            except Exception:  # a store that is away for a moment: try again until the term is over
                self.lost = time.monotonic() > expires
                continue
            if tag:
                self.tag, expires = tag, start + self.seconds
            else:
                self.lost = True

    def _record(self, seconds: float) -> bytes:
        record = {
            "name": self.name,
            "owner": self.owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": self.since,
            "expires": time.time() + seconds if seconds else 0,
        }
        return json.dumps(record).encode()

    def _refuse_if_alive(self, holder: dict[str, Any]) -> None:
        dead = holder["host"] == socket.gethostname() and not _alive(holder["pid"])
        if holder["expires"] > time.time() and not dead:
            raise LeaseHeld(
                f"{holder['name']} is running on {holder['host']} (pid {holder['pid']}) since {holder['since']}; "
                "wait for it, or stop it and run again."
            )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
