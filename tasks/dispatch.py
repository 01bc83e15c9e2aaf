"""The driver's loop: shards go to Ray actors, and what actors and nodes do wrong stays here.

Ray only restarts processes (`max_restarts=-1, max_task_retries=0`: its own retries of actor calls give up in seconds
when a node is lost). An exception counts as an attempt, and there are three. A lost process is nobody's attempt; but
who takes three processes along, by crashing them or by running past the deadline, is given up as well. A shard that
failed either way goes on row by row: what is given up in the end is a row, never its neighbours, at any shard size.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from models.errors import BadSample, StageFailed, ThermofuseError
from tasks.blobs import full_disk
from tasks.fanout import Compute, Job
from tasks.lease import check_leases

ATTEMPTS = 3
LOSSES = 3
PAUSE_SECONDS = 0.5
SILENCE_SECONDS = 300


@dataclass
class Shard:
    """Rows that are done together; one row that is given up."""

    rows: list[dict]
    attempts: int = 0
    losses: int = 0
    late: bool = False
    reason: str = ""

    def split(self) -> list[Shard]:
        return [replace(self, rows=[row], late=False) for row in self.rows]


class Hand:
    """The actor: builds the worker once, then takes shard after shard. What it was told arrives pickled, so that the
    environment is set before the worker's module is imported."""

    def __init__(self, parcel: bytes, environment: dict[str, str]):
        self.parcel, self.environment = parcel, environment
        self.job: Job | None = None
        self.worker: Any = None

    def load(self) -> None:
        """Build the worker if this process has none yet; also the ping of a process that was restarted."""
        if self.worker is not None:
            return
        os.environ.update(self.environment)
        self.job = cloudpickle.loads(self.parcel)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(int(self.environment["OMP_NUM_THREADS"]))
        with full_disk(self.job.store.root):
            self.worker = self.job.start_worker()

    def run(self, rows: list[dict]) -> dict:
        """One shard, committed; its receipt. An error in it comes back as BadSample with the traceback's last line."""
        try:
            with full_disk(self.job.store.root):
                return self.job.run_shard(self.worker, rows)
        except BadSample as error:
            raise BadSample(str(error)) from None
        except ThermofuseError:
            raise
        except Exception as error:
            traceback.print_exc()
            raise BadSample(last_line(error)) from None


def last_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]


