"""Fan-out over real Ray actors: the same bytes at any width, what is done stays done, who is to blame for a loss."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from models.errors import BadSample, LeaseHeld, StageFailed, UsageError
from tasks import fanout, places
from tasks.fanout import Compute, _start_ray, ensure_ray, fan_out
from tasks.stage import ledger, reset_ledger, stage


class Square:
    """Writes the square of a number, and leaves one `x` per call in a file of the folder named by the settings."""

    def __init__(self, settings: dict, inputs: list[Path]):
        self.marks, self.inputs = Path(settings["marks"]), inputs

    def __call__(self, shard: list[dict], draft) -> list[dict]:
        for row in shard:
            self.mark(row["id"])
            self.act(row)
            draft.write(f"images/{row['id']}.txt", str(row["value"] ** 2).encode())
        return [self.result(row) for row in reversed(shard)]

    def mark(self, name: str) -> None:
        with open(self.marks / name, "a") as file:
            file.write("x")

    def act(self, row: dict) -> None:
        """What a row does to its worker, by what its id begins with."""
        how = row["id"].split("_")[0]
        if how == "raise":
            raise ValueError(f"no square of {row['id']}\nat all")
        if how == "bad":
            raise BadSample("not a picture")
        if how == "full" and not (self.marks / "room").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        if how == "denied":
            raise PermissionError(errno.EACCES, "Permission denied", "a-picture.png")
        if how == "usage":
            raise UsageError("choose another one")
        if how == "exit" or (how == "exitonce" and self.first(row["id"])):
            os._exit(9)
        if how == "hangonce" and self.first(row["id"]):
            time.sleep(600)

    def first(self, name: str) -> bool:
        return (self.marks / name).stat().st_size == 1

    def result(self, row: dict) -> dict:
        if row["id"].startswith("error"):
            return {"id": row["id"], "error": "an unusable row"}
        return {"id": row["id"], "square": row["value"] ** 2}


class Adding(Square):
    """Reads what it adds from its input, once."""

    def __init__(self, settings: dict, inputs: list[Path]):
        super().__init__(settings, inputs)
        self.mark("constructed")
        self.added = int((inputs[0] / "added.txt").read_text())

    def result(self, row: dict) -> dict:
        names = {"home": "THERMOFUSE_HOME", "threads": "OMP_NUM_THREADS", "gpus": "CUDA_VISIBLE_DEVICES",
                 "spin": "GOMP_SPINCOUNT"}
        found = {name: os.environ.get(variable) for name, variable in names.items()}
        return {"id": row["id"], "sum": row["value"] + self.added, **found}


class Broken(Square):
    def __init__(self, settings: dict, inputs: list[Path]):
        raise RuntimeError("no weights here")


class Forgetful(Square):
    def result(self, row: dict) -> dict:
        return {"id": "another"}


def rows_of(*names: str) -> list[dict]:
    return [{"id": name, "value": value} for value, name in enumerate(names)]


def run(rows, marks, worker=Square, inputs=(), **compute):
    marks.mkdir(exist_ok=True)
    compute = Compute(**{"actors": 1, "max_quarantined": 1.0, **compute})
    return fan_out(worker, rows, {"marks": str(marks)}, compute, kind="squares", inputs=inputs, code=[])


def calls(marks: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in marks.iterdir()}


def quarantine(ref) -> dict[str, str]:
    frame = places.store().rows(ref, "quarantine.parquet")
    return dict(zip(frame["id"], frame["error"], strict=True))


def contents(folder: Path) -> dict[str, str]:
    """Every file that a manifest lists, and the manifest."""
    files = (path for path in folder.rglob("*") if path.is_file() and "shards" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Inline:
    """Stands in for the dispatcher: the shards one after the other in this process, where none of them may fail."""

    def __init__(self, job, shards, compute, environment):
        self.job, self.shards = job, shards

    def outcomes(self):
        worker = self.job.start_worker()
        for shard in self.shards:
            yield shard, self.job.run_shard(worker, shard.rows)


@pytest.fixture
def inline(thermofuse_home, monkeypatch):
    monkeypatch.setattr(fanout, "ensure_ray", lambda compute: None)
    monkeypatch.setattr("tasks.dispatch.Dispatcher", Inline)


@pytest.fixture
def actors(ray_local, thermofuse_home):
    """Real ones."""


@pytest.fixture
def marks(tmp_path):
    return tmp_path / "marks"


# ---- the output


def test_rows_come_back_in_the_order_they_were_given(inline, marks, thermofuse_home):
    ref = run(rows_of("c", "a", "b", "e", "d"), marks, shard_size=2)
    frame = places.store().rows(ref)
    assert ref.count == 5
    assert list(frame["id"]) == ["c", "a", "b", "e", "d"]
    assert list(frame["square"]) == [0, 1, 4, 9, 16]
    assert quarantine(ref) == {}
    assert (places.store().local(ref) / "images/d.txt").read_text() == "16"


@pytest.mark.parametrize("rows", [[], ["error_1"]])
def test_no_good_row_makes_an_empty_output(inline, marks, rows):
    ref = run(rows_of(*rows), marks)
    assert ref.count == 0 and list(places.store().rows(ref).columns) == ["id"]


def test_ids_are_unique(inline, marks):
    with pytest.raises(UsageError, match="same id"):
        run(rows_of("a", "b", "a"), marks)


def test_no_byte_depends_on_actors_or_shard_size(actors, marks, tmp_path, monkeypatch):
    """With a row of each kind of trouble, one worker for all at once and three workers, a row at a time."""
    found = []
    for name, width in {"one": {"actors": 1, "shard_size": 9}, "three": {"actors": 3, "shard_size": 1}}.items():
        monkeypatch.setenv("THERMOFUSE_STORE", str(tmp_path / name))
        ref = run(rows_of("g", "f", "error_1", "exitonce_1", "d", "raise_1", "b"), marks, **width)
        found.append(contents(places.store().local(ref)))
    assert found[0] == found[1]


def test_workers_get_their_inputs_once_and_their_environment(actors, marks, thermofuse_home, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "999")
    draft = places.store().draft("numbers", "aa")
    draft.write("added.txt", b"100")
    given = draft.commit(None, {})
    ref = run(rows_of(*"abcdef"), marks, Adding, [given], shard_size=1, threads_per_worker=3)
    frame = places.store().rows(ref)
    assert list(frame["sum"]) == [100, 101, 102, 103, 104, 105]
    assert set(frame["home"]) == {str(thermofuse_home)}
    assert set(frame["threads"]) == {"3"}
    assert set(frame["gpus"]) == {""}
    assert set(frame["spin"]) == {"999"}
    assert calls(marks)["constructed"] == 1


def test_a_bucket_works_like_a_folder(actors, s3, marks, monkeypatch):
    monkeypatch.setenv("THERMOFUSE_STORE", f"{s3}/night")
    ref = run(rows_of("a", "b", "c"), marks, shard_size=2)
    assert list(places.store().rows(ref)["square"]) == [0, 1, 4]
    assert (places.store().local(ref) / "images/c.txt").read_text() == "4"
    assert len(places.store().blobs.names(f"squares/{ref.digest}/shards")) == 2


# ---- what is done stays done


def test_a_finished_output_starts_no_ray(inline, marks, monkeypatch):
    ref = run(rows_of("a", "b"), marks)
    monkeypatch.setattr(fanout, "ensure_ray", _never)
    assert run(rows_of("a", "b"), marks, shard_size=1) == ref
    assert calls(marks) == {"a": 1, "b": 1}


def test_each_part_of_the_question_makes_another_output(inline, tmp_path):
    digests = set()
    for rows, number, extra in [("ab", 1, None), ("ba", 1, None), ("ab", 2, None), ("ab", 1, {"seen": 1})]:
        settings = {"marks": str(tmp_path), "number": number}
        options = {"kind": "squares", "inputs": [], "code": [], "extra": extra}
        digests.add(fan_out(Square, rows_of(*rows), settings, Compute(), **options).digest)
    assert len(digests) == 4


def test_shards_that_are_done_are_not_done_again(inline, marks):
    """The second of three shards stops the stage; the next run does what is left, however it cuts it."""
    names = ["a", "b", "c", "full_1", "d", "e"]
    with pytest.raises(OSError, match="No space"):
        run(rows_of(*names), marks, shard_size=2)
    assert calls(marks) == {"a": 1, "b": 1, "c": 1, "full_1": 1}
    (marks / "room").touch()
    ref = run(rows_of(*names), marks, shard_size=3)
    assert calls(marks) == {"a": 1, "b": 1, "c": 2, "full_1": 2, "d": 1, "e": 1, "room": 0}
    assert list(places.store().rows(ref)["square"]) == [0, 1, 4, 9, 16, 25]


def test_a_torn_shard_is_not_trusted(inline, marks):
    """Files of a shard that lie there without its receipt are written anew."""
    question = {"settings": {"marks": str(marks)}, "rows": rows_of("a"), "extra": None}
    digest = fanout.digest_of("squares", [], question, [])
    places.store().draft("squares", digest).write("images/a.txt", b"half")
    ref = run(rows_of("a"), marks)
    assert ref.digest == digest
    assert (places.store().local(ref) / "images/a.txt").read_text() == "0"


def test_another_run_at_the_same_time_shares_its_shards(inline, marks):
    """A worker looks for a receipt before it starts a shard."""
    marks.mkdir()
    job = fanout.Job(Square, {"marks": str(marks)}, (), places.store(), "squares", "aa")
    first, second = (job.run_shard(job.start_worker(), rows_of("a", "b")) for _ in range(2))
    assert calls(marks) == {"a": 1, "b": 1}
    assert first["rows"] == second["rows"] and first["files"] == second["files"]


# ---- who is to blame


def test_a_row_with_an_error_is_quarantined_and_its_shard_commits(inline, marks):
    ref = run(rows_of("a", "error_1", "b"), marks)
    assert quarantine(ref) == {"error_1": "an unusable row"}
    assert list(places.store().rows(ref)["id"]) == ["a", "b"]
    assert ref.count == 2
    assert places.store().manifest(ref)["meta"]["quarantined"] == 1


def test_too_many_bad_rows_fail_the_stage(inline, marks):
    with pytest.raises(StageFailed, match=r"1 of 3 rows are unusable, more than 20%; the first is error_1: an unus"):
        run(rows_of("a", "error_1", "b"), marks, max_quarantined=0.2)
    assert run(rows_of("a", "error_1", "b"), marks, max_quarantined=0.4).count == 2
    assert calls(marks) == {"a": 1, "error_1": 1, "b": 1}


def test_a_worker_that_returns_other_rows_is_an_error(inline, marks):
    with pytest.raises(ValueError, match="returned rows"):
        run(rows_of("a"), marks, Forgetful)


def test_an_exception_has_three_attempts_and_hits_no_neighbour(actors, marks):
    ref = run(rows_of("a", "raise_1", "bad_1", "b", "denied_1"), marks, shard_size=2)
    assert quarantine(ref) == {
        "raise_1": "at all",
        "bad_1": "not a picture",
        "denied_1": "PermissionError: [Errno 13] Permission denied: 'a-picture.png'",
    }
    assert calls(marks) == {"a": 2, "raise_1": 3, "bad_1": 3, "b": 1, "denied_1": 3}


def test_a_worker_that_dies_is_no_attempt(actors, marks):
    ref = run(rows_of("exitonce_1", "a"), marks, shard_size=1)
    assert quarantine(ref) == {}
    assert calls(marks) == {"exitonce_1": 2, "a": 1}


def test_a_row_that_kills_three_workers_is_given_up(actors, marks):
    ref = run(rows_of("a", "exit_1"), marks, shard_size=2)
    assert list(quarantine(ref)) == ["exit_1"]
    assert "crashed its process" in quarantine(ref)["exit_1"]
    assert calls(marks) == {"a": 2, "exit_1": 3}


def test_a_shard_past_its_deadline_is_started_again(actors, marks):
    ref = run(rows_of("hangonce_1"), marks, shard_deadline_seconds=3)
    assert quarantine(ref) == {}
    assert calls(marks)["hangonce_1"] == 2


def test_a_full_disk_is_not_tried_again(actors, marks):
    with pytest.raises(StageFailed, match="disk full"):
        run(rows_of("full_1"), marks)
    assert calls(marks) == {"full_1": 1}


def test_a_usage_error_stops_at_once(actors, marks):
    with pytest.raises(UsageError, match="choose another one"):
        run(rows_of("usage_1"), marks)
    assert calls(marks) == {"usage_1": 1}


def test_a_lost_lease_stops_the_work(actors, marks, monkeypatch):
    monkeypatch.setattr("tasks.dispatch.check_leases", _lost)
    with pytest.raises(LeaseHeld, match="lost"):
        run(rows_of("a"), marks)
    assert calls(marks) == {}


def test_a_worker_that_cannot_start_fails_the_stage(actors, marks):
    with pytest.raises(StageFailed, match="does not start: RuntimeError: no weights here"):
        run(rows_of("a"), marks, Broken)


def test_a_worker_too_big_for_the_machine_is_a_usage_error(actors, marks):
    with pytest.raises(UsageError, match="1000 GPUs"):
        run(rows_of("a"), marks, gpus_per_actor=1000.0)


def test_the_ledger_tells_what_happened(inline, marks):
    reset_ledger()
    work = stage("square")(run)
    names = ["a", "b", "c", "full_1", "error_1"]
    with pytest.raises(OSError, match="No space"):
        work(rows_of(*names), marks, shard_size=2)
    (marks / "room").touch()
    work(rows_of(*names), marks, shard_size=2)
    work(rows_of(*names), marks, shard_size=2)
    first, second = ledger()
    reset_ledger()
    assert (first.reused, first.count, first.quarantined, first.shards, first.shards_reused) == (False, 4, 1, 3, 1)
    assert (second.reused, second.count) == (True, 4)


def _lost():
    raise LeaseHeld("the lease was lost")


def _never(*_):
    raise AssertionError("Ray was started although there is nothing to do")


# ---- starting Ray


@pytest.fixture
def sigterm():
    """A handler as Prefect's is inside a flow: what it raises is lost where the driver waits for Ray."""

    def terminate(*_):
        raise RuntimeError("terminated")

    before = signal.signal(signal.SIGTERM, terminate)
    yield terminate
    signal.signal(signal.SIGTERM, before)


def test_sigterm_ends_the_waiting_for_ray(ray_local, sigterm):
    @ray_local.remote
    def slow():
        time.sleep(15)

    ensure_ray(Compute())
    running = slow.remote()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(KeyboardInterrupt):
        ray_local.get(running)
    ray_local.cancel(running, force=True)


def test_a_start_that_fails_is_tried_once_more_from_a_clean_state(monkeypatch):
    events = []

    def fails(**_):
        events.append("init")
        raise RuntimeError("no node")

    monkeypatch.setattr("ray.init", fails)
    monkeypatch.setattr("ray.shutdown", lambda: events.append("shutdown"))
    with pytest.raises(StageFailed, match=r"Ray does not start .no node.; look at RAY_ADDRESS"):
        _start_ray({})
    assert events == ["init", "shutdown"] * 2
