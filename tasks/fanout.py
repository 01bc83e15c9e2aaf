"""Fan rows out to workers that hold a model, shard by shard, and commit one output.

    Ref = fan_out(Worker, rows, settings, compute, kind="synthetic", inputs=[frames, translators], code=[...])

A worker is a class: `Worker(settings, inputs)` once per actor, with the inputs as local folders, then
`worker(shard, draft)` per shard: it writes files through the draft and returns one row per row, in any order, with the
same "id". A row that holds "error" is quarantined. What a worker makes of a row may depend on the row only, never on
its shard: then the output is the same, byte for byte, for any number of actors and any shard size.

A shard is done when `shards/<name>.json` lies in the output's folder; a run that was killed goes on with the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from models.errors import StageFailed, UsageError
from tasks import places, progress
from tasks.stage import note, peak_rss_mb
from tasks.store import Draft, Ref, Store, digest_of, table_bytes

QUARANTINE = "quarantine.parquet"
FORWARDED = re.compile(r"(THERMOFUSE|AWS|GOMP)_")


@dataclass(frozen=True)
class Compute:
    """Where and how wide the work runs. None of it changes a result, so none of it is part of a digest.

    actors, cpus_per_actor, gpus_per_actor: workers of a fan-out and what each asks Ray for (a GPU may be shared: 0.5).
    shard_size: rows per commit; aim at 10-60 s of work. shard_deadline_seconds: a shard that takes longer is killed.
    max_quarantined: the share of rows that may be unusable before the stage fails.
    train_workers, use_gpu: the worker group of Ray Train. threads_per_worker, train_threads: torch threads of each
    actor and of each training worker.
    """

    actors: int = 2
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    shard_size: int = 16
    shard_deadline_seconds: float = 600
    max_quarantined: float = 0.05
    train_workers: int = 1
    use_gpu: bool = False
    threads_per_worker: int = 1
    train_threads: int = 2


@dataclass(frozen=True)
class Job:
    """What every actor is told."""

    worker: type
    settings: Any
    inputs: tuple[Ref, ...]
    store: Store
    kind: str
    digest: str

    def start_worker(self) -> Any:
        return self.worker(self.settings, [self.store.local(ref) for ref in self.inputs])

    def run_shard(self, worker: Any, rows: list[dict]) -> dict:
        """Do one shard and commit it, unless another run has; returns its receipt."""
        draft, name = self.store.draft(self.kind, self.digest), shard_name(rows)
        start = time.monotonic()
        if not draft.exists(name):
            receipt = {"rows": _checked(worker(rows, draft), rows), "files": draft.files}
            draft.create(name, json.dumps(receipt, sort_keys=True).encode())
        receipt = json.loads(draft.read(name))
        return {**receipt, "seconds": time.monotonic() - start, "peak_rss_mb": peak_rss_mb()}


def fan_out(
    worker: type,
    rows: list[dict],
    settings: Any,
    compute: Compute,
    *,
    kind: str,
    inputs: Sequence[Ref],
    code: Sequence[str],
    meta: dict | None = None,
    extra: dict | None = None,
) -> Ref:
    """Run `worker` over `rows`; returns the output, made now or found in the store.

    Args:
        worker: the class described above; importable by the workers.
        rows: plain JSON values with a unique "id" each. Their order is the order of the output's rows.
        settings: handed to the worker, and part of the digest; so are `rows`, `inputs`, the code of the modules
            named by `code`, and `extra`, which the worker does not see.
        meta: goes into the manifest.

    Raises StageFailed when more than `compute.max_quarantined` of the rows are unusable, the disk is full or no worker
    comes back; what is done stays done.
    """
    store = places.store()
    digest = digest_of(kind, inputs, {"settings": settings, "rows": rows, "extra": extra}, code)
    if found := store.find(kind, digest):
        progress.step(kind, len(rows), len(rows), "reused")
        return found
    tally = Tally(kind, rows, compute.max_quarantined)
    draft = store.draft(kind, digest)
    _take_committed(draft, tally)
    missing = [row for row in rows if row["id"] not in tally.results]
    if missing:
        _dispatch(Job(worker, settings, tuple(inputs), store, kind, digest), missing, compute, tally)
    return tally.commit(draft, meta or {})


def ensure_ray(compute: Compute) -> None:
    """Start an embedded Ray, or join the cluster named by $RAY_ADDRESS; nothing when this process has one already.

    Raises UsageError when the embedded one cannot hold a single worker.
    """
    import ray

    if not ray.is_initialized():
        _start_ray(_cluster() if os.environ.get("RAY_ADDRESS") else _embedded(compute))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    if os.environ.get("RAY_ADDRESS"):
        return  # it may grow
    has = ray.cluster_resources()
    if has.get("GPU", 0) < compute.gpus_per_actor or has.get("CPU", 0) < compute.cpus_per_actor:
        need = f"{compute.cpus_per_actor:g} CPUs and {compute.gpus_per_actor:g} GPUs"
        raise UsageError(f"A worker asks for {need}, which this machine does not have; lower it or set RAY_ADDRESS.")


def _start_ray(options: dict[str, Any], attempts: int = 2) -> None:
    import ray

    try:
        ray.init(**options)
    except Exception as error:  # Ray has no class for it; a node has 30 s to come up, which a busy machine may miss
        ray.shutdown()
        if attempts == 1:
            raise StageFailed(f"Ray does not start ({error}); look at RAY_ADDRESS and the machine's load.") from error
        _start_ray(options, attempts - 1)


def _interrupt(*_: object) -> None:
    """SIGTERM while Ray is up. Ray's own handler ends the process on the spot, and what Prefect's raises is lost where
    the driver waits for Ray, which lets a KeyboardInterrupt pass and nothing else."""
    raise KeyboardInterrupt


def _embedded(compute: Compute) -> dict[str, Any]:
    wanted = math.ceil(compute.cpus_per_actor * max(compute.actors, compute.train_workers)) + 1
    return {
        "address": "local",
        "num_cpus": max(os.cpu_count() or 1, wanted),
        "object_store_memory": 200_000_000,  # refs and receipts only; pictures go through the store
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "WARNING",
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": f"/tmp/thermofuse-{os.getuid()}",  # a socket path may have 107 bytes
    }


def _cluster() -> dict[str, Any]:
    """Addresses travel in the runtime environment, which Ray shows to everyone; keys do not."""
    public = {name: value for name, value in _forwarded().items() if not re.search("KEY|TOKEN|SECRET", name)}
    quiet = {"log_to_driver": False, "logging_level": "WARNING"}
    return {"address": os.environ["RAY_ADDRESS"], "runtime_env": {"env_vars": public}, **quiet}


def _forwarded() -> dict[str, str]:
    forwarded = {name: value for name, value in os.environ.items() if FORWARDED.match(name)}
    return {**forwarded, "THERMOFUSE_HOME": str(places.home())}


def _worker_environment(compute: Compute) -> dict[str, str]:
    threads = str(compute.threads_per_worker)
    hidden = {} if compute.gpus_per_actor else {"CUDA_VISIBLE_DEVICES": ""}
    return {**_forwarded(), **hidden, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def _dispatch(job: Job, rows: list[dict], compute: Compute, tally: Tally) -> None:
    ensure_ray(compute)
    from tasks.dispatch import Dispatcher, Shard

    size = compute.shard_size
    shards = [Shard(rows[start : start + size]) for start in range(0, len(rows), size)]
    dispatcher = Dispatcher(job, shards, compute, _worker_environment(compute))
    with closing(dispatcher.outcomes()) as outcomes:
        for shard, receipt in outcomes:
            if receipt is None:
                tally.give_up(shard.rows, shard.reason)
            else:
                tally.take(receipt)
                note(shards=1, peak_rss_mb=receipt["peak_rss_mb"])


def shard_name(rows: list[dict]) -> str:
    """Where a shard's receipt lies: named by its rows, so that the same rows are the same shard in every run."""
    ids = "\n".join(row["id"] for row in rows)
    return f"shards/{hashlib.blake2b(ids.encode(), digest_size=8).hexdigest()}.json"