class Dispatcher:
    """Gives shards to actors until each is done or given up."""

    def __init__(self, job: Job, shards: list[Shard], compute: Compute, environment: dict[str, str]):
        self.job, self.compute = job, compute
        self.parcel, self.environment = cloudpickle.dumps(job), environment
        self.todo = deque(shards)
        self.actors: list[Any] = []
        self.idle: list[Any] = []
        self.loading: dict[Any, Any] = {}  # reference of a load -> actor
        self.resting: list[tuple[float, Any]] = []  # when to ask again, actor
        self.busy: dict[Any, tuple[Any, Shard, float]] = {}  # reference of a run -> actor, shard, start
        self.alive, self.refusals = time.monotonic(), 0
        self.stopping = False

    def outcomes(self) -> Iterator[tuple[Shard, dict | None]]:
        """Each shard with its receipt as it is done, or with None when it was given up (`shard.reason`).

        Ctrl-C: no new shard is started, those in flight are let through, then KeyboardInterrupt; twice: at once.
        """
        try:
            for _ in range(min(self.compute.actors, len(self.todo))):
                self._start_actor()
            while self.busy or (self.todo and not self.stopping):
                check_leases()
                self._submit()
                for reference in self._wait():
                    yield from self._take(reference)
                self._kill_late()
                self._fail_when_nobody_comes()
            if self.stopping:
                raise KeyboardInterrupt
        finally:
            for actor in self.actors:
                ray.kill(actor)

    def _start_actor(self) -> None:
        options = {"num_cpus": self.compute.cpus_per_actor, "num_gpus": self.compute.gpus_per_actor}
        actor = ray.remote(Hand).options(max_restarts=-1, max_task_retries=0, **options)
        actor = actor.remote(self.parcel, self.environment)
        self.actors.append(actor)
        self._load(actor)

    def _load(self, actor: Any) -> None:
        self.loading[actor.load.remote()] = actor

    def _submit(self) -> None:
        due = [actor for when, actor in self.resting if when <= time.monotonic()]
        self.resting = [(when, actor) for when, actor in self.resting if when > time.monotonic()]
        for actor in due:
            self._load(actor)
        while self.todo and self.idle and not self.stopping:
            actor, shard = self.idle.pop(), self.todo.popleft()
            self.busy[actor.run.remote(shard.rows)] = (actor, shard, time.monotonic())

    def _wait(self) -> list[Any]:
        waiting = [*self.busy, *self.loading]
        try:
            if not waiting:
                time.sleep(PAUSE_SECONDS)
                return []
            return ray.wait(waiting, num_returns=1, timeout=PAUSE_SECONDS)[0]
        except KeyboardInterrupt:
            if self.stopping:
                raise
            self.stopping = True
            print("Letting the shards in flight finish; press Ctrl-C again to stop now.", file=sys.stderr, flush=True)
            return []

    def _take(self, reference: Any) -> Iterator[tuple[Shard, dict | None]]:
        if reference in self.loading:
            self._loaded(reference)
            return
        actor, shard, _ = self.busy.pop(reference)
        try:
            receipt = ray.get(reference)
        except RayTaskError as error:
            self.idle.append(actor)
            self._failed(shard, error.cause or error)
        except RayError:
            self._lost(actor, shard)
        else:
            (self._load if shard.late else self.idle.append)(actor)  # late: done, but its actor was killed just now
            yield shard, receipt
            return
        if shard.attempts < ATTEMPTS and shard.losses < LOSSES:
            self.todo.extend(shard.split())
        else:
            yield shard, None

    def _loaded(self, reference: Any) -> None:
        actor = self.loading.pop(reference)
        try:
            ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, ThermofuseError):
                raise error.cause from None
            reason = f"{self.job.kind}: the worker does not start: {last_line(error.cause or error)}"
            raise StageFailed(reason) from error
        except ActorDiedError:  # for good; a restart would have been ActorUnavailableError
            self.refusals += 1
            self.actors.remove(actor)
            self._start_actor()
        except RayError:
            self.refusals += 1
            self.resting.append((time.monotonic() + PAUSE_SECONDS, actor))
        else:
            self.refusals = 0
            self.idle.append(actor)

    def _failed(self, shard: Shard, cause: Exception) -> None:
        if isinstance(cause, ThermofuseError) and not isinstance(cause, BadSample):
            raise cause from None
        shard.attempts += 1
        shard.reason = str(cause) if isinstance(cause, BadSample) else last_line(cause)

    def _lost(self, actor: Any, shard: Shard) -> None:
        """A process or a node is gone. The idle actors may have been on it too: ask them all before they get work."""
        shard.losses += 1
        limit = self.compute.shard_deadline_seconds
        shard.reason = f"ran past {limit:g} s" if shard.late else "crashed its process (out of memory, or a fault in C)"
        for other in [actor, *self.idle]:
            self._load(other)
        self.idle.clear()

    def _kill_late(self) -> None:
        for actor, shard, start in self.busy.values():
            if not shard.late and time.monotonic() - start > self.compute.shard_deadline_seconds:
                shard.late = True
                with suppress(RayError):
                    ray.kill(actor, no_restart=False)

    def _fail_when_nobody_comes(self) -> None:
        """Waiting for a first process is fine (a cluster may be growing); processes that only die are not."""
        if self.busy or self.idle or not self.refusals:
            self.alive = time.monotonic()
        elif time.monotonic() - self.alive > SILENCE_SECONDS:
            raise StageFailed(f"{self.job.kind}: every worker dies while it starts; give it more memory.")
