"""Files are known by their bytes, wherever they lie and whenever they were written, and read once while unchanged."""

import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest

from models.errors import UsageError
from tasks import contents as module
from tasks.contents import contents

AN_HOUR = 3600 * 10**9


@pytest.fixture
def reads(thermofuse_home, monkeypatch):
    """The names of the files that are read, in their order."""
    told, hashed = [], module._hashed
    monkeypatch.setattr(module, "_hashed", lambda path: told.append(path.name) or hashed(path))
    return told


def written(path, data, age=AN_HOUR):
    """A file of those bytes that was last changed `age` nanoseconds ago."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(time.time_ns() - age,) * 2)
    return path


def test_a_file_is_its_bytes(tmp_path, reads):
    here, there = written(tmp_path / "a" / "x.png", b"frame"), written(tmp_path / "b" / "y.png", b"frame", 2 * AN_HOUR)
    other, gone = written(tmp_path / "a" / "z.png", b"other"), tmp_path / "a" / "gone.png"
    found = contents([here, there, other, gone, here, tmp_path])
    assert found == {here: sha256(b"frame").hexdigest(), there: found[here], other: sha256(b"other").hexdigest()}
    assert sorted(reads) == ["x.png", "y.png", "z.png"]


def test_an_unchanged_file_is_not_read_again(tmp_path, reads):
    files = [written(tmp_path / name, name.encode()) for name in ("a", "b", "c")]
    first = contents(files)
    assert contents(files) == first and len(reads) == 3
    written(files[1], b"B", age=2 * AN_HOUR)
    second = contents(files)
    assert reads[3:] == ["b"] and second[files[1]] == sha256(b"B").hexdigest() and second[files[0]] == first[files[0]]


def test_a_file_with_a_new_time_is_read_and_is_what_it_was(tmp_path, reads):
    file = written(tmp_path / "a", b"frame")
    first = contents([file])
    os.utime(file, ns=(1, 1))
    assert contents([file]) == first and len(reads) == 2


def test_a_file_that_may_still_change_unseen_is_not_remembered(tmp_path, reads):
    """Written twice within the clock's grain, it has the same size and time both times."""
    file = written(tmp_path / "a", b"frame", age=0)
    stamp = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    first = contents([file])
    file.write_bytes(b"emarf")
    os.utime(file, ns=stamp)
    assert contents([file]) != first


def test_a_relative_path_is_remembered_as_the_file_that_it_is(tmp_path, reads, monkeypatch):
    for name, data in (("one", b"1"), ("two", b"2")):
        written(tmp_path / name / "x", data)
    found = []
    for name in ("one", "two", "one"):
        monkeypatch.chdir(tmp_path / name)
        found += contents([Path("x")]).values()
    assert found[0] == found[2] != found[1] and len(reads) == 2


def test_several_may_ask_at_once(tmp_path, thermofuse_home):
    files = [written(tmp_path / str(n), str(n).encode()) for n in range(60)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: contents(files[start:] + files[:start]), range(8)))
    assert all(one == found[0] for one in found) and len(set(found[0].values())) == 60


def test_a_file_that_cannot_be_read_is_named(tmp_path, thermofuse_home, monkeypatch):
    file = written(tmp_path / "a.png", b"frame")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError, match=r"a\.png \(Permission denied\)"):
        contents([file])


def test_a_broken_memory_is_named(tmp_path, thermofuse_home):
    file, broken = written(tmp_path / "a.png", b"frame"), thermofuse_home / module.FILE
    written(broken, b"no database, and longer than the header of one" * 9)
    with pytest.raises(UsageError, match=r"contents\.db is broken \(.*\); remove it"):
        contents([file])
    broken.unlink()
    assert contents([file]) == {file: sha256(b"frame").hexdigest()}


def test_a_memory_that_is_held_stays(tmp_path, thermofuse_home, monkeypatch):
    file, connect = written(tmp_path / "a.png", b"frame"), sqlite3.connect
    found = contents([file])
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(path, timeout=0.05))
    with closing(connect(thermofuse_home / module.FILE)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UsageError, match=r"contents\.db \(.*locked\); see that .* holds it, then run again"):
            contents([file])
    assert contents([file]) == found
