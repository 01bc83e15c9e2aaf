"""Where things lie: the working folder, the store, the data, the tracking database; and the engines' environment."""

from __future__ import annotations

import os
import secrets
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import UsageError

if TYPE_CHECKING:
    from tasks.store import Store


def home() -> Path:
    """The working folder: $THERMOFUSE_HOME, or `.thermofuse` where the command runs. Nothing is created."""
    return Path(os.environ.get("THERMOFUSE_HOME") or ".thermofuse").expanduser().absolute()


def store() -> Store:
    """The store that stages share: $THERMOFUSE_STORE (a folder or s3://bucket/prefix), or `store` in `home()`."""
    from tasks.store import Store

    return Store(os.environ.get("THERMOFUSE_STORE") or str(home() / "store"))


def data_root() -> Path:
    """Where data sets and weights lie, one folder each: $THERMOFUSE_DATA, or `~/.cache/thermofuse/data`."""
    return Path(os.environ.get("THERMOFUSE_DATA") or "~/.cache/thermofuse/data").expanduser().absolute()


def tracking_uri() -> str:
    """MLflow's address: $MLFLOW_TRACKING_URI, or a SQLite file in `home()`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def prepare_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what Prefect, Ray, MLflow and the Hugging Face hub read at import; what is already set stays.

    Call it once, before any of them is imported. No telemetry leaves the machine, a slow machine gets time to start
    Prefect's server, an absent MLflow server costs seconds instead of minutes, and an embedded Ray takes a token that
    only this process tree knows (nothing is written to the user's home).
    """
    for name, value in _quiet().items():
        environment.setdefault(name, value)
    if not environment.get("RAY_ADDRESS") and "RAY_AUTH_MODE" not in environment:
        environment["RAY_AUTH_MODE"] = "token"
        environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _quiet() -> dict[str, str]:
    return {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_HOME": str(home() / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray warns; a fan-out hides the GPUs from CPU workers itself
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def make_home() -> None:
    """Make the working folder; Prefect's server does not start without it. Raises UsageError when it cannot be made."""
    try:
        home().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"Cannot make {home()} ({error.strerror}); set THERMOFUSE_HOME.") from error
