"""MLflow remembers the night: one run per run key, written by the driver alone.

While MLflow cannot be reached nothing waits for it: every event becomes a JSON line in `home/spool/<run key>.jsonl`,
and the next night that reaches MLflow replays the spool. Events say what is so (a parameter's value, a metric at a
time), never what to add, so replaying one twice changes nothing.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tasks import places
from tasks.spool import Spool

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

EXPERIMENT = "thermofuse"
RUN_KEY = "run_key"
# What MLflow answers when it understood and said no; anything else counts as being down.
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST",
            "INVALID_STATE", "NOT_FOUND"}  # fmt: skip

log = logging.getLogger(__name__)


@contextlib.contextmanager
def night_run(
    recipe: str, run_key: str, params: Mapping[str, Any] | Any, tags: Mapping[str, str] | None = None
) -> Iterator[Run]:
    """The MLflow run of one night, open inside the `with`.

    The same run key comes back to the same run. params: a recipe (any dataclass tree) or a mapping; nested names are
    joined by dots. tags: data digests and the like; recipe, run key, git sha and lock digest are added.
    Never raises because of MLflow. The run ends FINISHED, FAILED or, on Ctrl-C, KILLED.
    """
    run = Run(recipe, run_key)
    run.tags({"recipe": recipe, RUN_KEY: run_key, **provenance(), **(tags or {})})
    run.params(params)
    try:
        yield run
    except BaseException as error:
        run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    run.end("FINISHED")


class Run:
    """One night's record.

    id: MLflow's run id, or None while MLflow is down (then the spool takes everything). labels: all its tags.
    """

    def __init__(self, recipe: str, run_key: str) -> None:
        self.recipe, self.run_key = recipe, run_key
        self.id: str | None = None
        self.labels: dict[str, str] = {}
        self._spool = Spool(places.home() / "spool" / f"{run_key}.jsonl")
        self._start()

    @property
    def online(self) -> bool:
        return self.id is not None

    def params(self, settings: Any) -> None:
        """Settings, flattened to dotted names. A name that the run already has keeps its first value."""
        self._send("params", values=flat(settings))

    def tags(self, values: Mapping[str, Any]) -> None:
        texts = {name: str(value) for name, value in values.items()}
        self.labels |= texts
        self._send("tags", values=texts)

    def metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Numbers by name; None and NaN are left out."""
        known = {name: float(value) for name, value in values.items() if value is not None and not math.isnan(value)}
        self._send("metrics", values=known, step=step)

    def file(self, name: str, data: bytes | str) -> None:
        """An artefact, under a name such as `report/scores.json`."""
        data = data.encode() if isinstance(data, str) else data
        self._send("file", name=name, data=base64.b64encode(data).decode())

    def figure(self, name: str, figure: Figure) -> None:
        """A figure as a PNG artefact."""
        from models.plots import png

        self.file(name, png(figure))

    def end(self, status: str) -> None:
        self._send("end", status=status)
        self._spool.release()

    def reconnect(self) -> bool:
        """Try once more to reach MLflow, and bring it up to date; says whether it is there."""
        if not self.online:
            self._spool.release()
            self._start()
        return self.online

    def went_down(self, error: Exception) -> None:
        """Spool from here on: each further try would cost seconds."""
        self.id = None
        reason = " ".join(str(error).split())[:200]
        log.warning("MLflow at %s cannot be reached; the night goes on and %s is replayed by the next run (%s)",
                    places.tracking_uri(), self._spool.path, reason)  # fmt: skip

    def _start(self) -> None:
        try:
            replay()
            self.id = _run_id(client(), self.recipe, self.run_key)
        except Exception as error:
            self.went_down(error)

    def _send(self, op: str, **event: Any) -> None:
        event = {"op": op, "recipe": self.recipe, RUN_KEY: self.run_key, "time": time.time_ns() // 1_000_000, **event}
        if self.id is not None:
            try:
                return _apply(client(), self.id, event)
            except Exception as error:
                if refused(error):
                    return log.warning("MLflow refused the %s of %s: %s", op, self.run_key, error)
                self.went_down(error)
        self._spool.append(event)


def replay() -> int:
    """Send to MLflow what was spooled while it was down; returns the number of events. Raises when it is still down."""
    sent = 0
    for path in sorted((places.home() / "spool").glob("*.jsonl")):
        with contextlib.closing(Spool(path).drain()) as events:
            for event in events:
                _replay_one(client(), event)
                sent += 1
    return sent


def _replay_one(mlflow: MlflowClient, event: dict[str, Any]) -> None:
    try:
        _apply(mlflow, _run_id(mlflow, event["recipe"], event[RUN_KEY]), event)
    except Exception as error:
        if not refused(error):
            raise
        log.warning("MLflow refused a spooled %s of %s: %s", event["op"], event[RUN_KEY], error)


def client() -> MlflowClient:
    """A client of `places.tracking_uri()`."""
    return _client(places.tracking_uri())


@functools.lru_cache(maxsize=4)
def _client(uri: str) -> MlflowClient:
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(uri, registry_uri=uri)


def fluent() -> ModuleType:
    """The `mlflow` module itself, pointed at `places.tracking_uri()`; for what its client cannot do."""
    import mlflow

    client()  # quiets the loggers
    mlflow.set_tracking_uri(places.tracking_uri())
    mlflow.set_registry_uri(places.tracking_uri())
    return mlflow


def provenance() -> dict[str, str]:
    """The git sha of this checkout (`unknown` outside one, `-dirty` with changes) and a digest of what is installed."""
    return {"git_sha": git_sha(Path(__file__).resolve().parents[1]), "lock_digest": lock_digest()}


def git_sha(root: Path) -> str:
    """HEAD of the checkout whose top is `root`, or `unknown`."""
    if _git(root, "rev-parse", "--show-toplevel") != str(root):
        return "unknown"
    sha = _git(root, "rev-parse", "HEAD") or "unknown"
    return f"{sha}-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else sha


def lock_digest() -> str:
    """sha256 over name==version of every installed distribution, one a line, sorted."""
    installed = {f"{found.name}=={found.version}" for found in distributions() if found.name}
    return hashlib.sha256("\n".join(sorted(installed, key=str.lower)).encode()).hexdigest()


def flat(settings: Any, prefix: str = "") -> dict[str, str]:
    """A tree of dataclasses and mappings as dotted names to strings, such as `data.fold`."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    if not isinstance(settings, Mapping) or (prefix and not settings):
        return {prefix: str(settings)}
    named = {(f"{prefix}.{name}" if prefix else str(name)): value for name, value in settings.items()}
    return {key: text for name, value in named.items() for key, text in flat(value, name).items()}


def _run_id(mlflow: MlflowClient, recipe: str, run_key: str) -> str:
    """The run of that key, made when there is none."""
    experiment = _experiment_id(mlflow)
    found = mlflow.search_runs([experiment], f"tags.{RUN_KEY} = '{run_key}'", max_results=1)
    if found:
        if found[0].info.status != "RUNNING":
            mlflow.update_run(found[0].info.run_id, status="RUNNING")
        return found[0].info.run_id
    tags = {RUN_KEY: run_key, "mlflow.source.name": f"thermofuse run {recipe}"}
    return mlflow.create_run(experiment, tags=tags, run_name=f"{recipe} {run_key}").info.run_id


def _experiment_id(mlflow: MlflowClient) -> str:
    """The one experiment. With a database of our own its artefacts lie in the home, or MLflow would use the cwd."""
    from mlflow.exceptions import MlflowException

    location = None if mlflow.tracking_uri.startswith("http") else (places.home() / "mlflow").as_uri()
    found = mlflow.get_experiment_by_name(EXPERIMENT)
    if found is None:
        with contextlib.suppress(MlflowException):  # another process was faster
            return mlflow.create_experiment(EXPERIMENT, artifact_location=location)
        found = mlflow.get_experiment_by_name(EXPERIMENT)
    return found.experiment_id


def _apply(mlflow: MlflowClient, run_id: str, event: dict[str, Any]) -> None:
    from mlflow.entities import Metric, Param, RunTag

    if event["op"] == "params":
        known = mlflow.get_run(run_id).data.params
        new = [Param(name, value[:6000]) for name, value in event["values"].items() if name not in known]
        for start in range(0, len(new), 100):
            mlflow.log_batch(run_id, params=new[start : start + 100])
    elif event["op"] == "tags":
        mlflow.log_batch(run_id, tags=[RunTag(name, value[:8000]) for name, value in event["values"].items()])
    elif event["op"] == "metrics":
        mlflow.log_batch(run_id, [Metric(k, v, event["time"], event["step"]) for k, v in event["values"].items()])
    elif event["op"] == "file":
        log_file(mlflow, run_id, event["name"], base64.b64decode(event["data"]))
    elif event["op"] == "end":
        mlflow.set_terminated(run_id, event["status"], event["time"])


def log_file(mlflow: MlflowClient, run_id: str, name: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(name).name)
        path.write_bytes(data)
        parent = Path(name).parent.as_posix()
        mlflow.log_artifact(run_id, str(path), None if parent == "." else parent)


def refused(error: Exception) -> bool:
    """MLflow was there and said no."""
    return getattr(error, "error_code", None) in REFUSALS


def unreachable(error: Exception) -> bool:
    """MLflow, its database or the way to it is down."""
    from requests import RequestException

    if isinstance(error, RequestException | ConnectionError | TimeoutError):
        return True
    return getattr(error, "error_code", None) == "TEMPORARILY_UNAVAILABLE" or str(error).startswith("API request to ")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
