"""Digests stand for questions, manifests for answers; nothing is true before its manifest."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from models.errors import StageFailed, UsageError
from tasks.store import Ref, Store, canonical, digest_of, read_table, table_bytes


@dataclass(frozen=True)
class Part:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Settings:
    name: str = "toy"
    part: Part = Part()
    root: Path | None = None


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path, thermofuse_home):
    if request.param == "folder":
        return Store(str(tmp_path / "store"))
    return Store(f"{request.getfixturevalue('s3')}/store")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module `noted` whose import would fail, so that only its text can be read."""
    path = tmp_path / "noted.py"
    path.write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


FRAME = pd.DataFrame({"id": ["b", "a"], "label": ["x.png", None], "size": [3, 4], "supports": [["p", "q"], []]})


# ---- digests


def test_a_digest_never_changes():
    ref = Ref("/anywhere/frames/0011223344556677", "frames", "0011223344556677", 3)
    assert digest_of("synthetic", [ref, "other"], Settings()) == "64d7734f0de843d8"


def test_equal_questions_have_equal_digests():
    as_dict = {"root": None, "part": {"sizes": [1, 2], "rate": 0.5}, "name": "toy"}
    assert digest_of("k", [], Settings()) == digest_of("k", [], as_dict)
    assert digest_of("k", [], {"a": np.float64(0.25)}) == digest_of("k", [], {"a": 0.25})
    assert digest_of("k", [], {"s": {"b", "a"}}) == digest_of("k", [], {"s": ["a", "b"]})
    assert digest_of("k", [Ref("here", "f", "77", 1)], 0) == digest_of("k", [Ref("there", "f", "77", 2)], 0)


def test_each_part_of_the_question_counts(module):
    questions = [
        ("k", [], Settings(), []),
        ("other", [], Settings(), []),
        ("k", ["11"], Settings(), []),
        ("k", ["11", "22"], Settings(), []),
        ("k", ["22", "11"], Settings(), []),
        ("k", [], Settings(part=Part(rate=0.25)), []),
        ("k", [], Settings(root=Path("/data")), []),
        ("k", [], Settings(), ["noted"]),
    ]
    assert len({digest_of(*question) for question in questions}) == len(questions)


def test_the_source_text_counts_and_is_not_run(module):
    before = digest_of("k", [], {}, ["noted"])
    assert digest_of("k", [], {}, ["noted", "noted"]) == before
    module.write_bytes(module.read_bytes().replace(b"\n", b"\r\n"))
    assert digest_of("k", [], {}, ["noted"]) == before
    module.write_text("raise RuntimeError('imported, and changed')\n")
    assert digest_of("k", [], {}, ["noted"]) != before
    assert "noted" not in sys.modules


def test_words_of_explanation_do_not_count(module):
    def digest(text):
        module.write_text(text)
        return digest_of("k", [], {}, ["noted"])

    code = "def twice(x):\n    {}return x * 2\n"
    plain = digest(code.format('"""One."""\n    '))
    assert digest("# why\n\n\n" + code.format('"""Another."""\n    ')) == plain
    assert digest(code.format('"""One."""\n    ').replace("2", "3")) != plain
    assert digest(code.format('"".join("a")\n    ')) != plain


def test_a_package_stands_for_its_modules(tmp_path, monkeypatch):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/__init__.py").write_text("")
    (tmp_path / "bundle/one.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = digest_of("k", [], {}, ["bundle"])
    (tmp_path / "bundle/one.py").write_text("x = 2\n")
    assert digest_of("k", [], {}, ["bundle"]) != before


@pytest.mark.parametrize("name", ["no_such_module_here", "models.no_such_module", "no_such_package.module"])
def test_a_module_that_is_not_there_is_named(name):
    with pytest.raises(UsageError, match=name):
        digest_of("k", [], {}, [name])


def test_what_has_no_digest_is_named():
    with pytest.raises(UsageError, match="object"):
        canonical({"a": object()})
    with pytest.raises(ValueError, match="JSON"):
        digest_of("k", [], {"rate": float("nan")})


# ---- drafts and manifests


def test_an_output_is_found_once_it_is_committed(store):
    draft = store.draft("frames", "aa")
    draft.write("images/a.png", b"picture")
    assert store.find("frames", "aa") is None
    ref = draft.commit(FRAME, {"classes": ("car", "person")})
    assert ref == Ref(f"{store.root}/frames/aa", "frames", "aa", 2)
    assert store.find("frames", "aa") == ref
    assert store.find("frames", "bb") is None


def test_a_manifest_lists_every_file(store):
    draft = store.draft("frames", "aa")
    draft.write("images/a.png", b"picture")
    draft.create("shards/one.json", b"{}")
    manifest = store.manifest(draft.commit(FRAME, {"classes": ("car",)}))
    assert manifest["files"] == {
        "images/a.png": hashlib.sha256(b"picture").hexdigest(),
        "rows.parquet": hashlib.sha256(table_bytes(FRAME)).hexdigest(),
    }
    assert manifest["meta"] == {"classes": ["car"]}
    assert (manifest["kind"], manifest["digest"], manifest["count"]) == ("frames", "aa", 2)


def test_rows_come_back_as_they_went(store):
    rows = store.rows(store.draft("frames", "aa").commit(FRAME, {}))
    assert list(rows["id"]) == ["b", "a"]
    assert list(rows["label"]) == ["x.png", None]
    assert list(rows["size"]) == [3, 4]
    assert list(rows["supports"][0]) == ["p", "q"]


def test_an_output_without_rows_counts_its_files(store, tmp_path):
    folder = tmp_path / "result"
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "inner/weights").write_bytes(b"w" * 1000)
    draft = store.draft("translators", "aa")
    draft.upload(folder)
    ref = draft.commit(None, {})
    assert ref.count == 2
    assert (store.local(ref) / "inner/weights").read_bytes() == b"w" * 1000


