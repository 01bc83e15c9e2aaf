"""What MLflow keeps of a night, and what happens to it while MLflow is down."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tasks import tracking
from tasks.tracking import EXPERIMENT, Spool, client, flat, git_sha, lock_digest, night_run, replay


@dataclass(frozen=True)
class Data:
    fold: int | None = None
    folds: tuple[int, ...] = (0, 1)


@dataclass(frozen=True)
class Settings:
    name: str = "toy"
    data: Data = field(default_factory=Data)


@pytest.fixture
def closed_port(thermofuse_home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def runs() -> list:
    experiment = client().get_experiment_by_name(EXPERIMENT)
    return client().search_runs([experiment.experiment_id])


def artefacts(run_id: str, folder: str | None = None) -> set[str]:
    return {info.path for info in client().list_artifacts(run_id, folder)}


def gone(*_, **__):
    raise ConnectionError("gone")


def night(**changes) -> None:
    options = {"recipe": "smoke", "run_key": "k1", "params": Settings(), "tags": {"data_digest": "d1"}, **changes}
    with night_run(**options) as run:
        run.metrics({"miou": 48.9, "missing": None, "nan": float("nan")})
        run.metrics({"loss": 1.0}, step=10)
        run.file("report/scores.md", "# scores")
        run.figure("grid.png", Figure(figsize=(1, 1)))


def test_a_night_is_one_run_with_params_metrics_tags_and_files(thermofuse_home, mlflow_uri):
    night()
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert run.data.params == {"name": "toy", "data.fold": "None", "data.folds": "(0, 1)"}
    assert run.data.metrics == {"miou": 48.9, "loss": 1.0}, "None and NaN are no numbers"
    tags = run.data.tags
    assert (tags["recipe"], tags["run_key"], tags["data_digest"]) == ("smoke", "k1", "d1")
    assert len(tags["lock_digest"]) == 64
    assert tags["git_sha"]
    assert artefacts(run.info.run_id) == {"grid.png", "report"}
    assert artefacts(run.info.run_id, "report") == {"report/scores.md"}
    assert (thermofuse_home / "mlflow").is_dir(), "artefacts lie in the home, not in the working directory"


def test_the_same_run_key_returns_to_the_same_run(thermofuse_home, mlflow_uri):
    night()
    night(params={"name": "other", "extra": 1})
    (run,) = runs()
    assert run.data.params["name"] == "toy", "MLflow never changes a parameter; the first value stays"
    assert run.data.params["extra"] == "1"
    night(run_key="k2")
    assert len(runs()) == 2


@pytest.mark.parametrize(("error", "status"), [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_night_that_breaks_says_so_and_lets_the_error_through(thermofuse_home, mlflow_uri, error, status):
    with pytest.raises(type(error)), night_run("smoke", "k1", {}):
        raise error
    (run,) = runs()
    assert run.info.status == status


def test_mlflow_down_costs_seconds_and_everything_is_spooled(closed_port, thermofuse_home, caplog):
    start = time.monotonic()
    night()
    assert time.monotonic() - start < 30
    events = [json.loads(line) for line in (thermofuse_home / "spool" / "k1.jsonl").read_text().splitlines()]
    assert [event["op"] for event in events] == ["tags", "params", "metrics", "metrics", "file", "file", "end"]
    (warning,) = [record.getMessage() for record in caplog.records if record.name == tracking.__name__]
    assert closed_port in warning
    assert "replayed by the next run" in warning


def test_the_spool_is_replayed_by_the_next_night(closed_port, thermofuse_home, tmp_path, request, monkeypatch):
    night()
    spooled = json.loads((thermofuse_home / "spool" / "k1.jsonl").read_text().splitlines()[2])
    request.getfixturevalue("mlflow_uri")
    night(run_key="k2")
    old, new = sorted(runs(), key=lambda run: run.data.tags["run_key"])
    assert old.data.metrics == new.data.metrics
    assert old.data.params == new.data.params
    assert (old.info.status, new.info.status) == ("FINISHED", "FINISHED")
    assert artefacts(old.info.run_id) == {"grid.png", "report"}
    (metric,) = client().get_metric_history(old.info.run_id, "miou")
    assert metric.timestamp == spooled["time"], "it counts from when it happened"
    assert not list((thermofuse_home / "spool").iterdir())
    assert replay() == 0


def test_mlflow_going_down_in_the_middle_loses_nothing(thermofuse_home, mlflow_uri, monkeypatch):
    with night_run("smoke", "k1", Settings()) as run:
        assert run.online
        with monkeypatch.context() as broken:
            broken.setattr(client(), "log_batch", gone)
            run.metrics({"miou": 1.0})
        assert not run.online
        run.file("late.txt", "b")
    assert runs()[0].info.status == "RUNNING"
    assert replay() == 3
    (found,) = runs()
    assert found.data.metrics == {"miou": 1.0}
    assert artefacts(found.info.run_id) == {"late.txt"}
    assert found.info.status == "FINISHED"


def test_a_replay_that_breaks_off_starts_over_and_changes_nothing_twice(thermofuse_home, mlflow_uri, monkeypatch):
    spool = Spool(thermofuse_home / "spool" / "k1.jsonl")
    base = {"recipe": "smoke", "run_key": "k1", "time": 1000}
    spool.append({**base, "op": "metrics", "values": {"miou": 1.0}, "step": 0})
    spool.append({**base, "op": "end", "status": "FINISHED"})
    spool.release()
    with monkeypatch.context() as broken:
        broken.setattr(client(), "set_terminated", gone)
        with pytest.raises(ConnectionError):
            replay()
    assert spool.path.exists()
    assert replay() == 2
    assert len(client().get_metric_history(runs()[0].info.run_id, "miou")) == 1
    assert not spool.path.exists()


def test_what_mlflow_refuses_is_a_warning_and_not_the_end_of_the_night(thermofuse_home, mlflow_uri, caplog):
    with night_run("smoke", "k1", {}) as run:
        run.metrics({"bad name!?": 1.0})
        run.metrics({"good": 1.0})
    assert runs()[0].data.metrics == {"good": 1.0}
    assert "refused the metrics" in caplog.text


def test_a_spool_that_is_being_written_is_left_alone(tmp_path):
    writing = Spool(tmp_path / "k.jsonl")
    writing.append({"op": "tags"})
    assert list(Spool(writing.path).drain()) == []
    writing.release()
    with writing.path.open("a") as file:
        file.write('{"op": "torn')
    assert list(Spool(writing.path).drain()) == [{"op": "tags"}]
    assert not writing.path.exists()


def test_long_values_are_cut_to_what_mlflow_takes(thermofuse_home, mlflow_uri):
    with night_run("smoke", "k1", {"many": "x" * 9000, **{f"p{i}": i for i in range(150)}}, {"long": "y" * 9000}):
        pass
    (run,) = runs()
    assert len(run.data.params) == 151
    assert len(run.data.params["many"]) == 6000
    assert len(run.data.tags["long"]) == 8000


def test_flat_joins_names_by_dots():
    assert flat({"a": Settings(), "empty": {}}) == {
        "a.name": "toy", "a.data.fold": "None", "a.data.folds": "(0, 1)", "empty": "{}",
    }  # fmt: skip


def test_git_sha_is_that_of_the_checkout_and_of_no_other(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(["git", *who, "-C", tmp_path, *arguments], check=True, capture_output=True, text=True)

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a"), git("commit", "-qm", "a")
    sha = git("rev-parse", "HEAD").stdout.strip()
    assert git_sha(tmp_path.resolve()) == sha
    (tmp_path / "a").write_text("2")
    assert git_sha(tmp_path.resolve()) == f"{sha}-dirty"
    (tmp_path / "inside").mkdir()
    assert git_sha((tmp_path / "inside").resolve()) == "unknown", "packages installed inside some other checkout"


def test_lock_digest_changes_with_what_is_installed(monkeypatch):
    before = lock_digest()
    assert before == lock_digest()
    found = list(tracking.distributions())
    rest = [each for each in found if each.name != found[0].name]  # one may be found twice: Ray adds to the path
    monkeypatch.setattr(tracking, "distributions", lambda: rest)
    assert lock_digest() != before
