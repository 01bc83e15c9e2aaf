"""A fan-out whose shards are done in this process: what a shard does is under test, not who does it."""

from __future__ import annotations

import pytest

from tasks import fanout
from tasks.fanout import Compute, Job, Tally


def without_actors(patch: pytest.MonkeyPatch) -> None:
    """Digests, shards, receipts and commits stay those of `tasks.fanout`."""
    patch.setattr(fanout, "_dispatch", _in_this_process)


def _in_this_process(job: Job, rows: list[dict], compute: Compute, tally: Tally) -> None:
    worker = job.start_worker()
    for start in range(0, len(rows), compute.shard_size):
        tally.take(job.run_shard(worker, rows[start : start + compute.shard_size]))
