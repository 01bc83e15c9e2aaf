"""The studies of Syn4Seg in the small, without Ray or Prefect: what is shared, what is kept, what is written down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from flows.generalised import foundation_of, generalised
from flows.generalised_recipes import FOUNDATIONS, named
from flows.syn4seg import STUDIES, segmenter_of, study
from models.errors import UsageError
from tasks.prepare import prepare
from tests.flows.test_generalised import TINY, here

__all__ = ["here"]  # a fixture


def test_the_steps_are_compared_on_every_seed_and_nothing_is_made_twice(here):
    shards, loops = here
    generalised.fn(TINY)
    before = len(shards.drawn)
    found = study.fn("syn4seg", TINY, (5, 6))
    steps = ["supports", "pasted_supports", "hdig", "ape", "sabr", "paste", "real_masks"]
    assert [row["row"] for row in found.rows] == steps
    assert all(row["runs"] == 2 and row["novel_low"] is not None for row in found.rows)
    assert found.references == ("supports", "previous") and json.dumps(found.as_dict(), allow_nan=False)
    cells = [name for name in shards.drawn[before:] if not name.startswith(("batch", "t"))]
    assert cells == steps, "those of the night's seed are found"
    assert loops.ran == ["generalised_base", "foundation", "generalised"]
    table = pd.read_parquet(found.report["table.parquet"])
    assert {"base", "novel", "harmonic", "over_supports", "over_previous", "closed"} <= set(table.columns)
    assert Path(found.report["table.md"]).read_text().count("\n") == 2 + len(found.rows)
    assert Path(found.report["chart"]).is_file()

    drawn = len(shards.drawn)
    again = study.fn("syn4seg", TINY, (5, 6))
    assert len(shards.drawn) == drawn and (again.key, again.rows) == (found.key, found.rows)
    assert study.fn("syn4seg", TINY, (5,)).key != found.key


def test_labels_are_judged_where_the_truth_is_known(here):
    shards, _ = here
    found = study.fn("labels", TINY, (5,))
    assert [row["row"] for row in found.rows] == ["predict", "apf", "apr", "sabr"]
    assert "SAM of foundation" in found.rows[-1]["about"] and found.rows[0]["over_predict"] is None
    assert all(row["low"] <= row["miou"] <= row["high"] for row in found.rows)
    assert "SAM: foundation." in Path(found.report["table.md"]).read_text()
    assert not [name for name in shards.drawn if name.startswith("batch")], "no picture is drawn for it"


def test_a_sam_may_be_none_borrowed_or_named(here, monkeypatch):
    _, loops = here
    frames = prepare(TINY.data, TINY.compute)

    def of(sam):
        return segmenter_of(replace(TINY, label=replace(TINY.label, sam=sam)), frames, 0)

    rule, nothing = of("none")
    assert (rule.rule.upto, nothing, loops.ran) == ("ape", None, [])
    assert of("facebook/sam-vit-base")[1] is None and of("facebook/sam-vit-base")[0].rule.upto == "sabr"
    monkeypatch.setitem(FOUNDATIONS, "lender", lambda: replace(TINY, name="lender"))
    assert of("lender")[1] == foundation_of(named("lender"), frames, 0) == of("foundation")[1]
    assert loops.ran == ["foundation"]


def test_an_unknown_study_lists_the_right_ones():
    with pytest.raises(UsageError, match="choose one of syn4seg, labels"):
        study.fn("syn4sgg", TINY, (5,))
    assert list(STUDIES) == ["syn4seg", "labels"]
