"""The places the tests run in: a home, a store, one Ray, one Prefect server, one MLflow, one S3, all local.

Nothing here reaches the network, and nothing is left behind. Ask for a fixture and it starts; the costly ones
(`ray_local`, `prefect_server`, `mlflow_template`, the S3 server) start once per session.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import tempfile
import uuid
from functools import cache
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("thermofuse", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("thermofuse")

# Ray puts sockets under its folder and the kernel allows 107 bytes, so this one is short and not pytest's.
SESSION = Path(tempfile.mkdtemp(prefix="tf", dir="/tmp"))
COSTLY = ("ray_local", "prefect_server", "mlflow_template", "mlflow_uri")
LEAKS = ("RAY_ADDRESS", "PREFECT_API_URL", "PREFECT_PROFILE", "MLFLOW_TRACKING_URI", "THERMOFUSE_STORE", "AWS_PROFILE")


def pytest_configure() -> None:
    """Set the environment before any engine is imported; a developer's own servers must not leak in."""
    for name in LEAKS:
        os.environ.pop(name, None)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # one that was started with `&` would ignore it
    os.environ.update(
        THERMOFUSE_HOME=str(SESSION / "home"),
        PREFECT_HOME=str(SESSION / "prefect"),
        RAY_AUTH_MODE="disabled",
        RAY_worker_niceness="0",  # beside the other half of the tests, workers of niceness 15 would starve
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        MPLBACKEND="Agg",
        MPLCONFIGDIR=str(SESSION / "matplotlib"),
        # Ray warns at init that it will stop hiding the GPUs from actors that ask for none; take the new way now.
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    )
    from tasks.places import prepare_environment

    prepare_environment()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """For `pytest -n 2`: what asks for a costly place shares one process and starts it once, other files are free."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "costly" if is_costly(config.rootpath / file) else file

    return Scheduling(config, log)


@cache
def is_costly(file: Path) -> bool:
    return file.parent.name == "flows" or any(name in file.read_text(encoding="utf-8") for name in COSTLY)


def pytest_unconfigure() -> None:
    shutil.rmtree(SESSION, ignore_errors=True)


@pytest.fixture
def thermofuse_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a store of this test's own; returns the home, the store is `tmp_path / "store"`."""
    monkeypatch.setenv("THERMOFUSE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("THERMOFUSE_STORE", str(tmp_path / "store"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def ray_local():
    """One private Ray of four logical CPUs for the whole session; yields the `ray` module."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(SESSION / "ray"),
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def prefect_server():
    """One temporary Prefect server for the whole session; yields its API address."""
    from prefect.settings import get_current_settings
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield get_current_settings().api.url


@pytest.fixture(scope="session")
def mlflow_template() -> Path:
    """A migrated, empty MLflow database; migrating costs seconds, so it is done once and copied."""
    from mlflow import MlflowClient

    path = SESSION / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_uri(mlflow_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh MLflow database, named by MLFLOW_TRACKING_URI; artifacts of the default experiment stay in tmp_path."""
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(mlflow_template) as source, sqlite3.connect(path) as copy:
        source.backup(copy)
        copy.execute("UPDATE experiments SET artifact_location = ?", (str(tmp_path / "mlartifacts"),))
    source.close(), copy.close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    return f"sqlite:///{path}"


@pytest.fixture(scope="session")
def s3_server():
    """One S3 server on loopback for the whole session; yields its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket and the AWS_* variables that lead to it; returns `s3://<bucket>`."""
    import boto3

    settings = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ENDPOINT_URL_S3": s3_server,
        "MLFLOW_S3_ENDPOINT_URL": s3_server,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "no-aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-aws-credentials"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"
