"""Cells of a generalised study: trained as the stage trains, examined alike, kept one by one."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest

from models.backbone import save_encoder
from models.errors import StageFailed
from models.frames import Frames
from models.segmenters.joint import JointSettings
from models.views import FeatureBank
from tasks import compare_generalised as comparing
from tasks import places, train_generalised
from tasks.compare_generalised import Classroom, Course, Lesson, compare_generalised, graded_cells
from tasks.evaluate_generalised import Examiner, summed
from tasks.fanout import Compute
from tasks.train_generalised import BaseJob, JointJob, base_loop, joint_loop
from tests.models.drawn import ENCODER
from tests.tasks.test_imagine import Shards
from tests.tasks.test_train_generalised import FOLD, SETTINGS, Kept, frames, supports, synthetic

__all__ = ["frames", "supports", "synthetic"]  # fixtures
SHORT = replace(SETTINGS, joint=JointSettings(mix=(3, 2, 1), steps=4, rate=0.02), seed=5)
COURSES = (Course("supports"), Course("sabr", "the whole method", "grammar"),
           Course("paste", "on frames", "grammar", paste=True), Course("pasted", paste=True, control=True),
           Course("real", truth=True))


def row(course):
    told = {"upto": course.upto, "truth": course.truth, "paste": course.paste}
    return {"id": course.name, "source": 0 if course.source else None, **told}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, frames, synthetic):
    """Frames, encoder, base model, pictures, labels."""
    root = tmp_path_factory.mktemp("parts")
    for name in ("encoder", "base"):
        (root / name).mkdir()
    save_encoder(root / "encoder", ENCODER)
    inputs = [frames.folder, root / "encoder"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_generalised, "Checkpoints", Kept)
        base_loop({"settings": BaseJob(replace(SHORT, seed=0), FOLD), "folders": inputs, "out": root / "base"})
    return [*inputs, root / "base", *synthetic]


@pytest.fixture(scope="module")
def settings(frames, supports):
    asked = {str(k): list(ids) for k, ids in supports.items()}
    return {"train": SHORT, "fold": FOLD, "queries": frames.ids("test"), "supports": asked}


@pytest.mark.parametrize("course", COURSES, ids=lambda course: course.name)
def test_a_cell_trains_and_asks_as_the_stages_do(course, folders, settings, supports, tmp_path, monkeypatch):
    monkeypatch.setattr(train_generalised, "Checkpoints", Kept)
    inputs = folders if course.source else folders[:3]
    job = JointJob(SHORT, FOLD, supports, course.truth, course.upto, course.paste)
    joint_loop({"settings": job, "folders": inputs, "out": tmp_path})
    examiner = Examiner({}, [*folders[:2], tmp_path])
    told = examiner([{"id": id} for id in settings["queries"]], None)
    cell = Classroom(settings, folders).cell(row(course))
    one, other = (summed([asked["all"] for asked in exam], 12) for exam in (told, cell))
    assert abs(one - other).sum() < 0.01 * one.sum(), "but for the rounding of features encoded together"
    assert [asked["id"] for asked in cell] == settings["queries"]


def test_an_actor_encodes_a_picture_once_for_all_its_cells(folders, settings, monkeypatch):
    read, encode = [], FeatureBank._encode
    monkeypatch.setattr(FeatureBank, "_encode", lambda bank, keys: read.extend(keys) or encode(bank, keys))
    room = Classroom(settings, folders)
    shared = room([row(course) for course in COURSES], None)
    assert len(set(read)) == len(read)
    apart = [Classroom(settings, folders)([row(course)], None)[0] for course in COURSES]
    assert shared == apart, "what was encoded before changes nothing"
    assert len({cell["exam"] for cell in shared}) == len(COURSES)


def test_a_loss_that_is_not_finite_names_cell_and_step(folders, settings, monkeypatch):
    monkeypatch.setattr(comparing, "CHECK_EVERY", 1)
    wild = settings | {"train": replace(SHORT, joint=replace(SHORT.joint, rate=1e30))}
    with pytest.raises(StageFailed, match=r"sabr is not finite at step [1-3]"):
        Classroom(wild, folders).cell(row(COURSES[1]))


# ---- the stage


@pytest.fixture
def refs(thermofuse_home, folders, frames):
    """Refs of frames, encoder, base, pictures and labels."""
    found = []
    for name, folder in zip(("frames", "encoder", "base", "imagined", "labelled"), folders, strict=True):
        draft = places.store().draft(name, "a" * 16)
        for path in (folder / "images").glob("*"):
            draft.write(f"images/{path.name}", path.read_bytes())
        for path in folder.glob("*"):
            if path.is_file() and path.name not in ("manifest.json", "rows.parquet"):
                draft.write(path.name, path.read_bytes())
        table = frames.rows if name == "frames" else None
        if name == "labelled":
            table = pd.read_parquet(folder / "rows.parquet")
        found.append(draft.commit(table, dict(frames.info) if name == "frames" else {}, count=1))
    return found


def compared(refs, supports, shards, monkeypatch, **changes):
    monkeypatch.setattr(comparing, "fan_out", shards)
    frames_ref, encoder, base, *pair = refs
    queries = Frames.open(places.store().local(frames_ref)).ids("test")
    one = replace(Lesson(FOLD, 5, supports, base, {"grammar": tuple(pair)}), **changes)
    return compare_generalised.fn(frames_ref, encoder, one, queries, COURSES, replace(SHORT, seed=0), Compute())


def test_a_study_that_was_killed_goes_on_with_the_next_cell(refs, supports, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        compared(refs, supports, first := Shards(until=1), monkeypatch)
    ref = compared(refs, supports, second := Shards(), monkeypatch)
    assert first.drawn == ["supports"] and second.drawn == [course.name for course in COURSES[1:]]
    assert compared(refs, supports, third := Shards(), monkeypatch) == ref and third.drawn == []
    assert compared(refs, supports, Shards(), monkeypatch, seed=6) != ref, "another seed, other cells"


def test_cells_are_graded_in_all_conventions(refs, supports, monkeypatch):
    ref = compared(refs, supports, Shards(), monkeypatch)
    table = graded_cells(ref, refs[0], FOLD, 5)
    assert list(dict.fromkeys(table["step"])) == [course.name for course in COURSES]
    assert set(table["protocol"]) == {"capl", "diam", "capl+diam", "bam"} and set(table["seed"]) == {5}
    for text in places.store().rows(ref)["exam"]:
        assert {"id", "all", "single"} == set(json.loads(text)[0])
