"""prefect.yaml against a real server and a real worker: deploy from the checkout, run the smoke deployment, look."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import httpx
import pytest
import yaml

from flows.recipes import Recipe

ROOT = Path(__file__).parents[2]
PREFECT = [sys.executable, "-m", "prefect"]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextmanager
def running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A process in a session of its own; at the end it is asked to stop, then its own group is killed."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(what, seconds: float, log: Path):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := what():
            return answer
        time.sleep(0.5)
    pytest.fail(f"not within {seconds} s; the end of {log.name}:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deployment")


@pytest.fixture(scope="module")
def environment(folder: Path, first_night, night_place: Path) -> dict[str, str]:
    """A machine of its own that shares the store with the first night, as a second worker would."""
    return os.environ | {
        "THERMOFUSE_HOME": str(folder / "home"),
        "THERMOFUSE_STORE": str(night_place / "store"),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }


@pytest.fixture(scope="module")
def api(folder: Path, environment: dict[str, str]) -> Iterator[httpx.Client]:
    """A Prefect server with its own database, the pool, and both deployments, made by the commands of the README."""
    url = httpx.URL(environment["PREFECT_API_URL"])
    server = [*PREFECT, "server", "start", "--host", url.host, "--port", str(url.port), "--no-ui"]
    log = folder / "server.log"
    with running(server, log, environment), httpx.Client(base_url=f"{url}/", timeout=30) as client:

        def healthy() -> bool:
            try:
                return client.get("health").is_success
            except httpx.TransportError:
                return False

        wait_for(healthy, 180, log)
        for command in (["work-pool", "create", "thermofuse", "--type", "process"], ["--no-prompt", "deploy", "--all"]):
            done = subprocess.run(
                [*PREFECT, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stdout + done.stderr
        yield client


def deployment(api: httpx.Client, name: str) -> dict:
    return api.get(f"deployments/name/nightly/{name}").raise_for_status().json()


def test_the_file_names_no_machine() -> None:
    text = (ROOT / "prefect.yaml").read_text()
    assert "directory" not in yaml.safe_load(text).get("pull", [{}])[0]
    for entry in yaml.safe_load(text)["deployments"]:
        path, name = entry["entrypoint"].split(":")
        assert f"def {name}(" in (ROOT / path).read_text()


def test_the_night_is_scheduled_and_one_at_a_time(api: httpx.Client) -> None:
    night = deployment(api, "nightly")
    assert [entry["schedule"]["cron"] for entry in night["schedules"] if entry["active"]] == ["0 2 * * *"]
    assert night["global_concurrency_limit"]["limit"] == 1
    assert night["concurrency_options"] == {"collision_strategy": "ENQUEUE", "grace_period_seconds": 600}
    assert night["parameters"] == {"recipe": "msrs-1shot"}
    assert night["work_pool_name"] == "thermofuse"


def test_the_form_has_every_setting(api: httpx.Client) -> None:
    smoke = deployment(api, "smoke")
    assert smoke["schedules"] == []
    schema = smoke["parameter_openapi_schema"]
    assert schema["properties"]["recipe"]["default"] == "smoke"
    form = schema["definitions"]["Recipe"]["properties"]
    assert set(form) == {setting.name for setting in fields(Recipe)}


def test_a_worker_runs_the_smoke_deployment(
    api: httpx.Client, folder: Path, environment: dict[str, str], first_night
) -> None:
    created = api.post(f"deployments/{deployment(api, 'smoke')['id']}/create_flow_run", json={})
    run = f"flow_runs/{created.raise_for_status().json()['id']}"
    log = folder / "worker.log"
    with running([*PREFECT, "worker", "start", "--pool", "thermofuse", "--limit", "1"], log, environment):
        final = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
        state = wait_for(lambda: (s := api.get(run).json()["state"])["type"] in final and s, 1500, log)
    assert state["type"] == "COMPLETED", (state, log.read_text()[-5000:])
    stages = api.post("task_runs/filter", json={"flow_runs": {"id": {"any_": [run.split("/")[1]]}}}).json()
    assert {stage["state"]["type"] for stage in stages} == {"COMPLETED"}
    (outcome,) = [json.loads(path.read_text()) for path in (folder / "home" / "runs").rglob("outcome.json")]
    assert outcome["scores"] == json.loads(json.dumps(first_night.as_dict()["scores"]))
    assert all(stage["reused"] for stage in outcome["stages"] if stage["name"] not in ("register", "promote"))
    assert outcome["version"]["number"] == 1 and outcome["verdict"]["sentence"]
