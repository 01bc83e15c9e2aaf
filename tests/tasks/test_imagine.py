"""Pictures of prompts: balanced, named by prompt and number, the same to the bit, and never drawn twice."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from models.errors import UsageError
from models.frames import read_png
from models.generators.recognition import RecogniserSettings, build_recogniser, save_judge
from models.generators.text2image import PictureSettings
from tasks import places
from tasks.fanout import Compute, Job, Tally
from tasks.imagine import Imagine, ImagineSettings, batches, distinct_pictures, imagine, pictures_of, unfold
from tasks.store import digest_of
from tests.models.generators.test_inspection import clip
from tests.models.generators.tiny import pipeline

__all__ = ["clip"]  # a fixture

PICTURE = PictureSettings("foundation", dtype="float32", size=(32, 32), steps=1, batch=3)
SETTINGS = ImagineSettings(per_class=4, picture=PICTURE)
PROMPTS = pd.DataFrame({
    "prompt_uid": ["a0", "a1", "b0", "a2"], "class_id": [3, 3, 7, 3], "accepted": [True, True, True, False],
    "text": ["a car", "an old car", "a dog", "night"],
})
CLASSES = ("person", "tree", "car", "boat", "bird", "cow", "dog")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    pipeline("sd15").save_pretrained(path / "pipeline")
    return path


def stored(folder):
    """Refs of the prompts and of the foundation models in the store of this moment."""
    prompts = places.store().draft("prompts", "a" * 16).commit(PROMPTS, {"classes": CLASSES})
    draft = places.store().draft("foundation", "b" * 16)
    draft.upload(folder)
    return prompts, draft.commit(None, {}, count=1)


@pytest.fixture
def refs(thermofuse_home, folder):
    return stored(folder)


class Shards:
    """fan_out without actors: the same digest, shards and commits, `size` rows each; dies before shard `until`."""

    def __init__(self, size=1, until=None):
        self.size, self.until, self.drawn = size, until, []

    def __call__(self, worker, rows, settings, compute, *, kind, inputs, code, meta=None, extra=None):
        store, tally = places.store(), Tally(kind, rows, 0.5)
        digest = digest_of(kind, inputs, {"settings": settings, "rows": rows, "extra": extra}, code)
        if found := store.find(kind, digest):
            return found
        draft = store.draft(kind, digest)
        for data in draft.read_all("shards"):
            tally.take(json.loads(data))
        missing = [row for row in rows if row["id"] not in tally.results]
        job = Job(worker, settings, tuple(inputs), store, kind, digest)
        made = job.start_worker()
        for n, start in enumerate(range(0, len(missing), self.size)):
            if n == self.until:
                raise KeyboardInterrupt
            shard = missing[start : start + self.size]
            self.drawn += [row["id"] for row in shard]
            tally.take(job.run_shard(made, shard))
        return tally.commit(draft, meta or {})


def tree(ref):
    """Name -> bytes of everything that the manifest lists."""
    folder = places.store().local(ref)
    return {name: (folder / name).read_bytes() for name in places.store().manifest(ref)["files"]}


def made(monkeypatch, refs, shards, settings=SETTINGS):
    monkeypatch.setattr("tasks.imagine.fan_out", shards)
    return imagine.fn(*refs, settings, Compute())


# ---- rows


def test_classes_take_turns_and_prompts_are_reused_with_other_seeds():
    rows = batches(PROMPTS[PROMPTS["accepted"]], SETTINGS)
    jobs = [job for row in rows for job in row["jobs"]]
    assert [len(row["jobs"]) for row in rows] == [3, 3, 2]
    assert [job["class_id"] for job in jobs] == [3, 7] * 4
    assert [job["id"] for job in jobs if job["class_id"] == 3] == ["a0-00", "a1-00", "a0-01", "a1-01"]
    assert len({job["seed"] for job in jobs}) == 8 and len({job["id"] for job in jobs}) == 8


# ---- the worker


def test_a_batch_gives_pictures_with_their_facts(refs, monkeypatch):
    ref = made(monkeypatch, refs, Shards())
    table = pictures_of(ref)
    assert ref.count == 3 and len(table) == 8 and set(table["class_id"]) == {3, 7}
    row = table.iloc[0]
    assert row["picture"] == "images/003/a0-00.png" and row["attempts"] == 1 and len(row["hash"]) == 16
    picture = read_png(places.store().local(ref) / row["picture"])
    assert picture.shape == (32, 32, 3) and set(table["status"]) <= {"ok", "collage"}


def test_the_tree_is_the_same_for_any_shards(thermofuse_home, folder, monkeypatch, tmp_path):
    trees = []
    for size in (1, 2, 8):
        monkeypatch.setenv("THERMOFUSE_STORE", str(tmp_path / f"store{size}"))
        trees.append(tree(made(monkeypatch, stored(folder), Shards(size))))
    assert trees[0] == trees[1] == trees[2] and len([name for name in trees[0] if name.endswith(".png")]) == 8


def test_a_killed_run_goes_on_and_ends_as_one_that_was_left_alone(refs, folder, monkeypatch, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        made(monkeypatch, refs, first := Shards(until=2))
    ref = made(monkeypatch, refs, second := Shards())
    assert first.drawn == ["batch-000000", "batch-000001"] and second.drawn == ["batch-000002"]
    again = made(monkeypatch, refs, third := Shards())
    assert again == ref and third.drawn == []
    killed = tree(ref)
    monkeypatch.setenv("THERMOFUSE_STORE", str(tmp_path / "other"))
    assert tree(made(monkeypatch, stored(folder), Shards(8))) == killed


def test_other_settings_of_labels_or_compute_touch_no_picture(refs, monkeypatch):
    """Spec §11, group 10: what labelling may sweep is no part of a picture's key; what draws it is."""
    ref = made(monkeypatch, refs, Shards())
    assert made(monkeypatch, refs, Shards(8)) == ref
    other = replace(SETTINGS, picture=replace(PICTURE, steps=2))
    assert made(monkeypatch, refs, Shards(), other).digest != ref.digest


