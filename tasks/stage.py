"""A stage of the night: a Prefect task whose time, reuse and losses are written into one ledger.

Prefect is imported only when a flow is running: outside one a stage is a plain call that needs no server, and the
workers that import a stage's module to find their class stay light.
"""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StageReport:
    """What one stage cost. `reused`: it found its output in the store and committed nothing new."""

    name: str
    seconds: float
    reused: bool
    count: int
    quarantined: int
    shards: int
    shards_reused: int
    peak_rss_mb: float


_ledger: list[StageReport] = []
_facts: ContextVar[dict[str, Any] | None] = ContextVar("facts of the running stage", default=None)


def ledger() -> list[StageReport]:
    """The stages of this process so far, in the order in which they ended."""
    return list(_ledger)


def reset_ledger() -> None:
    _ledger.clear()


def note(**facts: float) -> None:
    """Add facts to the running stage: counts add up, `peak_rss_mb` keeps the largest. Outside a stage: nothing."""
    noted = _facts.get()
    if noted is None:
        return
    for name, value in facts.items():
        noted[name] = max(noted.get(name, 0), value) if name == "peak_rss_mb" else noted.get(name, 0) + value


def peak_rss_mb() -> float:
    """The largest resident size of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Stage:
    """A function with a name in the ledger; called inside a flow it is a Prefect task run, elsewhere a plain call."""

    def __init__(self, name: str, function: Callable):
        self.stage_name = name
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.task if _in_flow() else self.fn)(*args, **kwargs)

    @functools.cached_property
    def task(self) -> Any:
        """The Prefect task. Its cache stays off: the manifests in the store say what is done."""
        from prefect import task
        from prefect.cache_policies import NO_CACHE

        recorded = functools.wraps(self.function)(lambda *args, **kwargs: self.fn(*args, **kwargs))
        return task(name=self.stage_name, task_run_name=self.stage_name, cache_policy=NO_CACHE)(recorded)

    def fn(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself, recorded in the ledger when it returns."""
        facts: dict[str, Any] = {}
        token, start = _facts.set(facts), time.monotonic()
        try:
            result = self.function(*args, **kwargs)
        finally:
            _facts.reset(token)
        _ledger.append(_report(self.stage_name, time.monotonic() - start, facts, result))
        return result


def stage(name: str) -> Callable[[Callable], Stage]:
    """Decorate the verb of a tasks module: `@stage("synthesise")`."""
    return functools.partial(Stage, name)


def _in_flow() -> bool:
    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None


def _report(name: str, seconds: float, facts: dict[str, Any], result: Any) -> StageReport:
    return StageReport(
        name=name,
        seconds=round(seconds, 3),
        reused=bool(facts.get("found")) and not facts.get("committed"),
        count=int(getattr(result, "count", 0)) if hasattr(result, "digest") else 0,
        quarantined=int(facts.get("quarantined", 0)),
        shards=int(facts.get("shards", 0)),
        shards_reused=int(facts.get("shards_reused", 0)),
        peak_rss_mb=round(max(facts.get("peak_rss_mb", 0.0), peak_rss_mb()), 1),
    )
