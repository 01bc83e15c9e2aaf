"""kill -9 a night, process tree and all, or fill its disk, and run the same command; start two nights at once.

What was committed is reused, and the scores are those of a night that was left alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.chaos

# Small shards, so that there is something to lose and something to keep; how work is cut never changes what comes out.
NIGHT = [sys.executable, "-m", "flows.cli", "run", "smoke", "--json", "--set", "compute.shard_size=2"]
MARK = "THERMOFUSE_TEST_TRIAL"
PATIENCE = 900


class Trial:
    """One home and store, and the commands run in them; every process of a command carries this trial's mark."""

    def __init__(self, folder: Path, command: Sequence[str] = NIGHT):
        self.folder, self.mark, self.command = folder, uuid.uuid4().hex, list(command)
        self.store = folder / "store"
        self.environment = os.environ | {
            "THERMOFUSE_HOME": str(folder / "home"),
            "THERMOFUSE_STORE": str(self.store),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
            "PREFECT_HOME": str(folder / "prefect"),
            MARK: self.mark,
        }
        self.logs = 0

    def start(self) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.logs += 1
        with (self.folder / f"{self.logs}.log").open("w") as log:
            return subprocess.Popen(
                self.command, env=self.environment, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,
            )

    def log(self, number: int | None = None) -> str:
        """The end of what a command wrote to stderr; that of the last one without a number."""
        return (self.folder / f"{number or self.logs}.log").read_text()[-5000:]

    def finish(self, night: subprocess.Popen) -> dict:
        out, _ = night.communicate(timeout=PATIENCE)
        assert night.returncode == 0, self.log()
        return json.loads(out)

    def processes(self) -> list[psutil.Process]:
        """All that carry the mark, those whose parent is gone, too. None of anybody else's."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def kill(self) -> int:
        """SIGKILL, all at once as far as that goes; returns how many there were."""
        killed = 0
        while living := [process for process in self.processes() if process.status() != psutil.STATUS_ZOMBIE]:
            for process in living:
                try:
                    process.kill()
                    killed += 1
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(living, timeout=5)
        return killed

    def kill_when(self, reached: Callable[[], bool], least: int = 1) -> None:
        """Start the command, and kill it with more than `least` processes as soon as `reached` says so."""
        night = self.start()
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert night.poll() is None, f"ended before it could be killed\n{self.log()}"
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        assert self.kill() > least
        night.wait(timeout=30)
        night.stdout.close()

    def shards(self, kind: str) -> list[Path]:
        return list(self.store.glob(f"{kind}/*/shards/*.json"))

    def done(self, kind: str) -> bool:
        return bool(list(self.store.glob(f"{kind}/*/manifest.json")))


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    trial = Trial(tmp_path_factory.mktemp("alone"))
    try:
        return trial.finish(trial.start())
    finally:
        trial.kill()


@pytest.fixture
def trial(tmp_path: Path):
    trial = Trial(tmp_path / "trial")
    yield trial
    trial.kill()


def stages(night: dict) -> dict[str, dict]:
    return {stage["name"]: stage for stage in night["stages"]}


def test_killed_while_synthesising_and_while_training(trial: Trial, left_alone: dict) -> None:
    trial.kill_when(lambda: len(trial.shards("synthetic")) >= 2)
    assert not trial.done("synthetic")
    committed = len(trial.shards("synthetic"))

    night = trial.finish(trial.start())
    again = stages(night)["synthesise"]
    assert committed <= again["shards_reused"] < again["shards"]
    assert night["scores"] == left_alone["scores"]

    # As if the night had not come so far: what was learnt by episodes, and its exam, are wanted again.
    shutil.rmtree(trial.store / "model")
    shutil.rmtree(trial.store / "exam")
    trial.kill_when(lambda: bool(list(trial.store.glob("training/model-*/checkpoint*/*"))))
    assert not trial.done("model")

    night = trial.finish(trial.start())
    assert stages(night)["synthesise"]["reused"] and not stages(night)["train_meta"]["reused"]
    assert night["scores"] == left_alone["scores"]


def test_two_nights_at_once(trial: Trial) -> None:
    nights = [trial.start(), trial.start()]
    for night in nights:
        night.communicate(timeout=PATIENCE)
    codes = [night.returncode for night in nights]
    assert sorted(codes) == [0, 3], [trial.log(1), trial.log(2)]
    holder, refused = nights[codes.index(0)], trial.log(codes.index(3) + 1)
    assert f"pid {holder.pid}" in refused


@pytest.fixture
def small_disk(trial: Trial):
    """The trial's store is a file system of 6 MB, less than the encoder takes."""
    trial.store.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", trial.store]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting a small file system takes rights that this user does not have")
    yield trial.store
    trial.kill()
    subprocess.run(["umount", trial.store], check=True)


def test_a_disk_that_fills_up_stops_the_night_and_the_next_one_goes_on(
    trial: Trial, small_disk: Path, left_alone: dict
) -> None:
    night = trial.start()
    out, _ = night.communicate(timeout=PATIENCE)
    assert (night.returncode, out) == (1, ""), trial.log()
    assert "disk full" in trial.log() and "free some space and run again" in trial.log()
    assert trial.done("frames") and not trial.done("encoder")
    subprocess.run(["mount", "-o", "remount,size=500m", small_disk], check=True)
    night = trial.finish(trial.start())
    assert stages(night)["prepare"]["reused"] and night["scores"] == left_alone["scores"]