def test_the_loser_of_a_race_adopts_the_winner(store):
    start = threading.Barrier(8)

    def commit(number: int) -> Ref:
        draft = store.draft("scores", "aa")
        start.wait()
        return draft.commit(None, {"number": number}, count=number)

    with ThreadPoolExecutor(8) as pool:
        refs = list(pool.map(commit, range(8)))
    assert len(set(refs)) == 1
    assert store.manifest(refs[0])["meta"]["number"] == refs[0].count


def test_who_comes_second_changes_nothing(store):
    first = store.draft("scores", "aa").commit(FRAME, {})
    second = store.draft("scores", "aa").commit(FRAME[:1], {})
    assert second == first
    assert len(store.rows(second)) == 2


def test_a_draft_writes_inside_its_folder(store):
    for name in ("../other", "/etc/other", "a/../../b", ""):
        with pytest.raises(ValueError, match="not a name"):
            store.draft("frames", "aa").write(name, b"")


def test_a_missing_output_is_told_as_such(store):
    with pytest.raises(UsageError, match="run the stage"):
        store.manifest(Ref(f"{store.root}/frames/aa", "frames", "aa", 1))


def test_the_same_rows_give_the_same_bytes():
    assert table_bytes(FRAME) == table_bytes(FRAME.copy())
    assert read_table(table_bytes(FRAME)).equals(read_table(table_bytes(FRAME.copy())))


def test_a_store_pickles_as_its_root(store):
    store.draft("frames", "aa").commit(FRAME, {})
    assert pickle.loads(pickle.dumps(store)).find("frames", "aa").count == 2


def test_other_places_are_a_usage_error():
    with pytest.raises(UsageError, match="s3://"):
        Store("ftp://there/store").find("frames", "aa")


def test_a_relative_folder_is_pinned_down(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store("here/store").root == str(tmp_path / "here/store")


# ---- the mirror of a bucket


def test_a_mirror_is_made_once(s3, thermofuse_home):
    store = Store(s3)
    draft = store.draft("frames", "aa")
    draft.write("images/a.png", b"picture")
    ref = draft.commit(FRAME, {})
    folder = store.local(ref)
    assert folder.is_relative_to(thermofuse_home / "mirror")
    assert (folder / "images/a.png").read_bytes() == b"picture"
    store.blobs.write("frames/aa/images/a.png", b"changed behind our back")
    assert store.local(ref) == folder
    assert (folder / "images/a.png").read_bytes() == b"picture"


def test_a_damaged_file_never_enters_the_mirror(s3, thermofuse_home):
    store = Store(s3)
    draft = store.draft("frames", "aa")
    draft.write("images/a.png", b"picture")
    ref = draft.commit(None, {})
    store.blobs.write("frames/aa/images/a.png", b"pict")
    with pytest.raises(StageFailed, match="damaged"):
        store.local(ref)
    assert [path for path in (thermofuse_home / "mirror").rglob("*") if path.is_file()] == []


def test_a_torn_manifest_is_not_possible(tmp_path, monkeypatch):
    """A writer that dies in the middle of the manifest leaves an output that is not there."""
    store = Store(str(tmp_path))
    monkeypatch.setattr("os.link", _die)
    with pytest.raises(KeyboardInterrupt):
        store.draft("frames", "aa").commit(FRAME, {})
    assert store.find("frames", "aa") is None
    monkeypatch.undo()
    ref = store.draft("frames", "aa").commit(FRAME, {})
    assert json.loads((store.local(ref) / "manifest.json").read_text())["count"] == 2


def _die(*_):
    raise KeyboardInterrupt
