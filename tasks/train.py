"""The one driver of Ray Train.

A loop is a plain function of one dictionary, run by every worker of the group:

    def loop(config):
        model, optimiser = ...
        checkpoints = Checkpoints(config, total=steps, model=model, optimiser=optimiser)
        for step in range(checkpoints.restore(), steps):
            seed_step(config["settings"].seed, step, checkpoints.rank)
            loss = ...
            checkpoints.log(step, loss=loss)
            if (step + 1) % 100 == 0:
                checkpoints.save(step + 1)
        checkpoints.finish(lambda folder: model.save(folder))

`config` holds "settings" (as given to `fit`), "inputs" (their addresses), "folders" (the same on local disk),
"store" (root) and "place" (where checkpoints live). Because the generators are seeded anew from (seed, step), a run
that was killed and restored ends with the same weights as one that was left alone.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import StageFailed, ThermofuseError
from tasks import places, progress
from tasks.checkpoints import RESULT, Checkpoints, filesystem, remove, seed_step, step_seed
from tasks.fanout import FORWARDED, Compute, ensure_ray
from tasks.lease import lease
from tasks.store import Draft, Ref, Store, digest_of

if TYPE_CHECKING:
    import ray.train

__all__ = ["Checkpoints", "fit", "seed_step", "step_seed"]


def fit(
    loop: Callable[[dict], None],
    kind: str,
    inputs: Sequence[Ref],
    settings: Any,
    code: Sequence[str],
    compute: Compute,
    meta: dict | None = None,
) -> Ref:
    """Trains once per (inputs, settings, code) and returns the committed result.

    loop      importable function of the configuration above; ends with `Checkpoints.finish`
    kind      kind of the result, also the name that progress is shown under
    code      modules whose source text is part of the digest
    returns   Ref of what `finish` wrote, with `history.parquet` beside it

    Raises StageFailed when a loss is not finite or the worker group failed four times, LeaseHeld when another
    process trains the same thing. A run that was killed goes on from its last checkpoint when called again.
    """
    store = places.store()
    digest = digest_of(kind, inputs, settings, code)
    if found := store.find(kind, digest):
        progress.step(kind, 1, 1, "reused")
        return found
    name = f"{kind}-{digest}"
    config = _configuration(store, name, inputs, settings, compute)
    with lease(store, name):
        result = _run(loop, name, kind, config, compute)
        ref = _commit(store.draft(kind, digest), result, meta or {})
    remove(config["place"])
    return ref


def _configuration(store: Store, name: str, inputs: Sequence[Ref], settings: Any, compute: Compute) -> dict:
    return {
        "settings": settings,
        "refs": list(inputs),
        "inputs": [ref.uri for ref in inputs],
        "store": _absolute(store.root),
        "place": f"{_absolute(store.root)}/training/{name}",
        "threads": compute.train_threads,
    }


def _absolute(root: str | Path) -> str:
    root = str(root).rstrip("/")
    return root if "://" in root else os.path.abspath(root)


def _run(loop: Callable, name: str, kind: str, config: dict, compute: Compute) -> ray.train.Result:
    ensure_ray(compute)
    import ray.train
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _Worker(loop), train_loop_config=config, scaling_config=_scaling(compute), run_config=_plan(name, config)
    )
    with _interrupt_kept(), _watched(config["place"], kind):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _readable(error, kind) from error
    if result.return_value:
        remove(config["place"])  # the same steps would end in the same place: start over next time
        raise result.return_value
    return result


def _scaling(compute: Compute) -> ray.train.ScalingConfig:
    from ray.train import ScalingConfig

    resources = {"CPU": compute.cpus_per_actor} | ({"GPU": 1} if compute.use_gpu else {})
    return ScalingConfig(num_workers=compute.train_workers, use_gpu=compute.use_gpu, resources_per_worker=resources)


def _plan(name: str, config: dict) -> ray.train.RunConfig:
    """The same name and place as an earlier, killed run: Ray Train then goes on from its last checkpoint."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig

    files, path = filesystem(config["place"])
    environment = {name: value for name, value in os.environ.items() if FORWARDED.match(name)}
    # A loop runs in a thread of its own and asks for its threads there (`_Worker`). A pool that the main thread starts
    # would stand beside them, and with more threads than cores libgomp's sleep at every wait.
    alone = {"THERMOFUSE_HOME": str(places.home()), "OMP_NUM_THREADS": "1"}
    return RunConfig(
        name=name,
        storage_path=path.rsplit("/", 1)[0],
        storage_filesystem=files,
        failure_config=FailureConfig(max_failures=3),
        checkpoint_config=CheckpointConfig(num_to_keep=2),
        worker_runtime_env={"env_vars": {**environment, **alone}},
    )


def _readable(error: Exception, kind: str) -> ThermofuseError:
    for cause in getattr(error, "worker_failures", {}).values():
        original = getattr(cause, "cause", cause)
        if isinstance(original, ThermofuseError):
            return original
    last = str(error).strip().splitlines()[-1]
    return StageFailed(f"Training {kind} failed: {last}; run it again to go on from the last checkpoint.")


def _commit(draft: Draft, result: ray.train.Result, meta: dict) -> Ref:
    with result.checkpoint.as_directory() as folder:
        draft.upload(Path(folder) / RESULT)
    return draft.commit(None, {**meta, **(result.metrics or {})}, count=1)


@contextmanager
def _interrupt_kept():
    """Ray Train installs a SIGINT handler and leaves it there; this puts the caller's back."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _watched(place: str, kind: str):
    """Shows the progress that rank 0 leaves beside its checkpoints, from a daemon thread."""
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(place, kind, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


def _watch(place: str, kind: str, stop: threading.Event) -> None:
    files, path = filesystem(place)
    seen = None
    while not stop.wait(2):
        try:
            with files.open_input_stream(f"{path}/progress.json") as stream:
                note = json.loads(stream.read())
        except (OSError, ValueError):
            continue  # not written yet, or half written
        if note != seen:
            seen = note
            progress.step(kind, note["done"], note["total"], note["note"])


class _Worker:
    """What each worker runs: threads, local inputs, then the loop. An error of ours is returned, not retried."""

    def __init__(self, loop: Callable[[dict], None]):
        self.loop = loop

    def __call__(self, config: dict) -> ThermofuseError | None:
        import ray.train
        import torch

        torch.set_num_threads(config["threads"])
        store = Store(config["store"])
        config = {**config, "folders": [store.local(ref) for ref in config["refs"]]}
        try:
            self.loop(config)
        except ThermofuseError as error:
            if ray.train.get_context().get_world_size() > 1:
                raise  # the other ranks wait in a collective; the group has to fall
            return error
        return None
