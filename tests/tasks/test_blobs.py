"""The same promises from a folder and from a bucket: whole writes, one winner, compare-and-swap."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from models.errors import StageFailed, UsageError
from tasks.blobs import Folder, write_file, writing
from tasks.bucket import Bucket


@pytest.fixture(params=["folder", "bucket"])
def blobs(request, tmp_path):
    if request.param == "folder":
        return Folder(str(tmp_path / "store"))
    return Bucket(f"{request.getfixturevalue('s3')}/some/prefix")


def test_what_is_written_is_read(blobs):
    blobs.write("a/b.bin", b"one")
    blobs.write("a/b.bin", b"two")
    blobs.write("a/c/d.bin", b"three")
    assert blobs.read("a/b.bin") == b"two"
    assert blobs.names("a") == ["a/b.bin", "a/c/d.bin"]
    assert blobs.read_many(["a/c/d.bin", "a/b.bin"]) == [b"three", b"two"]
    assert blobs.exists("a/b.bin") and not blobs.exists("a")


def test_a_missing_name_is_told_as_such(blobs):
    assert not blobs.exists("nothing")
    assert blobs.names("nothing") == []
    assert blobs.read_many([]) == []
    assert blobs.tagged("nothing") is None
    with pytest.raises(FileNotFoundError):
        blobs.read("nothing")


def test_of_eight_racing_writers_one_wins(blobs):
    start = threading.Barrier(8)

    def write(number: int) -> bool:
        start.wait()
        return bool(blobs.create("manifest.json", b"%d" % number))

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert sum(won) == 1
    assert blobs.read("manifest.json") == b"%d" % won.index(True)


def test_of_eight_racing_swaps_one_wins(blobs):
    tag = blobs.create("lock", b"old")
    start = threading.Barrier(8)

    def swap(number: int) -> bool:
        start.wait()
        return bool(blobs.swap("lock", b"%d" % number, tag))

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(swap, range(8)))
    assert sum(won) == 1
    assert blobs.read("lock") == b"%d" % won.index(True)


def test_swap_follows_its_tags(blobs):
    first = blobs.create("lock", b"one")
    second = blobs.swap("lock", b"two", first)
    assert blobs.tagged("lock") == (b"two", second)
    assert blobs.swap("lock", b"three", first) is None
    assert blobs.swap("lock", b"three", second)


def test_what_others_write_is_seen_at_once(s3):
    ours, theirs = Bucket(s3), Bucket(s3)
    ours.write("shards/one.json", b"{}")
    assert ours.names("shards") == ["shards/one.json"]
    theirs.create("shards/two.json", b"{}")
    assert ours.names("shards") == ["shards/one.json", "shards/two.json"]


def test_a_write_that_breaks_leaves_nothing(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    monkeypatch.setattr(os, "fsync", _raise(OSError(errno.EIO, "broken")))
    for write in (folder.write, folder.create):
        with pytest.raises(OSError, match="broken"):
            write("manifest.json", b"half")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_full_disk_fails_the_stage(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    monkeypatch.setattr(os, "fsync", _raise(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StageFailed, match="disk full"):
        folder.write("x", b"1")


def test_a_file_of_ones_own_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "new" / "out.png"
    write_file(out, b"first")
    assert [path.name for path in out.parent.iterdir()] == ["out.png"] and out.read_bytes() == b"first"
    with pytest.raises(UsageError, match=r"Cannot write .*x \(.+\); name a folder that you own"):
        write_file(out / "x", b"1")
    monkeypatch.setattr(Path, "replace", _raise(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StageFailed, match="disk full"):
        write_file(out, b"second")
    assert [path.name for path in out.parent.iterdir()] == ["out.png"] and out.read_bytes() == b"first"


def test_a_place_that_refuses_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="THERMOFUSE_STORE"):
        Folder(str(tmp_path / "file")).write("x", b"1")
    with pytest.raises(UsageError, match="THERMOFUSE_STORE"), writing("there"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_bucket_that_is_not_there_is_a_usage_error(s3):
    with pytest.raises(UsageError, match="NoSuchBucket"):
        Bucket("s3://no-such-bucket-here").create("x", b"1")


def test_a_server_that_is_away_fails_the_stage(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setattr("tasks.bucket.PATIENCE", {"retries": {"max_attempts": 1}, "connect_timeout": 1})
    with pytest.raises(StageFailed, match="cannot be reached"):
        Bucket(s3).create("x", b"1")


def _raise(error: Exception):
    def broken(*_):
        raise error

    return broken
