"""Register: the night's model becomes a version in MLflow that runs anywhere, with its scores and its exam beside it.

A version is a pyfunc from code: the weights' folder, a copy of the `models` package, pinned requirements, a tensor
signature and an input example. It needs nothing of this checkout. `tasks/fusion_pyfunc.py` says what goes in and out.
"""

from __future__ import annotations

import ast
import contextlib
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
from models.errors import StageFailed, UsageError
from tasks import places, tracking
from tasks.stage import stage
from tasks.store import Ref, table_bytes

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

PYFUNC = Path(__file__).with_name("fusion_pyfunc.py")


@dataclass(frozen=True)
class Version:
    """A registered model. `number` is None while MLflow is down and the registration is pending.

    exam: digest of the frozen episodes its scores were taken on. reused: an earlier run of this night registered it.
    """

    name: str
    number: int | None
    run_id: str | None = None
    model_id: str | None = None
    exam: str = ""
    model: Ref | None = None
    reused: bool = False

    def __str__(self) -> str:
        return f"{self.name} v{self.number}" if self.number else f"{self.name} (registration pending)"


@dataclass(frozen=True)
class Package:
    """How the artefact is packed.

    predictor: the class whose `load(folder)` and `predict(...)` are served. code: the packages it comes from.
    example: query, support and support_mask as in `tasks/fusion_pyfunc.py`; None makes a small one up.
    """

    predictor: str = "models.segmenters.predictor:Predictor"
    code: tuple[Path, ...] = (Path(models.__file__).parent,)
    example: Mapping[str, Any] | None = None


@stage("register")
def register(
    model: Ref, scores: Mapping[str, Any], table: pd.DataFrame, *, run: tracking.Run, dataset: str, shots: int,
    exam: str, package: Package | None = None,
) -> Version:  # fmt: skip
    """Register a model folder of the store as the next version of `thermofuse-<dataset>-<shots>shot`.

    Args:
        model: the folder that the predictor loads.
        scores: `models.metrics.Scores.as_dict()`, attached as metrics in points.
        table: one row per episode and stream (`models.metrics.COLUMNS`), kept with the version.
        run: the night's run; its tags become the version's.
        exam: digest of the frozen episodes behind scores and table.

    The same night and the same model give the same version. While MLflow is down the version is pending (number None):
    run the night again. Raises StageFailed when the logged model cannot answer its own example.
    """
    name = f"thermofuse-{dataset}-{shots}shot"
    if run.reconnect():
        try:
            run.file(f"exams/{exam}.parquet", table_bytes(table))
            found = _same_night(name, run, model)
            return replace(found or _create(name, model, scores, run, exam, package or Package()), exam=exam)
        except Exception as error:
            if not tracking.unreachable(error):
                raise
            run.went_down(error)
    run.metrics(points(scores))
    return Version(name, None, exam=exam, model=model)


def points(scores: Mapping[str, Any]) -> dict[str, float]:
    """Scores as metrics in points (0..100), such as `fusion/miou_low` or `fusion/fold0/person`; gaps are left out."""
    named = {}
    for stream, tree in scores["streams"].items():
        leaves = {metric: tree[metric] for metric in ("miou", "fb_iou") if metric in tree}
        for fold, branch in tree["folds"].items():
            leaves |= {f"fold{fold}/{metric}": branch[metric] for metric in ("miou", "fb_iou") if metric in branch}
            classes = {re.sub(r"[^\w .-]", "_", name): leaf for name, leaf in branch["classes"].items()}
            leaves |= {f"fold{fold}/{name}": leaf for name, leaf in classes.items()}
        for path, leaf in leaves.items():
            bounds = (("", "value"), ("_low", "low"), ("_high", "high"))
            named |= {f"{stream}/{path}{end}": 100 * leaf[key] for end, key in bounds if leaf[key] is not None}
    return named


def signature() -> ModelSignature:
    """Tensor names, types and ranks of what `tasks/fusion_pyfunc.py` describes; -1 is any size."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    byte, real = np.dtype("uint8"), np.dtype("float32")
    stack = (-1, -1, -1)
    return ModelSignature(
        Schema([TensorSpec(byte, (-1, -1), "query"), TensorSpec(byte, stack, "support"),
                TensorSpec(byte, stack, "support_mask")]),
        Schema([TensorSpec(byte, (-1, -1), "mask"), TensorSpec(real, (-1, -1), "probability")]),
        ParamSchema([ParamSpec("fold", "long", -1)]),
    )  # fmt: skip


def example_input(shots: int, side: int = 64) -> dict[str, Any]:
    """A warm square on a cold ramp, to show the shapes."""
    import numpy as np

    query = np.tile(np.linspace(20, 90, side), (side, 1)).astype(np.uint8)
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 : side // 2, side // 4 : side // 2] = 1
    query[mask == 1] = 230
    return {"query": query, "support": np.stack([query] * shots), "support_mask": np.stack([mask] * shots)}


def requirements(folders: Sequence[Path]) -> list[str]:
    """name==version of every installed distribution that the Python files below `folders` import."""
    imported = {name for folder in folders for path in Path(folder).rglob("*.py") for name in _imports(path)}
    owners = packages_distributions()
    names = {owner for name in imported - sys.stdlib_module_names for owner in owners.get(name, ())}
    return sorted(f"{name}=={version(name).split('+')[0]}" for name in names | {"mlflow"} if name != "thermofuse")


def find_version(name: str, *, number: int | None = None, alias: str = "champion") -> Version | None:
    """A version by number or alias; None when there is none. Raises StageFailed when MLflow is down."""
    from mlflow.exceptions import MlflowException

    client = tracking.client()
    with reachable():
        try:
            if number is not None:
                return _version(client.get_model_version(name, str(number)))
            return _version(client.get_model_version_by_alias(name, alias))
        except MlflowException as error:
            if not tracking.refused(error):
                raise
            return None


def known_version(name: str, number: int) -> Version:
    """A version by number. Raises UsageError that lists the models or the versions there are."""
    if found := find_version(name, number=number):
        return found
    with reachable():
        versions = sorted(int(each.version) for each in tracking.client().search_model_versions(f"name = '{name}'"))
    if versions:
        raise UsageError(f"{name} has no version {number}; there are {', '.join(map(str, versions))}.")
    raise UsageError(f"There is no model {name!r}; registered are {', '.join(names()) or 'none yet'}.")


def names() -> list[str]:
    """Registered models of ours."""
    with reachable():
        return sorted(found.name for found in tracking.client().search_registered_models("name LIKE 'thermofuse-%'"))


def load(version: Version) -> Any:
    """The version as an MLflow pyfunc, ready to predict."""
    with reachable():
        return tracking.fluent().pyfunc.load_model(f"models:/{version.name}/{version.number}")


def exam_table(version: Version, exam: str) -> pd.DataFrame | None:
    """The version's row per episode and stream on that exam; None when it never sat it."""
    import pandas as pd

    client, path = tracking.client(), f"exams/{exam}.parquet"
    with reachable():
        if path not in {info.path for info in client.list_artifacts(version.run_id, "exams")}:
            return None
        return pd.read_parquet(client.download_artifacts(version.run_id, path))


