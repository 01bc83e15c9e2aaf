"""Pictures carried to infrared: aligned with their labels, checked again, and fit for the joint training."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from models.frames import Frames, read_png
from models.generators.pictures import lightness_picture
from models.generators.syndiff import SynDiff
from models.generators.text2image import picture_seed
from models.labelling import LabelSettings
from models.prototypes import SYN4SEG
from models.pseudolabels import IGNORE
from tasks import carry as carrying
from tasks import places
from tasks.carry import Carry, CarrySettings, carry, examples
from tasks.fanout import Compute
from tasks.imagine import unfold
from tasks.label import LABEL_COLUMNS
from tasks.train_generalised import Parts
from tests.models.drawn import SIZE, tiny_encoder
from tests.tasks.test_fit_translators import TINY
from tests.tasks.test_imagine import Shards
from tests.tasks.test_label import FOLD, labelled, parts, refs
from tests.tasks.test_train_generalised import SETTINGS

__all__ = ["parts", "refs"]  # fixtures
OPEN = LabelSettings(upto="ape", filter=replace(SYN4SEG, min_area=0, lam=-1.0), views=1)
CARRY = CarrySettings(frames=8, rule=OPEN, batch=1)


@pytest.fixture
def given(refs, monkeypatch):
    """What `carry` takes: pictures with their labels, and a base model that knows infrared."""
    draft, store = places.store().draft("base", "b" * 16), places.store()
    for path in store.local(refs["base"]).iterdir():
        if path.suffix == ".safetensors":
            draft.write(path.name, path.read_bytes())
    config = json.loads((store.local(refs["base"]) / "config.json").read_text()) | {"layer": "infrared"}
    draft.write("config.json", json.dumps(config).encode())
    chosen = {name: refs[name] for name in ("frames", "encoder", "imagined", "supports")}
    made = draft.commit(None, {}, count=1)
    return chosen | {"labelled": labelled(monkeypatch, refs), "base": made, "translators": None}


def carried(given, monkeypatch, settings=CARRY, shards=None):
    monkeypatch.setattr(carrying, "fan_out", shards or Shards())
    return carry.fn(**given, settings=settings, compute=Compute())


def rows_of(ref):
    return unfold(places.store().rows(ref), LABEL_COLUMNS).to_dict("records")


def test_pictures_turn_grey_and_keep_their_labels_where_the_filter_is_open(given, monkeypatch):
    ref, store = carried(given, monkeypatch), places.store()
    before = {row["id"]: row for row in rows_of(given["labelled"])}
    assert [row["id"] for row in rows_of(ref)] == list(before)
    for row in rows_of(ref):
        assert read_png(store.local(ref) / row["picture"]).shape == SIZE
        assert list(row["labels"]) == list(row["statuses"]) == ["predict", "apf", "apr", "sabr"]
        for step, name in row["labels"].items():
            old = read_png(store.local(given["labelled"]) / before[row["id"]]["labels"][step])
            assert (read_png(store.local(ref) / name) == old).all()
        assert row["kept"] == 1 and row["changed"] == 0


def test_a_closed_filter_frees_novel_regions_and_nothing_else(given, parts, monkeypatch):
    closed = replace(CARRY, rule=replace(OPEN, filter=replace(OPEN.filter, lam=1.0)))
    ref, store, novel = carried(given, monkeypatch, closed), places.store(), parts[1].novel(FOLD)
    for row, old in zip(rows_of(ref), rows_of(given["labelled"]), strict=True):
        after = read_png(store.local(ref) / row["labels"]["sabr"])
        before = read_png(store.local(given["labelled"]) / old["labels"]["sabr"])
        assert (after[np.isin(before, novel)] == IGNORE).all() and (after[~np.isin(before, novel)] ==
                                                                    before[~np.isin(before, novel)]).all()
        assert row["statuses"]["sabr"] != "ok" and row["target"] == 0


def test_the_same_for_any_shards(given, monkeypatch, tmp_path):
    one = rows_of(carried(given, monkeypatch))
    several = carried(given, monkeypatch, replace(CARRY, batch=2), Shards(2))
    assert [row | {"picture": ""} for row in rows_of(several)] == [row | {"picture": ""} for row in one]


def test_the_joint_training_reads_both_from_one_place(given, monkeypatch):
    folder = places.store().local(carried(given, monkeypatch))
    frames = Frames.open(places.store().local(given["frames"]))
    settings = replace(SETTINGS, layer="infrared")
    read = Parts(frames, tiny_encoder(), (folder, folder), settings, FOLD)
    for ids in read.synthetic.values():
        assert all(read.picture(id, "synthetic").shape == read.label(id, "synthetic").shape == SIZE for id in ids)


def test_tones_are_read_of_base_classes_and_supports_alone(parts, given):
    frames, novel = parts[1], parts[1].novel(FOLD)
    shown = examples(frames, "infrared", novel, 4)
    assert len(shown) == 4 and not any(np.isin(label, novel).any() for _, label in shown)
    inputs = [places.store().local(given[name]) for name in ("frames", "encoder", "base", "imagined", "labelled")]
    settings = {"carry": CARRY, "rule": OPEN, "sam": "none",
                "supports": {str(k): list(ids) for k, ids in given["supports"].items()}}
    tone = Carry(settings, inputs).warmth.tone
    (k, (id, *_)), *_ = given["supports"].items()
    assert tone[k] == pytest.approx(frames.infrared(id)[frames.label(id) == k].mean())


def test_a_fitted_translator_takes_the_place_of_the_control(given, monkeypatch, tmp_path):
    translator = SynDiff.of(TINY, "thermal")
    translator.save(tmp_path / "fitted" / "thermal")
    draft, store = places.store().draft("translators", "a" * 16), places.store()
    draft.upload(tmp_path / "fitted")
    ref = carried(given | {"translators": draft.commit(None, {}, count=1)}, monkeypatch)
    assert ref != carried(given, monkeypatch)
    for row, old in zip(rows_of(ref), rows_of(given["labelled"]), strict=True):
        light = lightness_picture(read_png(store.local(given["imagined"]) / old["picture"]))
        (expected,) = translator.translate([light], [picture_seed(0, row["id"], 0)])
        assert (read_png(store.local(ref) / row["picture"]) == expected).all()

