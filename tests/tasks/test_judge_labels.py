"""Labels of real frames against their truth: counts by hand, the same for any shards, steps compared on one draw."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd

from models.labelling import LAST, label_counts
from models.pseudolabels import IGNORE
from tasks import judge_labels as judging
from tasks import places
from tasks.fanout import Compute
from tasks.judge_labels import COUNTS, counted, judge_labels, label_scores, markdown
from tests.tasks.test_imagine import Shards
from tests.tasks.test_label import FOLD, STAGE, parts, refs

__all__ = ["parts", "refs"]  # fixtures


def judged(refs, frames, monkeypatch, settings=STAGE, size=3):
    monkeypatch.setattr(judging, "fan_out", Shards(size))
    given = [refs[name] for name in ("frames", "encoder", "base", "foundation", "supports")]
    if settings.rule.upto != "sabr":
        given[3] = None
    return judge_labels.fn(*given, frames.ids("test"), settings, FOLD, Compute())


# ---- counts


def test_counts_by_hand():
    truth = np.array([[1, 1, 1, 0, IGNORE, 2]], np.uint8)
    label = np.array([[1, IGNORE, 0, 1, 1, 1]], np.uint8)
    assert label_counts(label, truth, 1) == (1, 5, 3, 2, 3)


# ---- the stage


def test_every_frame_with_a_novel_class_is_asked_for_it(refs, parts, monkeypatch):
    frames = parts[1]
    ref = judged(refs, frames, monkeypatch)
    table = counted(ref, fold=FOLD, seed=7)
    shown = {(id, k) for id in frames.ids("test") for k in set(frames.pixels(id)) & set(frames.novel(FOLD))}
    assert set(zip(table["frame"], table["class_id"], strict=True)) == shown
    assert list(dict.fromkeys(table["step"])) == ["predict", "apf", "apr", "sabr"] and set(table["seed"]) == {7}
    there = table[table["step"] == "sabr"].set_index(["frame", "class_id"])["there"]
    assert all(there[id, k] == frames.pixels(id)[k] for id, k in shown)
    assert judged(refs, frames, monkeypatch, size=1) == ref


def test_counts_do_not_depend_on_shards(refs, parts, monkeypatch, tmp_path):
    rows = [{"id": id, "classes": list(parts[1].novel(FOLD))[:1]} for id in parts[1].ids("test")]
    inputs = [places.store().local(refs[name]) for name in ("frames", "encoder", "base", "foundation")]
    settings = {"rule": STAGE.rule, "sam": STAGE.sam, "supports": {str(k): v for k, v in refs["supports"].items()}}
    whole = judging.Judge(settings, inputs)(rows, None)
    assert whole == [judging.Judge(settings, inputs)([row], None)[0] for row in rows[:2]] + whole[2:]


def test_without_a_sam_labels_end_before_it(refs, parts, monkeypatch):
    plain = replace(STAGE, rule=replace(STAGE.rule, upto="ape"), sam="none")
    table = counted(judged(refs, parts[1], monkeypatch, plain))
    assert list(dict.fromkeys(table["step"]))[-1] == LAST["ape"]


# ---- the table


def table_of(**steps):
    """Counts of four frames with one class of 100 pixels each; steps: name -> pixels found, of 50 that are said."""
    rows = [{"frame": f"f{n}", "step": step, "class_id": k, "fold": 0, "seed": 0,
             **dict(zip(COUNTS, (found, 150 - found, 50, 80, 100), strict=True))}
            for n in range(4) for k in (1, 2) for step, found in steps.items()]
    return pd.DataFrame(rows)


def test_scores_are_means_over_classes_with_paired_gains():
    found = label_scores(table_of(predict=25, apf=40), resamples=50).set_index("row")
    assert found["miou"].tolist() == [20.0, round(100 * 40 / 110, 2)]
    assert found["precision"].tolist() == [50.0, 80.0] and found["coverage"].tolist() == [80.0, 80.0]
    gain = round(100 * (40 / 110 - 0.2), 2)
    assert (found["over_predict"]["apf"], found["over_predict_low"]["apf"], found["over_predict_high"]["apf"]) == (
        gain, gain, gain), "frames are alike, so every draw gives the same"
    assert pd.isna(found["over_predict"]["predict"]) and set(found["frames"]) == {4}


def test_a_frame_that_differs_widens_the_interval():
    table = table_of(predict=25)
    table.loc[table["frame"] == "f0", "both"] = 0
    found = label_scores(table, resamples=200).iloc[0]
    assert found["miou_low"] < found["miou"] < found["miou_high"]
    assert label_scores(table, resamples=200).equals(label_scores(table, resamples=200)), "draws have a seed"


def test_a_class_that_is_never_said_has_no_precision():
    table = table_of(predict=25)
    table.loc[table["class_id"] == 2, ["both", "said"]] = 0
    found = label_scores(table, resamples=20).iloc[0]
    assert found["precision"] == 50.0 and found["miou"] == 10.0


def test_the_text_has_a_line_per_step():
    lines = markdown(label_scores(table_of(predict=25, apf=40), resamples=20).to_dict("records")).splitlines()
    assert lines[2].startswith("| predict | 20.0 [20.0, 20.0] | 50.0") and "| – | 4 |" in lines[2] and len(lines) == 4


def test_rows_are_json(refs, parts, monkeypatch):
    ref = judged(refs, parts[1], monkeypatch)
    assert all(len(one) == 2 + len(COUNTS) for text in places.store().rows(ref)["counts"] for one in json.loads(text))
