"""Who may write to stdout while a command runs: the command, and nobody else."""

from __future__ import annotations

import os
import sys
from typing import TextIO


class Stdout:
    """The real stdout, for one writer; what else this process or its children print goes to stderr meanwhile."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._kept, self._printed = os.dup(1), sys.stdout
        self.file: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def close(self, give_back: bool) -> None:
        self.file.close()
        if give_back:
            os.dup2(self._kept, 1)
            sys.stdout = self._printed
        os.close(self._kept)
