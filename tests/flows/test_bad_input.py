"""Whatever is asked wrongly is told in one sentence with the right exit code, and leaves nothing that is trusted later.

The whole command line and the whole flow run; only shards are done in this process, which costs no actors.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from flows.cli import main
from tasks import places, tracking
from tests.flows.conftest import living_in
from tests.models.datasets.miniatures import folder, grey, save
from tests.tasks.inline import without_actors

MODEL = "thermofuse-toy-1shot"
PROGRESS = re.compile(r"\w+: \d+/\d+")


class Said(NamedTuple):
    """An exit code, what stderr held beside the progress, and the kinds of the outputs that were finished."""

    code: int
    lines: list[str]
    made: set[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory, prefect_server):
    """A home, a store and an empty folder of data."""
    root = tmp_path_factory.mktemp("asked")
    with living_in(root), pytest.MonkeyPatch.context() as patch:
        patch.setenv("THERMOFUSE_DATA", str(root / "data"))
        without_actors(patch)
        yield root


def finished(root: Path) -> set[Path]:
    return set((root / "store").glob("*/*/manifest.json"))


@pytest.fixture
def ask(place, capfd):
    def ask(*arguments: str) -> Said:
        before = finished(place)
        capfd.readouterr()
        code = main(list(arguments))
        out, error = capfd.readouterr()
        assert out == ""
        lines = [line for line in error.splitlines() if not PROGRESS.match(line)]
        return Said(code, lines, {path.parent.parent.name for path in finished(place) - before})

    return ask


@pytest.mark.parametrize(("recipe", "setting", "words"), [
    ("smoek", "data.fold=0", r"no recipe 'smoek'; choose one of smoke, demo, .*Did you mean 'smoke'\?"),
    ("smoke", "data.dataset=sodda", r"'sodda'.*toy.*soda"),
    ("smoke", "data.fold=9", r"toy has the folds 0\.\.3; there is no fold 9"),
    ("smoke", "encoder.name=resnet5", r"no encoder 'resnet5'; .*mobilenet_v2"),
    ("smoke", "encoder.weights=nowhere.pth", r"no encoder weights 'nowhere\.pth'.*set encoder\.weights"),
    ("smoke", "episodes.shots=30", r"Class '.+' of toy has \d+ frames .* 30-shot episodes need 31; use fewer shots"),
    ("smoke", "meta.novel_in_train=maybe", r"'maybe'.*ignore"),
])  # fmt: skip
def test_what_does_not_exist_or_fit_is_told_with_code_2(ask, recipe, setting, words):
    code, lines, made = ask("run", recipe, "--set", setting, "--json")
    assert code == 2 and len(lines) == 1 and re.search(words, lines[0]), lines
    assert made <= {"frames", "episodes"}, "nothing but what was finished before the mistake was met"


def test_a_missing_root_says_what_folder_to_make_and_where_the_data_comes_from(ask, place):
    code, lines, made = ask("run", "msrs-1shot")
    assert (code, made) == (2, set()) and len(lines) == 1
    for words in (str(place / "data" / "msrs"), "make that folder", "github.com", "laid out as"):
        assert words in lines[0]


# ---- pictures


@pytest.fixture
def barn(place, tmp_path):
    """The frames of somebody, and the question that reads them; encoder weights are what it lacks next."""
    return folder(tmp_path / "barn")


def about(barn: Path) -> tuple[str, ...]:
    return ("run", "msrs-1shot", "--set", "data.dataset=folder", "--set", f"data.root={barn}")


def goes_on(said: Said) -> None:
    """The frames were read and the exam was frozen; what the command stops at is the next thing."""
    assert said.code == 2 and said.made == {"frames", "episodes"}
    assert len(said.lines) == 1 and "no encoder weights" in said.lines[0]


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda path: save(path, np.zeros((5, 5), np.uint8)), "the layers differ in size"),
    (lambda path: path.write_bytes(path.read_bytes()[:40]), "cannot be decoded"),
    (lambda path: path.write_text("not a picture"), "cannot be decoded"),
    (lambda path: path.unlink(), "unlabelled"),
], ids=["another size", "truncated", "no picture", "unlabelled"])  # fmt: skip
def test_pictures_that_cannot_be_used_fail_the_stage_until_they_are_mended(ask, barn, spoil, words):
    label = barn / "label" / "a0.png"
    whole = label.read_bytes()
    spoil(label)
    code, lines, made = ask(*about(barn))
    assert (code, made) == (1, set())
    assert len(lines) == 1 and "1 of 7 rows are unusable" in lines[0] and words in lines[0]
    label.write_bytes(whole)
    goes_on(ask(*about(barn)))


def test_few_bad_pictures_are_put_aside_and_the_night_goes_on(ask, barn):
    (barn / "label" / "a0.png").write_text("not a picture")
    goes_on(ask(*about(barn), "--set", "compute.max_quarantined=0.2"))


def test_16_bit_infrared_is_accepted(ask, barn):
    save(barn / "infrared" / "a0.png", grey(0).astype(np.uint16) * 100 + 7000)
    goes_on(ask(*about(barn)))


@pytest.fixture
def registered(thermofuse_home, mlflow_uri):
    """A model that is known by name; no picture below gets as far as asking it."""
    client = tracking.client()
    client.create_registered_model(MODEL)
    with tracking.night_run("smoke", "key", {}) as run:
        client.create_model_version(MODEL, str(thermofuse_home), run.id)


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda files: save(files["mask"], np.zeros((24, 32), np.uint8)), "marks nothing; paint the class"),
    (lambda files: save(files["mask"], np.ones((5, 5), np.uint8)), "give a mask of the picture's size"),
    (lambda files: files["query"].write_bytes(files["query"].read_bytes()[:40]), "query.png cannot be decoded"),
    (lambda files: files["support"].write_text("not a picture"), "support.png cannot be decoded"),
    (lambda files: files["mask"].unlink(), "no file mask.png"),
], ids=["empty mask", "another size", "truncated", "no picture", "missing"])  # fmt: skip
def test_predict_says_which_picture_does_not_do(registered, tmp_path, capfd, spoil, words):
    files = {name: save(tmp_path / f"{name}.png", grey(1)) for name in ("query", "support", "mask")}
    spoil(files)
    pair, out = f"{files['support']}:{files['mask']}", tmp_path / "out.png"
    code = main(["predict", str(files["query"]), "--support", pair, "--out", str(out), "--version", "1"])
    said, error = capfd.readouterr()
    assert (code, said) == (2, "") and len(error.splitlines()) == 1 and words in error
    assert not out.exists()


# ---- the store


def test_a_store_that_may_not_be_written_to_is_named(ask, place, barn, monkeypatch):
    (place / "file").write_text("in the way")
    monkeypatch.setenv("THERMOFUSE_STORE", str(place / "file" / "store"))
    code, lines, made = ask(*about(barn))
    assert (code, made) == (2, set())
    assert len(lines) == 1 and str(place / "file") in lines[0] and "set THERMOFUSE_STORE" in lines[0]


def test_a_full_disk_stops_the_night_and_the_next_one_goes_on(ask, place, barn, monkeypatch):
    """Full at the seventh file: the lease is held and some pictures are written."""
    writes, sync = iter(range(1, 1000)), os.fsync

    def fill(file: int) -> None:
        if next(writes) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill)
        code, lines, made = ask(*about(barn))
    assert (code, made) == (1, set())
    assert len(lines) == 1 and "disk full" in lines[0] and "free some space and run again" in lines[0]
    assert all(name.endswith(".guard") for name in places.store().blobs.names(".tmp")), "no half of a file is left"
    goes_on(ask(*about(barn)))
