"""Which bytes does a file hold? Its sha256, remembered for as long as its size and time of change stay.

A dataset that is copied, synchronised or mounted anew has other times and the same bytes; what was made of it must be
found again. Where the times stay nothing is read twice, as in git's index.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

from models.errors import UsageError
from tasks import places

FILE = "contents.db"
TABLE = "CREATE TABLE IF NOT EXISTS contents (path TEXT PRIMARY KEY, size INTEGER, changed INTEGER, sha256 TEXT)"
RACY_NS = 2_000_000_000  # a file as young as this may change again within the clock's grain; it is not remembered
READERS = min(8, os.cpu_count() or 1)  # hashing lets other threads run

Stamp = tuple[str, int, int]


def contents(paths: Iterable[Path]) -> dict[Path, str]:
    """The sha256 of each file, in hexadecimal; paths that are no file are left out.

    Raises UsageError when a file cannot be read.
    """
    stamps = {path: stamp for path in dict.fromkeys(paths) if (stamp := _stamp(path))}
    with _memory() as memory:
        known = _recall(memory, stamps.values())
        new = [path for path, stamp in stamps.items() if stamp not in known]
        with ThreadPoolExecutor(READERS) as pool:
            known |= zip((stamps[path] for path in new), pool.map(_hashed, new), strict=True)
        old = time.time_ns() - RACY_NS
        rows = [(*stamps[path], known[stamps[path]]) for path in new if stamps[path][2] < old]
        memory.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?)", rows)
    return {path: known[stamp] for path, stamp in stamps.items()}


def _stamp(path: Path) -> Stamp | None:
    if not path.is_file():
        return None
    stat = path.stat()
    return str(path.absolute()), stat.st_size, stat.st_mtime_ns


def _hashed(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"Cannot read {path} ({error.strerror}); make it readable, or take it away.") from error


@contextmanager
def _memory() -> Iterator[sqlite3.Connection]:
    """What is remembered in `places.home()`: one row a path. Several processes may write."""
    places.make_home()
    file = places.home() / FILE
    try:
        with closing(sqlite3.connect(file, timeout=60)) as memory, memory:
            memory.execute(TABLE)
            yield memory
    except sqlite3.OperationalError as error:
        advice = "see that you may write it, that its disk has room and that nothing else holds it, then run again"
        raise UsageError(f"Cannot use {file} ({error}); {advice}.") from error
    except sqlite3.DatabaseError as error:
        raise UsageError(f"{file} is broken ({error}); remove it, nothing but time is lost.") from error


def _recall(memory: sqlite3.Connection, stamps: Iterable[Stamp]) -> dict[Stamp, str]:
    ask = "SELECT sha256 FROM contents WHERE path = ? AND size = ? AND changed = ?"
    found = ((stamp, memory.execute(ask, stamp).fetchone()) for stamp in stamps)
    return {stamp: row[0] for stamp, row in found if row}