def test_broken_pictures_are_told_and_no_file_is_written(refs, monkeypatch):
    monkeypatch.setattr("models.generators.text2image.TextToImage._call",
                        lambda self, prompts, seeds: np.zeros((len(prompts), 32, 32, 3)))
    ref = made(monkeypatch, refs, Shards())
    table = pictures_of(ref)
    assert set(table["status"]) == {"black"} and set(table["attempts"]) == {2} and table["picture"].isna().all()
    assert not [name for name in tree(ref) if name.endswith(".png")]


# ---- what is kept


def test_near_copies_and_broken_pictures_are_left_out():
    rows = pd.DataFrame({"id": list("abcde"), "class_id": [3, 3, 7, 3, 3], "hash": ["f0", "f1", "f0", None, "0f0f00"],
                         "status": ["ok", "ok", "ok", "black", "ok"], "embedding": None})
    assert list(distinct_pictures(rows, SETTINGS.quality)["id"]) == ["a", "c", "e"]


def test_no_pictures_unfold_to_an_empty_table():
    assert len(unfold(pd.DataFrame({"id": [], "pictures": []}))) == 0
    assert list(unfold(pd.DataFrame({"id": []})).columns)[:2] == ["id", "class_id"], "as an empty fan-out commits it"


def test_a_named_pipeline_needs_no_foundation(folder):
    chosen = replace(PICTURE, pipeline=str(folder / "pipeline"))
    worker = Imagine({"picture": chosen, "quality": SETTINGS.quality, "judge": "", "classes": []}, [])
    assert len(worker.generator.draw(["a car"], [1])) == 1


def test_a_judge_turns_down_what_shows_another_class(refs, clip, monkeypatch, tmp_path):
    for part in clip:
        part.save_pretrained(tmp_path / "clip")
    plain = replace(SETTINGS.quality, seam=1e9, frame=2.0)
    judged = replace(SETTINGS, judge=str(tmp_path / "clip"), quality=plain)
    table = pictures_of(made(monkeypatch, refs, Shards(8), judged))
    assert table["margin"].notna().all() and table["margin"].nunique() > 1
    assert ((table["margin"] <= 0) == (table["status"] == "wrong class")).all() and (table["margin"] <= 0).any()
    lenient = replace(judged, quality=replace(plain, margin=None))
    again = pictures_of(made(monkeypatch, refs, Shards(1), lenient))
    assert set(again["status"]) == {"ok"} and again["margin"].equals(table["margin"]), "the same in any shard"


def test_a_judge_of_the_run_s_own_needs_foundation_models(folder, tmp_path):
    model = build_recogniser(3, RecogniserSettings(widths=(4,)))
    save_judge(tmp_path / "judge", model, ("a", "b", "c"))
    shutil.copytree(folder / "pipeline", tmp_path / "pipeline")
    settings = {"picture": PICTURE, "quality": SETTINGS.quality, "judge": "foundation", "classes": ["a", "b", "c"]}
    worker = Imagine(settings, [tmp_path])
    seen = worker._judged(np.zeros((32, 32, 3), np.uint8), {"class_id": 2})
    assert seen["margin"] == pytest.approx(float(worker.judge.margins([np.zeros((32, 32, 3), np.uint8)],
                                                                      ["a", "b", "c"], 1)[0][0]), abs=1e-5)
    with pytest.raises(UsageError, match=r"no foundation models.*name a judge"):
        Imagine(settings | {"picture": replace(PICTURE, pipeline=str(folder / "pipeline"))}, [])


def test_of_pictures_that_are_near_for_the_judge_the_first_stays():
    def stored(*vector):
        return base64.b64encode(np.array(vector, np.float16).tobytes()).decode()

    rows = pd.DataFrame({"id": list("abcd"), "class_id": [3, 3, 7, 3], "status": "ok",
                         "hash": ["00", "ff", "ffff", "ff00ff00"],
                         "embedding": [stored(1, 0), stored(0.99, 0.1), stored(1, 0), stored(0, 1)]})
    assert list(distinct_pictures(rows, SETTINGS.quality)["id"]) == ["a", "c", "d"]
    rows.loc[1, "embedding"] = None
    assert list(distinct_pictures(rows, SETTINGS.quality)["id"]) == list("abcd"), "what was not judged is no copy"