def _take_committed(draft: Draft, tally: Tally) -> None:
    receipts = [json.loads(data) for data in draft.read_all("shards")]
    for receipt in receipts:
        tally.take(receipt)
    note(shards=len(receipts), shards_reused=len(receipts))


def _checked(results: list[dict], rows: list[dict]) -> list[dict]:
    given, wanted = sorted(row["id"] for row in results), sorted(row["id"] for row in rows)
    if given != wanted:
        raise ValueError(f"the worker returned rows {given[:5]}... for {wanted[:5]}...")
    return results


class Tally:
    """What is known of each row: its result, or why there is none."""

    def __init__(self, kind: str, rows: list[dict], max_quarantined: float):
        self.kind, self.ids, self.max_quarantined = kind, [row["id"] for row in rows], max_quarantined
        if len(set(self.ids)) < len(self.ids):
            raise UsageError(f"{kind}: two rows have the same id; ids name files and have to be unique.")
        self.results: dict[str, dict] = {}
        self.files: dict[str, str] = {}

    def take(self, receipt: dict) -> None:
        """Add the rows of a shard that is committed. Raises StageFailed when too many are unusable by now."""
        self.results.update((row["id"], row) for row in receipt["rows"] if row["id"] not in self.results)
        self.files.update(receipt["files"])
        self._show()

    def give_up(self, rows: list[dict], reason: str) -> None:
        """Quarantine a whole shard; a later run tries it again."""
        self.results.update((row["id"], {"id": row["id"], "error": reason}) for row in rows)
        self._show()

    def commit(self, draft: Draft, meta: dict) -> Ref:
        """Write the tables and the manifest: good rows and bad rows, both in the order of the input."""
        import pandas

        ordered = [self.results[name] for name in self.ids]
        bad = [(row["id"], row["error"]) for row in ordered if row.get("error")]
        good = [{k: v for k, v in row.items() if k != "error"} for row in ordered if not row.get("error")]
        draft.files.update(self.files)
        draft.write(QUARANTINE, table_bytes(pandas.DataFrame(bad, columns=["id", "error"], dtype="str")))
        note(quarantined=len(bad))
        frame = pandas.DataFrame(good) if good else pandas.DataFrame({"id": pandas.Series(dtype="str")})
        return draft.commit(frame, {**meta, "quarantined": len(bad)})

    def _show(self) -> None:
        bad = [row for row in self.results.values() if row.get("error")]
        progress.step(self.kind, len(self.results), len(self.ids), f"{len(bad)} quarantined" if bad else "")
        if len(bad) > self.max_quarantined * len(self.ids):
            raise StageFailed(
                f"{self.kind}: {len(bad)} of {len(self.ids)} rows are unusable, more than {self.max_quarantined:.0%}; "
                f"the first is {bad[0]['id']}: {bad[0]['error']}."
            )
