"""Each place has one variable and one default; the environment of the engines never overrules the user's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks import places

VARIABLES = ("THERMOFUSE_HOME", "THERMOFUSE_STORE", "THERMOFUSE_DATA", "MLFLOW_TRACKING_URI")


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A fresh working directory and none of our variables."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults_lie_where_the_command_runs(bare):
    assert places.home() == bare / ".thermofuse"
    assert places.store().root == str(bare / ".thermofuse/store")
    assert places.tracking_uri() == f"sqlite:///{bare}/.thermofuse/mlflow.db"
    assert places.data_root() == Path.home() / ".cache/thermofuse/data"
    assert list(bare.iterdir()) == []


def test_variables_move_them(bare, monkeypatch):
    monkeypatch.setenv("THERMOFUSE_HOME", "elsewhere")
    assert places.home() == bare / "elsewhere"
    assert places.store().root == str(bare / "elsewhere/store")
    monkeypatch.setenv("THERMOFUSE_STORE", "s3://bucket/prefix/")
    monkeypatch.setenv("THERMOFUSE_DATA", "~/pictures")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert places.store().root == "s3://bucket/prefix"
    assert places.data_root() == Path.home() / "pictures"
    assert places.tracking_uri() == "http://127.0.0.1:5000"


def test_the_environment_is_set_where_it_was_not(bare):
    environment = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "99"}
    places.prepare_environment(environment)
    assert environment["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "99"
    assert environment["PREFECT_HOME"] == str(bare / ".thermofuse/prefect")
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"


def test_an_embedded_ray_gets_a_token_of_its_own(bare):
    first, second = {}, {}
    places.prepare_environment(first)
    places.prepare_environment(second)
    assert first["RAY_AUTH_MODE"] == "token" and len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]


@pytest.mark.parametrize("given", [{"RAY_ADDRESS": "10.0.0.1:6379"}, {"RAY_AUTH_MODE": "disabled"}])
def test_a_cluster_keeps_its_own_authentication(bare, given):
    environment = dict(given)
    places.prepare_environment(environment)
    assert "RAY_AUTH_TOKEN" not in environment
    assert environment.get("RAY_AUTH_MODE") == given.get("RAY_AUTH_MODE")


def test_os_environ_is_the_default(bare, monkeypatch):
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    places.prepare_environment()
    assert os.environ["DO_NOT_TRACK"] == "1"
