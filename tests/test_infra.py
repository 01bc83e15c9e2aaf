"""The files that describe places, read as text: they parse, publish on loopback only, and hold no secret."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tasks.places import prepare_environment

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
CLUSTER, RUNNER, SETTINGS = yaml.safe_load_all((INFRA / "raycluster.yaml").read_text())
DOCKERFILE = (INFRA / "Dockerfile").read_text()
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN$|ACCESS_KEY")


def environment(service: str) -> dict[str, str]:
    return SERVICES[service].get("environment", {})


@pytest.mark.parametrize("service", SERVICES)
def test_ports_are_published_on_loopback(service: str) -> None:
    for port in SERVICES[service].get("ports", []):
        assert port.startswith("127.0.0.1:"), port


@pytest.mark.parametrize("service", sorted(set(SERVICES) - {"bucket"}))
def test_a_service_says_when_it_is_healthy(service: str) -> None:
    assert SERVICES[service]["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_waits_for_what_it_needs(service: str) -> None:
    for needed, entry in SERVICES[service].get("depends_on", {}).items():
        finishes = entry["condition"] == "service_completed_successfully"
        assert needed in SERVICES
        assert finishes or "healthcheck" in SERVICES[needed]


@pytest.mark.parametrize("service", SERVICES)
def test_a_secret_has_no_default(service: str) -> None:
    for name, value in environment(service).items():
        if SECRET.search(name):
            assert re.fullmatch(r"\$\{\w+:\?set \w+\}", value), name


def test_an_image_is_pinned_or_ours() -> None:
    images = {entry["image"] for entry in SERVICES.values()}
    assert "thermofuse" in images
    assert all(re.search(r":.*\d", image) for image in images - {"thermofuse"})


def test_the_gpu_is_a_profile() -> None:
    wants = {name for name, entry in SERVICES.items() if "nvidia" in str(entry.get("deploy"))}
    assert wants == {name for name, entry in SERVICES.items() if "gpu" in entry.get("profiles", [])} != set()


def test_every_ray_node_has_the_token() -> None:
    nodes = [name for name, entry in SERVICES.items() if "ray start" in str(entry.get("command"))]
    assert len(nodes) == 4
    for name in nodes:
        assert environment(name)["RAY_AUTH_MODE"] == "token"
        assert "RAY_AUTH_TOKEN" in environment(name)
    assert CLUSTER["spec"]["authOptions"]["mode"] == "token"
    runner = {entry["name"]: entry for entry in RUNNER["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert runner["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == CLUSTER["metadata"]["name"]


def test_the_cluster_scales_and_has_gpus() -> None:
    spec = CLUSTER["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    limits = groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1
    assert all(group["minReplicas"] <= group["replicas"] < group["maxReplicas"] for group in groups.values())


def test_ray_is_the_one_of_the_lock() -> None:
    assert CLUSTER["spec"]["rayVersion"] == LOCK["ray"]
    assert yaml.safe_load((ROOT / "prefect.yaml").read_text())["prefect-version"] == LOCK["prefect"]


def test_the_image_is_built_from_the_lock_and_runs_as_nobody_special() -> None:
    steps = [line.split()[0] for line in DOCKERFILE.splitlines() if re.match(r"[A-Z]+ ", line)]
    assert steps[:2] == ["ARG", "FROM"]
    assert "--requirement requirements.lock" in DOCKERFILE
    assert re.search(r"^USER (?!root)\w+$", DOCKERFILE, re.MULTILINE)
    allowed = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    for copied in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in copied.split():
            assert (ROOT / source).exists(), source
            assert {source, f"{source}/**"} & allowed, source


def test_one_uv_makes_every_environment() -> None:
    pins = {re.search(r"uv==[\d.]+", (ROOT / path).read_text())[0] for path in ("Makefile", "infra/Dockerfile")}
    assert len(pins) == 1


def test_the_lock_is_names_and_versions() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    assert len(lines) == len(LOCK)


def test_the_lock_answers_every_requirement() -> None:
    wanted = PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]
    for requirement in map(Requirement, wanted + PROJECT["build-system"]["requires"]):
        assert requirement.specifier.contains(Version(LOCK[requirement.name])), requirement


@pytest.mark.parametrize("package", ["torch", "torchvision", "ray", "prefect", "mlflow", "fastapi", "boto3", "s3fs"])
def test_what_is_installed_is_what_is_locked(package: str) -> None:
    """A local build tag (`+cpu`) is allowed: the same version for another device."""
    assert importlib.metadata.version(package).split("+")[0] == LOCK[package]


def table_of_variables() -> dict[str, str]:
    rows = re.findall(r"^\| `([A-Z_0-9]+)` \| (.+?) \|", (INFRA / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == len(dict(rows))
    return dict(rows)


def test_every_variable_that_is_set_is_in_the_table() -> None:
    told: dict[str, str] = {}
    prepare_environment(told)
    for service in SERVICES:
        if SERVICES[service]["image"] == "thermofuse":
            told |= environment(service)
    told |= SETTINGS["data"] | dict(re.findall(r"((?:THERMOFUSE|RAY|PREFECT|MLFLOW)_[A-Z_]+)=(\S+)", DOCKERFILE))
    only_servers = {"PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_SERVER_UI_API_URL", "MLFLOW_S3_ENDPOINT_URL"}
    only_people = {"THERMOFUSE_DEBUG", "THERMOFUSE_CHAT_KEY", "GOMP_SPINCOUNT"}
    assert set(told) - only_servers == set(table_of_variables()) - only_people


def test_the_table_tells_the_values() -> None:
    told: dict[str, str] = {}
    prepare_environment(told)
    for name, value in table_of_variables().items():
        if re.fullmatch(r"`[\w.]+`", value) and name in told:
            assert value.strip("`") == told[name], name
