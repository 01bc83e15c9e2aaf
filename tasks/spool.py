"""Spool: events that could not be sent are kept in a file of JSON lines until they can."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Spool:
    """A file of JSON lines that one process at a time appends to or replays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def append(self, event: dict[str, Any]) -> None:
        while self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a", encoding="utf-8")
            fcntl.flock(file, fcntl.LOCK_EX)
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                self._file = file
            else:  # replayed and deleted while we waited
                file.close()
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def drain(self) -> Iterator[dict[str, Any]]:
        """Its events; once all were taken the file is gone. Nothing, if another process is writing it."""
        with self.path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            for line in file:
                with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed process may be torn
                    yield json.loads(line)
            self.path.unlink(missing_ok=True)
