"""One holder at a time: across processes, after deaths, and when the heart stops."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from models.errors import LeaseHeld, StageFailed
from tasks.lease import check_leases, lease
from tasks.store import Store

HOLD = """
import sys, time
from tasks.lease import lease
from tasks.store import Store
with lease(Store(sys.argv[1]), "night", seconds=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    return Store(str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3"))


def record(store: Store) -> dict:
    return json.loads(store.blobs.read("locks/night.json"))


def rewrite(store: Store, **changes) -> None:
    store.blobs.write("locks/night.json", json.dumps({**record(store), **changes}).encode())


def wait_for(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_the_second_one_is_told_who_holds_it(store):
    with lease(store, "night"), pytest.raises(LeaseHeld) as refused, lease(store, "night"):
        pass
    for word in ("night", socket.gethostname(), str(os.getpid()), record(store)["since"]):
        assert word in str(refused.value)


def test_other_names_do_not_mind(store):
    with lease(store, "night"), lease(store, "day"):
        assert record(store)["name"] == "night"


def test_it_is_free_again_after_the_block(store):
    with pytest.raises(StageFailed), lease(store, "night"):
        raise StageFailed("something went wrong")
    with lease(store, "night") as held:
        assert record(store)["owner"] == held.owner


def test_of_eight_at_once_one_gets_it(store):
    start, end = threading.Barrier(8), threading.Barrier(8)

    def attempt(_) -> bool:
        start.wait()
        try:
            with lease(store, "night"):
                end.wait()
                return True
        except LeaseHeld:
            end.wait()
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1


def test_the_heart_keeps_it(store):
    with lease(store, "night", seconds=3):
        first = record(store)["expires"]
        wait_for(lambda: time.time() > first)
        with pytest.raises(LeaseHeld), lease(store, "night"):
            pass
        check_leases()


def test_an_expired_lease_is_taken_over(store):
    with lease(store, "night"):
        rewrite(store, expires=time.time() - 1, host="another-machine")
        with lease(store, "night") as second:
            assert record(store)["owner"] == second.owner


def test_a_live_lease_of_another_machine_is_respected(store):
    with lease(store, "night"):
        rewrite(store, host="another-machine", pid=2**22 + 1)
        with pytest.raises(LeaseHeld, match="another-machine"), lease(store, "night"):
            pass


def test_a_lease_that_was_lost_says_so_and_is_left_alone(store):
    with lease(store, "night", seconds=0.6) as held:
        rewrite(store, owner="somebody else", expires=time.time() + 60)
        wait_for(lambda: held.lost)
        with pytest.raises(LeaseHeld, match="lost"):
            check_leases()
    assert record(store)["owner"] == "somebody else"
    check_leases()


def test_a_store_that_is_away_loses_the_lease_at_its_end(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    with lease(store, "night", seconds=2) as held:
        monkeypatch.setattr(store.blobs, "swap", _away)
        time.sleep(0.8)
        assert not held.lost
        wait_for(lambda: held.lost)


def test_a_store_that_is_away_at_the_end_hides_no_error(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    with pytest.raises(StageFailed, match="the real reason"), lease(store, "night"):
        monkeypatch.setattr(store.blobs, "swap", _away)
        raise StageFailed("the real reason")


def test_two_processes_and_the_death_of_one(tmp_path):
    store = Store(str(tmp_path))
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "3600"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LeaseHeld, match=str(holder.pid)), lease(store, "night"):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with lease(store, "night"):
        assert record(store)["pid"] == os.getpid()


def _away(*_):
    raise StageFailed("the store cannot be reached")
