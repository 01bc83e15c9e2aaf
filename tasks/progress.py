"""How far a stage is: `step` tells one process-wide sink, which a terminal replaces by something prettier."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Sink = Callable[[str, int, int, str], None]


class Lines:
    """The default sink: plain lines on stderr, per stage at most one every `every` seconds and always the last."""

    def __init__(self, every: float = 2.0):
        self.every = every
        self.printed: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if done < total and now - self.printed.get(stage, -self.every) < self.every:
            return
        self.printed[stage] = now
        print(f"{stage}: {done}/{total}{f' ({note})' if note else ''}", file=sys.stderr, flush=True)


_sink: Sink = Lines()


def step(stage: str, done: int, total: int, note: str = "") -> None:
    """Say that `done` of `total` are through; cheap enough to call for every shard."""
    _sink(stage, done, total, note)


def use(sink: Sink) -> Sink:
    """Send every later `step` to `sink(stage, done, total, note)`; returns the sink it replaces."""
    global _sink
    previous, _sink = _sink, sink
    return previous
