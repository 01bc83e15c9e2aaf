"""A stage is a plain call outside a flow, a task run inside one, and a line in the ledger either way."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tasks.stage import ledger, note, reset_ledger, stage
from tasks.store import Ref, Store


@stage("measure")
def measure(store: Store, digest: str, value: int = 2) -> Ref:
    """Commits a number."""
    note(quarantined=1, shards=2, peak_rss_mb=5e6)
    note(shards=1, peak_rss_mb=4e6)
    return store.find("numbers", digest) or store.draft("numbers", digest).commit(None, {}, count=value)


@stage("break")
def fail() -> None:
    raise ValueError("broken")


@pytest.fixture(autouse=True)
def empty_ledger():
    reset_ledger()
    yield
    reset_ledger()


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def test_a_plain_call_is_recorded(store):
    ref = measure(store, "aa", value=7)
    (report,) = ledger()
    assert ref.count == report.count == 7
    assert (report.name, report.quarantined, report.shards, report.shards_reused) == ("measure", 1, 3, 0)
    assert report.seconds >= 0
    assert report.peak_rss_mb == 5e6


def test_a_stage_is_reused_when_it_committed_nothing(store):
    measure(store, "aa")
    measure(store, "aa")
    measure(store, "bb")
    assert [report.reused for report in ledger()] == [False, True, False]


def test_a_stage_that_found_one_and_made_another_is_not_reused(store):
    measure(store, "aa")
    stage("both")(lambda: [measure.function(store, digest) for digest in ("aa", "bb")])()
    assert [report.reused for report in ledger()] == [False, False]


def test_a_stage_that_has_no_output_is_not_reused():
    stage("talk")(lambda: "words")()
    assert [(report.reused, report.count) for report in ledger()] == [(False, 0)]


def test_a_stage_that_fails_is_not_in_the_ledger():
    with pytest.raises(ValueError, match="broken"):
        fail()
    assert ledger() == []


def test_facts_stay_with_their_stage(store):
    @stage("outer")
    def outer():
        note(quarantined=10)
        measure(store, "aa")
        note(quarantined=1)

    outer()
    note(quarantined=100)
    assert [(report.name, report.quarantined) for report in ledger()] == [("measure", 1), ("outer", 11)]


def test_a_stage_keeps_its_name_and_text():
    assert measure.__name__ == "measure"
    assert measure.__doc__ == "Commits a number."
    assert measure.__wrapped__.__defaults__ == (2,)


def test_importing_a_stage_imports_no_engine():
    engines = "{'ray', 'prefect', 'mlflow', 'pandas', 'torch', 'boto3'}"
    code = f"import sys, tasks.fanout, tasks.lease, tasks.stage; print(*{engines} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "\n"


def test_inside_a_flow_it_is_a_task_run(prefect_server, store):
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.context import get_run_context

    @flow
    def night():
        ref = measure(store, "aa", value=3)
        again = measure(store, "aa", value=3)
        return ref, again, get_run_context().flow_run.id

    ref, again, run = night()
    assert ref == again == Ref(f"{store.root}/numbers/aa", "numbers", "aa", 3)
    assert [report.reused for report in ledger()] == [False, True]
    with get_client(sync_client=True) as client:
        found = client.read_task_runs()
    assert [task.name for task in found if task.flow_run_id == run] == ["measure", "measure"]