def save_exam(version: Version, exam: str, table: pd.DataFrame) -> None:
    with reachable():
        tracking.log_file(tracking.client(), version.run_id, f"exams/{exam}.parquet", table_bytes(table))


@contextlib.contextmanager
def reachable() -> Iterator[None]:
    """Turn MLflow's absence into one sentence."""
    try:
        yield
    except Exception as error:
        if not tracking.unreachable(error):
            raise
        raise StageFailed(f"MLflow at {places.tracking_uri()} cannot be reached; start it and run again.") from error


def _same_night(name: str, run: tracking.Run, model: Ref) -> Version | None:
    """The version that an earlier run of this night made of this model."""
    same = f"name = '{name}' and tags.{tracking.RUN_KEY} = '{run.run_key}' and tags.model_digest = '{model.digest}'"
    found = tracking.client().search_model_versions(same)
    return replace(_version(max(found, key=lambda version: int(version.version))), reused=True) if found else None


def _create(name: str, model: Ref, scores: Mapping, run: tracking.Run, exam: str, package: Package) -> Version:
    """Log first and register second, tags included, so that a version is never without its lineage."""
    lineage = {f"model_{key}": value for key, value in asdict(model).items()}
    tags = {name: str(value) for name, value in {**run.labels, "exam": exam, **lineage}.items()}
    model_id = _log_model(name, model, run, tags, package)
    _attach(points(scores), run, model_id)
    client = tracking.client()
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    source, tags = f"models:/{model_id}", {**tags, "logged_model": model_id}
    return _version(client.create_model_version(name, source, run.id, tags=tags, model_id=model_id))


def _log_model(name: str, model: Ref, run: tracking.Run, tags: dict[str, str], package: Package) -> str:
    """Write the pyfunc to MLflow and let it answer its example once; returns the LoggedModel's id."""
    from mlflow.entities import LoggedModelOutput

    mlflow, client = tracking.fluent(), tracking.client()
    example = package.example or example_input(2)
    logged = client.create_logged_model(
        client.get_run(run.id).info.experiment_id, name=name, source_run_id=run.id, tags=tags,
        model_type="few-shot segmentation",
    )  # fmt: skip
    mlflow.pyfunc.log_model(
        name=name, model_id=logged.model_id, python_model=str(PYFUNC), code_paths=[str(path) for path in package.code],
        artifacts={"model": str(places.store().local(model))}, model_config={"predictor": package.predictor},
        signature=signature(), input_example=dict(example), pip_requirements=requirements(package.code),
    )  # fmt: skip
    client.log_outputs(run.id, [LoggedModelOutput(logged.model_id, step=0)])
    _check(mlflow.pyfunc.load_model(f"models:/{logged.model_id}"), example)
    return logged.model_id


def _check(loaded: Any, example: Mapping[str, Any]) -> None:
    answer = loaded.predict(dict(example))
    shapes = {key: getattr(answer.get(key), "shape", None) for key in ("mask", "probability")}
    if set(shapes.values()) != {example["query"].shape}:
        raise StageFailed(
            f"The logged model answers {shapes} to a query of {example['query'].shape}; fix its predictor."
        )


def _attach(metrics: Mapping[str, float], run: tracking.Run, model_id: str) -> None:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    batch = [Metric(key, value, now, 0, model_id=model_id, run_id=run.id) for key, value in metrics.items()]
    for start in range(0, len(batch), 1000):
        tracking.client().log_batch(run.id, batch[start : start + 1000])


def _version(found: ModelVersion) -> Version:
    tags = found.tags
    model = {key: tags.get(f"model_{key}", "") for key in ("uri", "kind", "digest")}
    return Version(
        found.name, int(found.version), found.run_id, tags.get("logged_model"), tags.get("exam", ""),
        Ref(**model, count=int(tags.get("model_count", 0))),
    )  # fmt: skip


def _imports(path: Path) -> set[str]:
    """Top-level names that a Python file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return {name.split(".")[0] for name in found}
