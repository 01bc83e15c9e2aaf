"""Fan-out when processes, nodes and disks go away. Each driver is a process of its own that can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.errors import StageFailed
from tasks import places
from tasks.fanout import Compute, fan_out
from tasks.store import Store

pytestmark = pytest.mark.chaos

DRIVER = """
import os, sys, threading, time
from pathlib import Path
from tasks import places
places.prepare_environment()
from tasks.fanout import Compute, ensure_ray, fan_out

class Slow:
    def __init__(self, settings, inputs):
        self.marks = Path(settings["marks"])
    def __call__(self, shard, draft):
        for row in shard:
            with open(self.marks / row["id"], "a") as file:
                file.write("x")
            time.sleep(1)
            draft.write(row["id"], b"done")
        return shard

def night(marks, count):
    rows = [{"id": f"row{i:02d}"} for i in range(count)]
    compute = Compute(actors=2, shard_size=1)
    assert fan_out(Slow, rows, {"marks": marks}, compute, kind="slow", inputs=[], code=[]).count == count
"""
NIGHT = DRIVER + "night(sys.argv[1], 8)\n"
NODES = (
    DRIVER
    + """
from ray.cluster_utils import Cluster
import ray

def lose_a_node():
    while len(list(Path(sys.argv[1]).iterdir())) < 4:
        time.sleep(0.1)
    cluster.remove_node(second, allow_graceful=False)
    time.sleep(5)
    cluster.add_node(num_cpus=1)

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000})
try:
    first, second = (cluster.add_node(num_cpus=1, object_store_memory=100_000_000) for _ in range(2))
    ray.init(address=cluster.address, log_to_driver=False, logging_level="WARNING")
    thread = threading.Thread(target=lose_a_node)
    thread.start()
    night(sys.argv[1], 16)
    thread.join()
    ray.shutdown()
finally:
    cluster.shutdown()
"""
)


@pytest.fixture
def marks(tmp_path):
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


@pytest.fixture
def start(thermofuse_home, tmp_path):
    """Starts drivers in process groups of their own, without this session's Ray settings; kills what is left."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    drivers = []

    def begin(script: str, marks: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", script, str(marks)]
        with open(tmp_path / f"driver{len(drivers)}.txt", "w") as log:
            driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        drivers.append(driver)
        return driver

    yield begin
    for driver in drivers:
        driver.kill()
        driver.wait()


def calls(marks: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in marks.iterdir()}


def wait_for(condition, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def receipts(store: Path) -> int:
    return len(list(store.glob("slow/*/shards/*.json")))


def test_a_driver_that_was_killed_goes_on_where_it_stopped(start, marks, tmp_path):
    driver = start(NIGHT, marks)
    wait_for(lambda: receipts(tmp_path / "store") >= 3)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(3)  # its workers notice
    done, before = receipts(tmp_path / "store"), calls(marks)
    assert done < 8
    again = start(NIGHT, marks)
    assert again.wait(timeout=400) == 0
    after = calls(marks)
    assert len(after) == 8
    assert sum(after.values()) == sum(before.values()) + 8 - done


def test_ctrl_c_lets_the_shards_in_flight_finish(start, marks, tmp_path):
    """The signal goes to the whole group, as it does from a terminal."""
    driver = start(NIGHT, marks)
    wait_for(lambda: len(calls(marks)) >= 2)
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.wait(timeout=400) != 0
    assert "Letting the shards in flight finish" in (tmp_path / "driver0.txt").read_text()
    assert receipts(tmp_path / "store") == len(calls(marks)) < 8


def test_a_lost_node_costs_only_what_it_was_doing(start, marks):
    driver = start(NODES, marks)
    assert driver.wait(timeout=400) == 0
    done = calls(marks)
    assert len(done) == 16
    assert sum(done.values()) <= 17


class Heavy:
    """A megabyte per row."""

    def __init__(self, settings: dict, inputs: list[Path]):
        self.marks = Path(settings["marks"])

    def __call__(self, shard: list[dict], draft) -> list[dict]:
        for row in shard:
            with open(self.marks / row["id"], "a") as file:
                file.write("x")
            draft.write(f"images/{row['id']}", bytes(1_000_000))
        return shard


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting a small file system takes rights that this user does not have")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_stops_the_stage_and_keeps_what_is_done(
    ray_local, thermofuse_home, marks, small_disk, monkeypatch
):
    monkeypatch.setenv("THERMOFUSE_STORE", str(small_disk))
    rows = [{"id": f"row{i}"} for i in range(8)]

    def run():
        compute = Compute(actors=1, shard_size=1)
        return fan_out(Heavy, rows, {"marks": str(marks)}, compute, kind="heavy", inputs=[], code=[])

    with pytest.raises(StageFailed, match="disk full"):
        run()
    assert Store(str(small_disk)).blobs.names(".tmp") == []
    assert 4 <= len(calls(marks)) < 8
    subprocess.run(["mount", "-o", "remount,size=60m", small_disk], check=True)
    ref = run()
    assert ref.count == 8
    assert sorted(calls(marks).values()) == [1] * 7 + [2]
    assert places.store().find("heavy", ref.digest) == ref
