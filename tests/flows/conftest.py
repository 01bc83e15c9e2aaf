"""One whole night for all tests of flows: it takes minutes, and what comes after it can take its pictures."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def living_in(root: Path) -> Iterator[None]:
    """The environment of a home, a store and an MLflow under `root`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THERMOFUSE_HOME", str(root / "home"))
        patch.setenv("THERMOFUSE_STORE", str(root / "store"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        yield


@pytest.fixture(scope="session")
def night_place(tmp_path_factory, mlflow_template) -> Path:
    """Where the first night lives."""
    root = tmp_path_factory.mktemp("night")
    shutil.copy(mlflow_template, root / "mlflow.db")
    return root


@pytest.fixture(scope="session")
def first_night(night_place, ray_local, prefect_server):
    """The outcome of `smoke` in a place where nothing was."""
    from flows.nightly import nightly

    with living_in(night_place):
        return nightly("smoke")
