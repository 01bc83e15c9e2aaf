"""Fusion studies on toy pairs: what is fitted, what is compared, and what is written down."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from flows import display, fusion_studies
from flows.fusion_recipes import TOY, FusionSizes, sized
from flows.fusion_studies import CONTROLS, ablations, fuser_rows, mask_conditions, sensor_rows, study
from flows.recipes import smoke
from models.errors import UsageError
from models.fusers.metrics import METRICS
from tasks import cells, places
from tests.models.drawn import drawn_frames


@pytest.fixture
def here(thermofuse_home, mlflow_uri, tmp_path, monkeypatch):
    """Drawn frames in the store, fan-outs in this process; returns the names of the cells that were made."""
    made = []

    def in_process(worker, rows, settings, *_, **__):
        made.extend(row["id"] for row in rows)
        worker(settings, [])(rows, None)

    (tmp_path / "drawn").mkdir()
    drawn = drawn_frames(tmp_path / "drawn", train=4, test=3)
    draft = places.store().draft("frames", "d" * 16)
    for path in (tmp_path / "drawn" / "images").iterdir():
        draft.write(f"images/{path.name}", path.read_bytes())
    frames = draft.commit(drawn.rows, drawn.info)
    monkeypatch.setattr(cells, "fan_out", in_process)
    monkeypatch.setattr(fusion_studies, "prepare", lambda *_: frames)
    return made


def recipe(**exam):
    plain = smoke()
    return replace(plain, exam=replace(plain.exam, resamples=50, **exam))


def run(name: str, *seeds: int) -> dict:
    """The study without Prefect, as the command line prints it."""
    return json.loads(json.dumps(study.fn(name, recipe(), seeds or (5,)).as_dict(), allow_nan=False))


def test_learnt_fusers_stand_beside_their_controls_and_their_parts(here):
    found = run("fusers")
    table = pd.DataFrame(found["rows"]).set_index("row")
    assert table.index.tolist() == [
        "average", "maximum", "saliency", "two_scale", "segmif", "stage1", "sgdfuse_1", "sgdfuse_2", "stage2_alone",
        "without_masks", "without_diffusion", "without_hfah",
    ]  # fmt: skip
    assert (table["pictures"] == 3).all() and table[list(METRICS)].notna().all(axis=None)
    assert table.loc[["average", "maximum", "saliency", "two_scale"], "over_Qabf"].isna().all()
    assert table.loc["segmif":, "over_Qabf"].notna().all()
    assert not table.loc["stage1", list(METRICS)].equals(table.loc["sgdfuse_2", list(METRICS)])
    text = Path(found["report"]["table.md"]).read_text()
    assert "| without_hfah |" in text and "Qabf over best control" in text
    assert {"chart", "pictures"} <= set(found["report"])
    again, before = run("fusers"), len(here)
    assert again["rows"] == found["rows"] and again["key"] == found["key"] and len(here) == before
    console = Console(file=io.StringIO(), width=200)
    display.study(console, found)
    assert "over best control" in console.file.getvalue() and "sgdfuse_2" in console.file.getvalue()


def test_masks_get_worse_and_the_fuser_stays_the_same(here):
    run("fusers")
    fitted = len(here)
    found = run("masks")
    table = pd.DataFrame(found["rows"]).set_index("row")
    assert table.index.tolist() == ["maximum", "stage1", "original", "shrunk_2", "grown_2", "dropped_infrared",
                                    "dropped_visible", "dropped_both"]  # fmt: skip
    assert not {"segmif", "sgdfuse", "stage2_alone", "without_masks"} & set(here[fitted:]), "nothing is fitted again"
    assert table["over_VIF"].isna().tolist() == [True] + [False] * 7
    same = run("fusers")["rows"]
    whole = next(row for row in same if row["row"] == "sgdfuse_2")
    assert [whole[name] for name in METRICS] == table.loc["original", list(METRICS)].tolist()
    assert Path(found["report"]["chart"]).read_bytes().startswith(b"\x89PNG")


def test_sensors_are_compared_by_one_network(here):
    found = run("sensors", 5, 6)
    table = pd.DataFrame(found["rows"]).set_index("row")
    assert table.index.tolist() == ["infrared", "visible", "maximum", "sgdfuse", "segmif", "segmif_detached",
                                    "segmif_joint"]  # fmt: skip
    assert table["miou"].between(0, 100).all() and (table["low"] <= table["high"]).all()
    assert table["over_visible"].isna().tolist() == [False, True, *[False] * 5]
    assert {"miou_all", "miou_fg", "miou_present"} <= set(table)
    assert table["episodes"].nunique() == 1 and table["episodes"].iloc[0] == 3 * 13 * 2
    one = run("sensors", 5)
    assert one["key"] != found["key"] and one["rows"][0]["episodes"] == 3 * 13


def test_an_unknown_study_is_named_with_the_right_ones(here):
    with pytest.raises(UsageError, match="no study 'fusres'; choose one of fusers, masks, sensors"):
        run("fusres")


def test_every_part_is_left_out_once():
    whole = TOY.sgdfuse
    made = ablations(whole)
    assert made["without_masks"] == replace(whole, masks=replace(whole.masks, backend="none"))
    assert made["without_diffusion"].network == {**whole.network, "start": "clean"}
    assert made["without_hfah"].network == {**whole.network, "head": "plain"}


@pytest.mark.parametrize("sizes", [TOY, FusionSizes()], ids=["toy", "two cores"])
def test_rows_use_fusers_that_are_fitted_and_only_on_test_pairs(sizes):
    rows, uses = fuser_rows(sizes)
    assert [row.name for row in rows] == list(uses) and len({row.about for row in rows}) == len(rows)
    assert all(settings.splits == ("test",) for _, settings in uses.values())
    known = {*CONTROLS, "segmif", "sgdfuse", "stage2_alone", *ablations(sizes.sgdfuse)}
    assert {fuser for fuser, _ in uses.values()} == known
    assert uses["stage1"][1].steps == 0 and uses[f"sgdfuse_{sizes.steps[-1]}"][1].steps == sizes.steps[-1]
    assert uses["without_masks"][1].masks.backend == "none" != uses["without_hfah"][1].masks.backend


def test_conditions_change_the_masks_alone():
    told = sized(smoke()).sgdfuse
    made = mask_conditions(told, (-2, 4))
    assert list(made) == ["original", "shrunk_2", "grown_4", "dropped_infrared", "dropped_visible", "dropped_both"]
    changes = [(settings.masks.grow, settings.masks.drop) for _, settings in made.values()]
    assert changes == [(0, ""), (-2, ""), (4, ""), (0, "infrared"), (0, "visible"), (0, "both")]
    assert all(replace(settings, masks=told.masks) == told for _, settings in made.values())


def test_sensors_differ_in_what_is_seen_alone():
    made = {sensor.name: sensor for sensor in sensor_rows(TOY)}
    detached = made.pop("segmif_detached")
    assert detached.settings == replace(TOY.joint, detach=True) and detached.layer == made["segmif_joint"].layer
    assert all(sensor.settings == TOY.joint for sensor in made.values())
    assert {sensor.fused for sensor in made.values() if sensor.layer == "fused"} == {"maximum", "sgdfuse", "segmif"}
